"""The exit codes of a command line, from the outside."""

import os
import signal
import subprocess
import sys
import time

import pytest

SLEEPER = """
import sys, time
from core import door

def main():
    print("ready", flush=True)
    {body}

door.run(main)
"""


def start(body: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(30)",
        # JAX's garbage-collection callback: Python drops what is raised there.
        "import gc; _xla_gc_callback = lambda *_: time.sleep(0.5); "
        "f = type(_xla_gc_callback)(_xla_gc_callback.__code__.replace(co_name='_xla_gc_callback'), globals()); "
        "gc.callbacks.append(f); gc.collect(); time.sleep(30)",
        # What an interrupted import looks like.
        "exec('try:\\n time.sleep(30)\\nexcept KeyboardInterrupt as e:\\n raise ImportError(0) from e')",
    ],
    ids=["anywhere", "in the garbage collection", "in an import"],
)
def test_an_interrupt_is_one_line_and_130(body):
    process = start(body)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (
            "from core import ConfigError; raise ConfigError('found 1,\\n expected 2')",
            1,
            "found 1, expected 2",
        ),
        ("open('/nowhere/at/all')", 1, "[Errno 2] No such file or directory: '/nowhere/at/all'"),
        ("raise door.Usage('give --model')", 2, "give --model; --help lists the flags"),
    ],
)
def test_a_failure_is_one_line_and_a_code(body, code, line):
    process = start(body)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (code, f"error: {line}\n")


def test_a_bug_is_a_traceback():
    process = start("1 / 0")
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "ZeroDivisionError" in stderr


def test_a_path_of_any_bytes_is_printed_as_it_is():
    done = subprocess.run(
        [sys.executable, "-c", SLEEPER.format(body=r"print('a\udcff')")],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ready\na\xff\n", b"")


def test_a_reader_that_has_seen_enough_is_no_failure():
    process = start("[print('x' * 1000) for _ in range(1000)]")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(timeout=20), process.stderr.read()) == (0, "")
    process.stderr.close()
