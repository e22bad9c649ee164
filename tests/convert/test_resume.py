"""Conversions that are killed, interrupted, or refused by the disk."""

import contextlib
import fcntl
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
import hf_checkpoints as hf
from convert import ConvertError, importer

CONFIG = hf.CONFIG | {
    "vocab_size": 5000,
    "n_positions": 512,
    "n_ctx": 512,
    "n_embd": 256,
    "n_inner": 1024,
    "n_head": 4,
    "n_layer": 24,
}
TENSORS = len(hf.shapes(CONFIG))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB in 292 tensors."""
    weights = hf.prefixed(hf.tensors(config=CONFIG))
    return hf.write(tmp_path_factory.mktemp("large") / "source", weights, config=CONFIG)


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = convert.convert(source, out=tmp_path_factory.mktemp("clean") / "out")
    convert.verify(out, against=source)
    return hf.digests(out)


def leftovers(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.partial.*"))


def journal(out: Path) -> Path | None:
    return next(out.parent.glob(f"{out.name}.partial.*/journal.jsonl"), None)


def wait_for_journal(out: Path, process: subprocess.Popen[Any], nbytes: int) -> None:
    """Returns when the journal of the conversion is so long, or the process has ended."""
    while process.poll() is None:
        path = journal(out)
        with contextlib.suppress(FileNotFoundError):
            if path is not None and path.stat().st_size >= nbytes:
                return
        time.sleep(0.0005)


def command(source: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "convert", f"--source={source}", f"--out={out}", *flags]


# Forks a conversion for each line, so that the imports are paid once, and prints its process id.
FORKING = """
import os, sys
from convert import importer
from core import checkpoint
source, out = sys.argv[1:]
for line in sys.stdin:
    if not (child := os.fork()):
        importer.write(importer.plan_source(source), out, resume=True, quiet=True)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forks:
    """Conversions of one source, one after another, each in a process of its own that may be killed."""

    def __init__(self, server: subprocess.Popen[str]):
        self.server = server

    def kill(self, out: Path, when: float, after_s: float) -> bool:
        """Starts one and kills it when that share of the journal is written, and a moment later; tells if it was."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write("go\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        threshold = int(when * TENSORS * 190)
        while not out.exists():
            path = journal(out)
            with contextlib.suppress(FileNotFoundError):
                if path is not None and path.stat().st_size >= threshold:
                    break
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        return int(self.server.stdout.readline()) == signal.SIGKILL


@contextlib.contextmanager
def forks(source: Path, out: Path) -> Iterator[Forks]:
    with subprocess.Popen(
        [sys.executable, "-c", FORKING, source, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Forks(server)
        assert server.stdin is not None
        server.stdin.close()


@pytest.mark.slow
def test_killed_at_20_random_moments_it_goes_on_to_the_same_bytes(
    tmp_path: Path, source: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Kept are, in all, most of the tensors: kills fall all over the conversion."""
    out, rng = tmp_path / "out", random.Random(4)
    asked: list[str] = []
    parts = importer.Plan.parts

    def counting(plan: importer.Plan, spec: Any) -> Iterator[np.ndarray]:
        asked.append(spec.name)
        return parts(plan, spec)

    monkeypatch.setattr(importer.Plan, "parts", counting)
    plan, written = importer.plan_source(source), []
    with forks(source, out) as conversions:
        while len(written) < 20:
            if not conversions.kill(out, rng.random(), rng.random() * 0.005):
                assert hf.digests(out) == clean  # it was faster
                subprocess.run(["rm", "-r", out], check=True)
                continue
            assert not out.exists()
            with pytest.raises(ConvertError):
                convert.verify(out)
            asked.clear()
            importer.write(plan, out, resume=True)
            written.append(len(asked))
            assert hf.digests(out) == clean
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            subprocess.run(["rm", "-r", out], check=True)
    assert max(written) <= TENSORS
    assert sum(count < TENSORS for count in written) >= 15
    assert sum(written) < 0.8 * 20 * TENSORS, written


def interrupted(source: Path, out: Path, number: signal.Signals) -> subprocess.Popen[str]:
    """Returns a conversion that was ended by a signal while it wrote."""
    for _ in range(10):
        process = subprocess.Popen(
            command(source, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for_journal(out, process, 1)
        process.send_signal(number)
        process.wait(timeout=60)
        if not out.exists():
            return process
        process.communicate()
        subprocess.run(["rm", "-r", out], check=True)
    pytest.fail("the conversion was faster than the signal, ten times")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(
    tmp_path: Path, source: Path, clean: dict[str, str], number: signal.Signals, code: int
):
    out = tmp_path / "out"
    process = interrupted(source, out, number)
    stdout, stderr = process.communicate()
    (place,) = leftovers(out)
    assert (process.returncode, stdout) == (code, "")
    assert stderr == (
        f"error: interrupted; what is done is kept in {place}: "
        "the same command with --resume goes on from there\n"
    )

    done = subprocess.run(command(source, out, "--resume"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert done.stderr.startswith("note: resuming: ")
    assert done.stderr.endswith(f" of {TENSORS} tensors were written, and are checked first\n")
    assert hf.digests(out) == clean
    assert leftovers(out) == []


def test_a_conversion_that_lives_is_not_disturbed(
    tmp_path: Path, source: Path, clean: dict[str, str]
):
    out = tmp_path / "out"
    interrupted(source, out, signal.SIGTERM).communicate()
    path = journal(out)
    assert path is not None
    before = hf.digests(tmp_path)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in ([], ["--resume"]):
            done = subprocess.run(command(source, out, *flags), capture_output=True, text=True)
            assert "another process is writing just this there; wait" in hf.the_error(done)
        assert hf.digests(tmp_path) == before
    convert.convert(source, out=out, resume=True)
    assert hf.digests(out) == clean


def test_resume_with_nothing_to_resume_says_so_and_converts(tmp_path: Path):
    small = hf.write(tmp_path / "small", hf.tensors())
    done = subprocess.run(
        command(small, tmp_path / "out", "--resume"), capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == "note: there is nothing to resume; starting from the beginning\n"
    assert convert.verify(tmp_path / "out", against=small).tensors == len(hf.shapes())


@pytest.mark.parametrize("change", ["dtype", "source", "companion"])
def test_another_conversion_s_leftover_is_not_taken(tmp_path: Path, source: Path, change: str):
    out, notes = tmp_path / "out", []
    own = tmp_path / "source"
    own.mkdir()
    for file in source.iterdir():
        os.link(file, own / file.name)
    interrupted(own, out, signal.SIGTERM).communicate()
    (left,) = leftovers(out)
    before = hf.digests(left)
    match change:
        case "source":
            os.utime(own / "model.safetensors")
        case "companion":
            (own / "tokenizer.json").unlink()
            (own / "tokenizer.json").write_text("{}")
    dtype = "bfloat16" if change == "dtype" else "keep"
    convert.convert(own, out=out, dtype=dtype, resume=True, on_note=notes.append)
    assert notes == [
        f"there is nothing to resume ({left.name} is of another source, plan or version); "
        "starting from the beginning"
    ]
    assert hf.digests(left) == before


def test_a_source_that_changes_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = hf.write(tmp_path / "source", hf.tensors())
    plan, parts = importer.plan_source(source), importer.Plan.parts

    def touching(plan: importer.Plan, spec: Any) -> Iterator[np.ndarray]:
        os.utime(source / "model.safetensors", ns=(0, 0))
        return parts(plan, spec)

    monkeypatch.setattr(importer.Plan, "parts", touching)
    with pytest.raises(ConvertError, match="source changed while it was read; convert it again"):
        importer.write(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class TestDiskThatRefuses:
    """By the system itself: a limit, a full file system, one that is read-only, a path that cannot be."""

    def test_a_file_that_may_not_be_so_large(self, tmp_path: Path, source: Path):
        limited = ["sh", "-c", 'ulimit -f 2000; exec "$@"', "sh"]
        done = subprocess.run(
            [*limited, *command(source, tmp_path / "out")], capture_output=True, text=True
        )
        error = hf.the_error(done)
        assert "model-00001-of-00001.safetensors cannot be written: File too large" in error
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("short", [0, 60_000, 81_000_000])
    def test_a_full_disk(self, tmp_path: Path, source: Path, short: int):
        """Without room for the tensors, for the manifest, or for anything to begin with."""
        size = sum(file.stat().st_size for file in source.iterdir()) + 100_000 - short
        done = self.mounted(tmp_path, f"-t tmpfs -o size={size} none", source)
        error = hf.the_error(done, stdout="/disk\n")
        if short == 81_000_000:
            assert "GB are needed, 0.00 GB are free" in error
        else:
            assert "cannot be written: No space left on device; free some space" in error

    def test_a_disk_that_is_read_only(self, tmp_path: Path, source: Path):
        done = self.mounted(tmp_path, "-t tmpfs -o ro none", source)
        assert "Read-only file system" in hf.the_error(done, stdout="/disk\n")

    def test_a_path_below_a_file(self, tmp_path: Path, source: Path):
        (tmp_path / "file").write_text("x")
        done = subprocess.run(
            command(source, tmp_path / "file" / "out"), capture_output=True, text=True
        )
        error = hf.the_error(done)
        assert "Not a directory" in error
        assert hf.digests(tmp_path) == {"file": hf.digests(tmp_path)["file"]}

    @staticmethod
    def mounted(tmp_path: Path, options: str, source: Path) -> subprocess.CompletedProcess[str]:
        """Converts to a file system of its own, seen by this process only, and lists what is left there."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = f"mount {options} {shlex.quote(str(disk))}"
        if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        script = (
            f"{mount} && cd / && {shlex.join(command(source, disk / 'out'))}; code=$?;"
            f"find {shlex.quote(str(disk))} | sed s,.*/disk,/disk,; exit $code"
        )
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=60
        )
