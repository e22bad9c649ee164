"""The command line as its users meet it."""

import json
import os
import subprocess
import sys

import pytest

from bench.peers.contestants import PEERS_PYTHON


def bench(*arguments: str, cwd, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "bench", *arguments],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=quick"], "should be one of <ci|full|gpu>"),
        (["--only=decode-9B"], "matches none of forward-3.4M-t128, "),
        (["--only=("], "is no regular expression"),
        (["--repeats=3"], "Unknown command line flag 'repeats'"),
        (["full"], "unexpected argument 'full'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(tmp_path, arguments, message):
    done = bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_is_quick_to_import_and_exits_0(tmp_path):
    done = bench("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--suite" in done.stdout
    code = "import bench.__main__, sys; print([m for m in ('jax', 'numpy', 'matplotlib') if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout == "[]\n"


def test_an_output_that_is_a_file_is_one_line_and_exit_1(tmp_path):
    (tmp_path / "taken").write_text("mine")
    done = bench("--out=taken", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "taken" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_gpu_suite_without_a_gpu_is_one_line_and_exit_1(tmp_path):
    done = bench("--suite=gpu", cwd=tmp_path, JAX_PLATFORMS="cpu", **{PEERS_PYTHON: "absent"})
    assert done.returncode == 1
    assert done.stderr == (
        "error: --suite=gpu: JAX sees no GPU here, only 'cpu'; install JAX's CUDA plug-in or take --suite=full\n"
    )


@pytest.mark.slow
def test_without_torch_our_figures_stand_and_the_peers_are_reported_absent(tmp_path):
    done = bench(
        "--only=forward-3.4M-t128$", "--out=results", cwd=tmp_path, **{PEERS_PYTHON: "absent"}
    )
    assert done.returncode == 0, done.stderr
    assert (
        "torch eager not run: FLAXMILL_PEERS_PYTHON=absent is not a working Python" in done.stdout
    )
    assert "gate: forward-3.4M-t128 not judged: torch eager: not run" in done.stdout
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert [row["status"] for row in results["rows"]] == ["measured", "not run"]
    assert str(tmp_path) not in (tmp_path / "results/results.md").read_text()
