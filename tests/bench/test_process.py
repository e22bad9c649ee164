import os
import subprocess
import sys
import time

import psutil
import pytest

from bench import machine
from bench.peers.process import Worker, WorkerError
from bench_contestants import SLEEPER, workload

PREPARE = {"workload": workload("forward").to_dict(), "weights": ""}


@pytest.fixture
def worker(tmp_path):
    started = []

    def start(code: str, *arguments: str) -> Worker:
        command = (sys.executable, "-P", "-c", code, *arguments)
        started.append(Worker(command, env=os.environ, cwd=tmp_path, log=tmp_path / "log"))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_answers_arrive_whatever_libraries_and_children_print(worker):
    sleeper = worker(SLEEPER, "0", '{"tokens": [7]}')
    assert sleeper.ask("hello", timeout_s=30)["versions"] == {"sleeper": "1"}
    assert sleeper.ask("prepare", timeout_s=30, **PREPARE)["first_call_s"] >= 0
    assert sleeper.ask("outputs", timeout_s=30) == {"tokens": [7]}


def test_a_run_times_every_repeat_and_not_the_warm_call(worker):
    sleeper = worker(SLEEPER, "0.02", "{}")
    sleeper.ask("prepare", timeout_s=30, **PREPARE)
    seconds = sleeper.ask("run", timeout_s=30, repeats=3, warm=True)["seconds"]
    assert len(seconds) == 3
    assert min(seconds) >= 0.02


def test_a_request_that_fails_gives_its_reason_and_the_worker_lives_on(worker):
    sleeper = worker(SLEEPER, "0", "{}")
    with pytest.raises(WorkerError, match="nothing is prepared") as caught:
        sleeper.ask("run", timeout_s=30, repeats=1, warm=False)
    assert not caught.value.lost
    assert sleeper.ask("hello", timeout_s=30)["threads"] == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('no libfoo.so here')", "^exited with 1: no libfoo.so here$"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "^killed by SIGSEGV"),
        ("input(); print('Downloading 3%')", r"^wrote 'Downloading 3%' to stdout"),
        ("input(); print('[1, 2]')", "to stdout"),
        ("import os, time; input(); os.close(1); time.sleep(60)", "closed its stdout"),
    ],
)
def test_a_worker_that_dies_or_babbles_is_lost_with_its_reason(worker, monkeypatch, code, reason):
    monkeypatch.setattr("bench.peers.process.DEATH_S", 0.5)
    with pytest.raises(WorkerError, match=reason) as caught:
        worker(code).ask("hello", timeout_s=30)
    assert caught.value.lost


def test_a_worker_that_hangs_is_stopped_with_its_children(worker, monkeypatch):
    hanging = worker(
        "import subprocess, sys, time; input()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"child\": %d}' % child.pid, flush=True); input(); time.sleep(60)"
    )
    child = psutil.Process(hanging.ask("hello", timeout_s=30)["child"])
    monkeypatch.setattr("bench.peers.process.DEATH_S", 0.5)
    with pytest.raises(WorkerError, match="no answer to 'run'") as caught:
        hanging.ask("run", timeout_s=0.2)
    assert caught.value.lost
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its worker"
        time.sleep(0.01)


def test_a_program_that_does_not_exist_is_a_reason_too(tmp_path):
    with pytest.raises(WorkerError, match="cannot be started"):
        Worker(["/no/such/python"], env={}, cwd=tmp_path, log=tmp_path / "log")


BUSY = "import time\nwhile time.process_time() < 0.4: pass"


def test_what_our_own_processes_use_is_ours():
    before_s = machine.ours_s()
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert machine.ours_s() - before_s >= 0.9 * 0.4  # the kernel counts in hundredths


def test_what_a_process_of_others_uses_is_the_neighbours(tmp_path):
    done = tmp_path / "done"
    code = f"{BUSY}\nopen({str(done)!r}, 'w')"
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}])"
    neighbours, start = machine.Neighbours(), time.perf_counter()
    ours_before_s = machine.ours_s()
    # Its parent ends at once, and then it is no descendant of ours.
    subprocess.run([sys.executable, "-c", orphan], check=True)
    while not done.exists():
        time.sleep(0.02)
    elapsed = time.perf_counter() - start
    assert neighbours.share() >= 0.9 * 0.4 / elapsed / (psutil.cpu_count() or 1)
    assert machine.ours_s() - ours_before_s < 0.4
