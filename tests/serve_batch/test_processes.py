"""Several worker processes on one machine: the same bytes, and whoever dies, nothing is lost or left behind."""

import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import serve_batch
from batch_jobs import run_here, wait_for
from serve_batch import devices, processes
from serve_batch.errors import JobError, UsageError

FLAGS = ["--max_new_tokens=6", "--temperature=0.9", "--top_k=40", "--seed=3", "--slots=4"]


@pytest.fixture
def command(model: Path, tmp_path: Path) -> list[str]:
    folders = [f"--model={model}", f"--input={tmp_path}/input/*", f"--output={tmp_path}/out"]
    return [sys.executable, "-m", "serve_batch", *folders, *FLAGS]


@pytest.fixture
def write(write_jsonl: Callable[..., Path]) -> Callable[[int], Path]:
    return lambda count: write_jsonl(
        b"bad" if i % 50 == 7 else {"prompt": f"Prompt {i * 7919 % 1000}"} for i in range(count)
    )


def workers_of(launcher: int) -> list[int]:
    """Returns the process ids of a launcher's workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == launcher and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_two_workers_write_what_one_writes(model, write, join_parts, tmp_path):
    write(100)
    two = run_here(model, tmp_path, "two", workers=2, shard_size=8)
    run_here(model, tmp_path, "one", shard_size=30)
    assert join_parts(tmp_path / "two") == join_parts(tmp_path / "one")
    assert (two["rows"], two["errors"], two["shards_done"]) == (100, 2, 13)
    assert workers_of(os.getpid()) == []


@pytest.mark.slow
def test_a_worker_that_is_killed_is_done_without(command, model, write, join_parts, tmp_path):
    write(600)
    out = tmp_path / "out"
    with subprocess.Popen([*command, "--workers=2", "--shard_size=8"], stderr=-1) as job:
        wait_for(lambda: len(list(out.glob("_receipts/*.json"))) >= 5)
        first, second = workers_of(job.pid)
        os.kill(first, signal.SIGKILL)
        _, said = job.communicate(timeout=100)
    assert job.returncode == 0, said.decode()
    warning, summary = said.decode().splitlines()
    assert "a worker process was killed by SIGKILL; 1 go on without it" in warning
    assert "75 of 75 shards" in summary
    assert not is_running(second)
    assert not list(out.rglob("*.tmp.*"))
    run_here(model, tmp_path, "one")
    assert join_parts(out) == join_parts(tmp_path / "one")


@pytest.mark.slow
def test_when_every_worker_is_killed_the_job_ends_and_can_go_on(
    command, model, write, join_parts, tmp_path
):
    write(600)
    out = tmp_path / "out"
    with subprocess.Popen([*command, "--workers=2", "--shard_size=8"], stderr=-1) as job:
        wait_for(lambda: len(list(out.glob("_receipts/*.json"))) >= 5)
        for worker in workers_of(job.pid):
            os.kill(worker, signal.SIGKILL)
        killed = time.monotonic()
        _, said = job.communicate(timeout=100)
    assert time.monotonic() - killed < 10
    assert job.returncode == 1
    told = said.decode().splitlines()[-1]
    assert "the last of the worker processes was killed by SIGKILL; finished shards are" in told
    assert not list(out.rglob("*.tmp.*"))
    again = run_here(model, tmp_path, "out")
    assert 0 < again["shards_done"] <= 70
    run_here(model, tmp_path, "one")
    assert join_parts(out) == join_parts(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_launcher(command, write, tmp_path, how):
    write(600)
    out = tmp_path / "out"
    with subprocess.Popen([*command, "--workers=2", "--shard_size=8"], stderr=-1) as job:
        wait_for(lambda: list(out.glob("_receipts/*.json")))
        crew = workers_of(job.pid)
        job.send_signal(how)
        _, said = job.communicate(timeout=30)
    assert len(crew) == 2
    wait_for(lambda: not any(map(is_running, crew)), limit_s=10)
    if how != signal.SIGKILL:
        assert (said.decode(), job.returncode) == ("error: interrupted\n", 128 + how)
        assert not (out / "_lock").exists()


@pytest.mark.slow
def test_what_a_worker_cannot_do_ends_the_job_with_the_reason(model, write, tmp_path):
    write(40)
    run_here(model, tmp_path, "out", shard_size=8)
    for receipt in (tmp_path / "out" / "_receipts").iterdir():
        receipt.unlink()
    path = tmp_path / "out" / "_plan.json"
    plan = json.loads(path.read_bytes())
    plan["shards"][3][2] += 1
    plan["shards"][4][1] += 1
    path.write_text(json.dumps(plan))
    with pytest.raises(JobError, match=r"^shard 3 failed: .* with 9 rows.*again with --overwrite$"):
        run_here(model, tmp_path, "out", workers=2)
    assert workers_of(os.getpid()) == []
    assert not list((tmp_path / "out").rglob("*.tmp.*"))


def test_a_shard_that_costs_a_second_worker_is_held_to_be_the_cause():
    """A worker is a process, here one that is given no job that it could do, and has shards to lose."""
    todo, deaths = collections.deque([9]), collections.Counter()
    for left in (2, 1):
        worker: Any = processes._Worker(cast(Any, "no job"))
        worker.shards = [4, 5]
        if left == 2:
            processes._give_back(worker, todo, deaths, left=left)
            assert list(todo) == [4, 5, 9]
        else:
            with pytest.raises(JobError, match="shard 4 or 5 may be the cause"):
                processes._give_back(worker, todo, deaths, left=left)


def test_a_worker_that_says_nothing_for_long_is_dead():
    """Not one that goes on to say that it lives, nor one whose launcher was stopped for as long."""
    worker: Any = processes._Worker(cast(Any, "no job"))
    try:
        for _ in range(processes._BEATS):
            worker.miss(processes._SILENCE_S * 100)
        worker.hear()  # its first beat
        os.kill(worker._process.pid, signal.SIGSTOP)
        for _ in range(processes._BEATS):
            worker.miss(processes._SILENCE_S)
        with pytest.raises(TimeoutError):
            worker.miss(1)
    finally:
        how = worker.end()
    assert how == "was killed, as nothing was heard of it for 600 s"


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_done_without(
    model, write, join_parts, tmp_path, monkeypatch, caplog
):
    write(600)
    monkeypatch.setattr(processes, "_SILENCE_S", 10.0)
    crew: list[int] = []

    def stop() -> None:
        wait_for(lambda: len(list((tmp_path / "out" / "_receipts").glob("*"))) >= 5)
        crew.extend(workers_of(os.getpid()))
        os.kill(crew[0], signal.SIGSTOP)

    stopping = threading.Thread(target=stop)
    stopping.start()
    run_here(model, tmp_path, "out", workers=2, shard_size=8)
    stopping.join()
    assert "nothing was heard of it for 10 s; 1 go on without it" in caplog.text
    assert not any(map(is_running, crew))
    run_here(model, tmp_path, "one")
    assert join_parts(tmp_path / "out") == join_parts(tmp_path / "one")


def test_more_workers_than_accelerators_are_refused(model, write, tmp_path, monkeypatch):
    write(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UsageError, match="workers is 3; this machine has accelerators for 2"):
        run_here(model, tmp_path, "out", workers=3)


def test_the_accelerators_are_those_that_are_seen(tmp_path, monkeypatch):
    for name in ("nvidia10", "nvidia2", "nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.visible(tmp_path) == ["0", "2", "10"]
    for given, seen in {"": [], "-1": [], "3,MIG-7": ["3", "MIG-7"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert devices.visible(tmp_path) == seen


def test_kernels_are_pinned_where_there_are_accelerators_and_nobody_says_otherwise(monkeypatch):
    ours = "--xla_gpu_autotune_level"
    for there, given, flags in (
        ("0", "", f"{ours}=0"),
        ("0", "--xla_a=1", f"--xla_a=1 {ours}=0"),
        ("0", f"{ours}=4", f"{ours}=4"),
        ("", "--xla_a=1", "--xla_a=1"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there)
        monkeypatch.setenv("XLA_FLAGS", given)
        devices.pin()
        assert os.environ["XLA_FLAGS"] == flags


def test_jobs_and_pipelines_lease_and_pin_before_they_load_a_model(
    model, run, write_jsonl, monkeypatch, tmp_path
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv(devices.ONE, "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_jsonl([{"prompt": "a"}])
    for load in (run, serve_batch.JaxModelHandler(model, slots=4).load_model):
        monkeypatch.setattr(devices, "_held", None)
        monkeypatch.setenv("XLA_FLAGS", "")
        load()
        assert "autotune" in os.environ["XLA_FLAGS"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
        assert devices._held is not None
        os.close(devices._held)


LEASE = """
import os, sys
from serve_batch import devices
try:
    devices.lease()
    devices.lease()
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
except Exception as error:
    print(error, flush=True)
sys.stdin.read()
"""


def test_each_process_leases_another_accelerator_until_it_dies(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "4,7"}
    started: list[subprocess.Popen[str]] = []

    def lease(one: str = "1") -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", LEASE],
            env=environment | {devices.ONE: one},
            stdin=-1,
            stdout=-1,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    try:
        assert [lease(), lease()] == ["4", "7"]
        assert lease().startswith("all 2 accelerators of this machine are held by other workers")
        assert lease("0") == "4,7"
        started[0].kill()
        started[0].wait(10)
        assert lease() == "4"
    finally:
        for process in started:
            process.kill()
            process.communicate()
