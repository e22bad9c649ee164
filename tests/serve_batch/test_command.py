"""The command line, and what happens to a job from outside: in processes of their own."""

import fcntl
import os
import pty
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve_batch
from batch_jobs import SAMPLED, run_here, wait_for
from serve_batch import runners
from serve_batch.output import OutputFolder
from serve_batch.shards import Job

FLAGS = ["--max_new_tokens=6", "--temperature=0.9", "--top_k=40", "--seed=3", "--slots=4"]


@pytest.fixture
def command(model, tmp_path) -> list[str]:
    folders = [f"--model={model}", f"--input={tmp_path}/input/*", f"--output={tmp_path}/out"]
    return [sys.executable, "-m", "serve_batch", *folders, *FLAGS]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A home that is empty; compiled kernels stay where they are."""
    home = tmp_path / "home"
    home.mkdir()
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The address of a proxy that takes every connection and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def call(command: list[str], **arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **arguments)


def prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Prompt {i * 7919 % 1000}"} for i in range(count)]


def test_help_waits_for_neither_jax_nor_beam():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['serve_batch', '--help']\n"
        "try: runpy.run_module('serve_batch', run_name='__main__')\n"
        "except SystemExit as end: print(end.code)\n"
        "print('heavy:', sorted({'jax', 'apache_beam', 'numpy', 'tokenizers'} & sys.modules.keys()))"
    )
    shown = call([sys.executable, "-c", code])
    assert "--max_error_rate" in shown.stdout
    assert shown.stdout.endswith("0\nheavy: []\n")


def test_a_job_is_quiet_offline_and_stays_in_its_output_folder(
    command, environment, black_hole, write_jsonl, read_parts, tmp_path
):
    write_jsonl([*prompts(9), b"bad"])
    (tmp_path / "cwd").mkdir(mode=0o555)
    done = call(command, env=environment | behind(black_hole), cwd=tmp_path / "cwd")
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path}/out: 10 rows, 1 errors (bad_json 1); 1 of 1 shards in ")
    assert len(read_parts(tmp_path / "out")) == 10
    assert list((tmp_path / "home").iterdir()) == list((tmp_path / "cwd").iterdir()) == []


def behind(proxy: str) -> dict[str, str]:
    return dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], proxy)


@pytest.mark.slow
def test_a_start_behind_a_dead_network_takes_less_than_three_seconds(
    command, environment, black_hole, write_jsonl, tmp_path
):
    """Of the processor, for this machine may have others to serve; with Beam and the model, without compiling."""
    write_jsonl([b"bad"])
    taken = []
    for attempt in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        arguments = [*command, f"--output={tmp_path}/out{attempt}"]
        done = call(arguments, env=environment | behind(black_hole))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 3


def test_a_terminal_sees_the_rows_go_by(command, environment, write_jsonl, tmp_path):
    write_jsonl([*prompts(9), b"bad"])
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # rows, columns
    with open(ours, "rb") as terminal:  # noqa: PTH123 (a descriptor)
        subprocess.run(command, env=environment, stderr=theirs, timeout=100, check=True)
        os.close(theirs)
        shown = terminal.read1(10_000).decode()
    assert "10/10" in shown
    assert "tokens/s, 1 errors" in shown
    assert not (tmp_path / "out" / "_progress").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--input=nothing*.jsonl"], 1, "no file matches "),
        (["--max_error_rate=0"], 1, "1 of 2 rows are errors (50.0%)"),
        (["--input="], 2, "give --input=GLOB and --output=DIR"),
        (["--output="], 2, "give --input=GLOB and --output=DIR"),
        (["--top_p=2"], 2, "--top_p is 2.0; expected float, above 0"),
        (["--", "--nonsense=1"], 2, "has no option --nonsense"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    command, environment, write_jsonl, arguments, code, told, tmp_path
):
    write_jsonl([*prompts(1), b"bad"])
    done = call([*command, *arguments], env=environment)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_and_loses_nothing(
    command, environment, model, write_jsonl, join_parts, tmp_path
):
    write_jsonl([*prompts(400), b"bad", *prompts(399)])
    out = tmp_path / "out"
    with subprocess.Popen([*command, "--shard_size=8"], env=environment) as job:
        wait_for(lambda: len(list(out.glob("_receipts/*.json"))) >= 5, job)
        with pytest.raises(serve_batch.JobError, match=rf"another job \(process {job.pid} on "):
            run_here(model, tmp_path, "out")
        os.kill(job.pid, signal.SIGKILL)
    done = {path.name for path in out.glob("_receipts/[0-9]*.json")}
    parts = {path: path.stat().st_mtime_ns for path in out.glob("part-*.jsonl")}
    assert 5 <= len(done) < 100
    assert not (out / "_SUCCESS").exists()

    manifest = run_here(model, tmp_path, "out")
    assert manifest["shards_done"] == 100 - len(done)
    kept = [path for path, written in parts.items() if path.stat().st_mtime_ns == written]
    assert len(kept) >= len(done)
    run_here(model, tmp_path, "clean", shard_size=8)
    assert join_parts(out) == join_parts(tmp_path / "clean")
    assert (out / "manifest.json").read_bytes() == (
        tmp_path / "clean" / "manifest.json"
    ).read_bytes()
    assert not list(out.rglob("*.tmp.*"))
    assert (out / "_SUCCESS").exists()


def test_an_interrupted_job_ends_at_once_with_its_lock_released(
    command, environment, model, write_jsonl, tmp_path
):
    write_jsonl(prompts(800))
    out = tmp_path / "out"
    with subprocess.Popen([*command, "--shard_size=8"], env=environment, stderr=-1) as job:
        wait_for(lambda: list(out.glob("_receipts/*.json")), job)
        started = time.monotonic()
        job.send_signal(signal.SIGINT)
        assert job.stderr is not None
        assert job.stderr.read().decode() == "error: interrupted\n"
    assert job.returncode == 130
    assert time.monotonic() - started < 30
    assert not (out / "_lock").exists()


def test_the_portable_protocol_carries_the_job(model, write_jsonl, join_parts, tmp_path):
    """Beam's job service and its gRPC workers: the closest thing in the box to a cluster's runner."""
    write_jsonl(prompts(30))
    run_here(model, tmp_path, "ours")
    folder = OutputFolder(tmp_path / "theirs")
    folder.path.mkdir()
    (folder.path / "_plan.json").write_bytes((tmp_path / "ours" / "_plan.json").read_bytes())
    job = Job(model=model, output=folder, sampling=SAMPLED, slots=4, reports_progress=False)
    options = runners.pipeline_options(["--job_endpoint=embed", "--environment_type=LOOPBACK"])
    with runners.quiet():
        runners.run(job, "PortableRunner", options)
    assert join_parts(folder.path) == join_parts(tmp_path / "ours")
