"""Jobs that end before their time, in processes of their own, and what the next run makes of what they left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core
import serve_batch
import tiny
from batch_jobs import wait_for
from core import checkpoint

FLAGS = ["--max_new_tokens=6", "--temperature=0.9", "--top_k=40", "--seed=3", "--slots=4"]
SHARDS = 60


@pytest.fixture
def command(model, tmp_path) -> list[str]:
    folders = [f"--model={model}", f"--input={tmp_path}/input", f"--output={tmp_path}/out"]
    return [sys.executable, "-m", "serve_batch", *folders, *FLAGS, "--shard_size=8"]


def rows(count: int) -> list[Any]:
    return [
        b"bad" if i % 50 == 7 else {"prompt": f"Prompt {i * 7919 % 1000}"} for i in range(count)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "number"),
    [
        (0.1, signal.SIGKILL),
        (0.5, signal.SIGKILL),
        (0.9, signal.SIGKILL),
        (0.5, signal.SIGTERM),
    ],
)
def test_wherever_a_job_dies_the_next_run_ends_with_what_a_clean_one_writes(
    command, write_jsonl, run, tmp_path, share, number
):
    write_jsonl(rows(8 * SHARDS))
    out = tmp_path / "out"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as job:
        wait_for(lambda: len(list(out.glob("_receipts/*.json"))) >= share * SHARDS, job)
        os.kill(job.pid, number)
    assert job.returncode != 0
    done = len(list(out.glob("_receipts/[0-9]*.json")))
    assert done >= share * SHARDS
    assert not (out / "_SUCCESS").exists()
    shutil.copytree(out, tmp_path / "again", symlinks=True)
    for place in (out, tmp_path / "again"):  # the folder may have been moved meanwhile
        assert run(input=tmp_path / "input", output=place)["shards_done"] == SHARDS - done
    run(input=tmp_path / "input", output=tmp_path / "clean", shard_size=8)
    plan = {"_plan.json"}  # the date may be another
    clean = contents(tmp_path / "clean")
    for place in (out, tmp_path / "again"):
        found = contents(place)
        assert {k: v for k, v in found.items() if k not in plan} == {
            k: v for k, v in clean.items() if k not in plan
        }


@pytest.mark.slow
def test_a_file_system_that_takes_no_more_ends_the_job_and_keeps_what_is_done(
    command, write_jsonl, run, tmp_path
):
    few = [{"prompt": f"Prompt {i}"} for i in range(16)]
    write_jsonl([*few, *({"prompt": f"Prompt {i}", "filler": "x" * 9000} for i in range(16, 24))])

    limited = ["bash", "-c", 'ulimit -f 40 && exec "$@"', "_", *command]  # files of at most 40 KiB
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(limited, capture_output=True, text=True, timeout=200, env=environment)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith("error: shard 2 failed: OSError: ")
    assert "run the same command again" in line
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("part*")) == [
        "part-00000-of-00003.jsonl",
        "part-00001-of-00003.jsonl",
    ]
    assert run(input=tmp_path / "input", shard_size=8)["shards_done"] == 1


@pytest.mark.slow
def test_a_row_that_no_number_comes_of_fails_alone(run, write_jsonl, read_parts, tmp_path):
    """A token whose weights are damaged spoils the rows that hold it, from the step at which it goes in."""
    tokenizer = core.Tokenizer.utf8()
    config = tiny.config(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
    whole = tiny.params(core.build(config))
    (damaged,) = tokenizer.encode("~")
    broken = {**whole, "wte": {"embedding": np.array(whole["wte"]["embedding"])}}
    broken["wte"]["embedding"][damaged] = np.nan
    for name, params in (("whole", whole), ("broken", broken)):
        checkpoint.save(tmp_path / name, config, params, tokenizer=tokenizer)
    prompts = [{"id": i, "prompt": f"Prompt {i}" + "~" * (i % 5 == 3)} for i in range(20)]
    write_jsonl(prompts)
    sampling = core.Sampling(max_new_tokens=6, temperature=0.9, seed=3, bad_ids=(damaged,))
    found = {}
    for name in ("whole", "broken"):
        run(model=tmp_path / name, output=tmp_path / f"{name}_out", sampling=sampling)
        found[name] = read_parts(tmp_path / f"{name}_out")
    for i, (fine, row) in enumerate(zip(found["whole"], found["broken"], strict=True)):
        if i % 5 == 3:
            assert row["error"]["code"] == "not_a_number"
        else:
            assert row["token_ids"] == fine["token_ids"]


@pytest.mark.parametrize("stage", ["encode", "submit", "push", "write"])
def test_a_bug_at_any_stage_ends_the_job_with_its_cause_and_leaves_whole_parts_only(
    run, write_jsonl, monkeypatch, tmp_path, stage
):
    """What is no row's fault is not hidden in an error row: the job stops, and goes on when it is put right."""
    write_jsonl([{"prompt": f"Prompt {i}"} for i in range(40)])
    run(output=tmp_path / "clean")
    place, name = {
        "encode": (core.Tokenizer, "encode"),
        "submit": (core.Engine, "submit"),
        "push": (core.engine.Continuation, "push"),
        "write": (serve_batch.parts.Writer, "keep"),
    }[stage]
    works, calls = getattr(place, name), []

    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(stage)
        if len(calls) == 25:
            raise RuntimeError(f"a bug in {stage}")
        return works(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        started = time.monotonic()
        with pytest.raises(serve_batch.JobError, match=rf"a bug in {stage}; finished shards are"):
            run()
        assert time.monotonic() - started < 10
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not [name for name in names if ".tmp." in name]
    assert "_SUCCESS" not in names
    run()
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
