"""Batch jobs that a test runs to compare with, or waits for to disturb."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import core
import serve_batch

SAMPLED = core.Sampling(max_new_tokens=6, temperature=0.9, top_k=40, seed=3)


def run_here(model: Path, tmp_path: Path, output: str, **arguments: Any) -> dict[str, Any]:
    """Returns the manifest of the job over the test's input folder, run in this process."""
    settings = {"sampling": SAMPLED, "slots": 4, **arguments}
    return serve_batch.run(
        model=model, input=tmp_path / "input" / "*", output=tmp_path / output, **settings
    )


def wait_for(
    happened: Callable[[], object], job: subprocess.Popen | None = None, *, limit_s: float = 100
) -> None:
    """Returns as soon as it has happened, which it must before `job` ends."""
    deadline = time.monotonic() + limit_s
    while not happened():
        assert job is None or job.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
