"""A write that is interrupted and gone on with: the same bytes, and no more work than is left."""

import contextlib
import errno
import fcntl
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from core import axes, checkpoint, workers
from core.checkpoint import CheckpointError, TensorSpec

CONFIG = tiny.config()
SPECS = [
    TensorSpec(name, axes.shape(word, CONFIG.axes), "float32")
    for name, word in CONFIG.tensors().items()
]
LIMIT = 10_000  # several shards


def values(spec: TensorSpec) -> np.ndarray:
    seed = sum(spec.name.encode())
    return np.random.default_rng(seed).standard_normal(spec.shape, np.float32)


class Source:
    """Gives the tensors, notes which were asked for, and does `then` when tensor number `at` is asked for."""

    def __init__(self, at: int | None = None, then: Callable[[], None] = lambda: None):
        self.at, self.then = at, then
        self.asked: list[str] = []

    def __call__(self, spec: TensorSpec) -> Iterator[np.ndarray]:
        self.asked.append(spec.name)
        if len(self.asked) == self.at:
            self.then()
        yield from checkpoint.parts(values(spec), 1000)


def interrupt() -> None:
    raise KeyboardInterrupt


def write(path: Path, read: Source | None = None, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "specs": SPECS,
        "read": read or Source(),
        "files": {"a.txt": b"a"},
        "source": {"from": "here"},
        "shard_bytes": LIMIT,
        "identity": ["source", 1],
    }
    checkpoint.write(path, **(arguments | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupted(path: Path, at: int, **changes: Any) -> Path:
    """Leaves what a write leaves that is interrupted at its tensor number `at`, and returns where."""
    with pytest.raises(
        KeyboardInterrupt, match="the same command with --resume goes on from there"
    ):
        write(path, Source(at, interrupt), **changes)
    assert not path.exists()
    (place,) = path.parent.glob(f"{path.name}.partial.*")
    return place


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, bytes]:
    write(tmp_path / "clean")
    return contents(tmp_path / "clean")


@pytest.mark.parametrize("at", [1, 2, 10, len(SPECS)])
def test_an_interrupted_write_goes_on_where_it_was(
    tmp_path: Path, clean: dict[str, bytes], at: int
):
    out, source, notes, told = tmp_path / "out", Source(), [], []
    interrupted(out, at)
    write(out, source, resume=True, on_note=notes.append, on_bytes=told.append)
    assert contents(out) == clean
    assert len(source.asked) == len(SPECS) - (at - 1)
    assert notes == [
        f"resuming: {at - 1} of {len(SPECS)} tensors were written, and are checked first"
        if at > 1
        else "there is nothing to resume; starting from the beginning"
    ]
    assert sum(told) == 4 * CONFIG.parameter_count
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]


def test_interrupted_again_and_again_it_still_ends_in_the_same_bytes(
    tmp_path: Path, clean: dict[str, bytes]
):
    out, read = tmp_path / "out", 0
    while not out.exists():
        source = Source(4, interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            write(out, source, resume=True)
        read += min(len(source.asked), 3)
    assert contents(out) == clean
    assert read == len(SPECS)


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_byte(
    tmp_path: Path, clean: dict[str, bytes], threads: int
):
    write(tmp_path / "out", threads=threads)
    assert contents(tmp_path / "out") == clean
    interrupted(tmp_path / "again", 10, threads=threads)
    write(tmp_path / "again", resume=True, threads=threads)
    assert contents(tmp_path / "again") == clean


def journal_of(place: Path) -> Path:
    return place / "journal.jsonl"


@pytest.mark.parametrize(
    ("tail", "lost"),
    [
        (lambda lines: lines[-1][:-9], 1),
        (lambda lines: lines[-1][:-1], 1),
        (lambda lines: lines[-1].replace(b'"name"', b'"n\xffme"'), 1),
        (lambda lines: b"[" * 100_000 + b"\n", 1),
        (lambda lines: b"[]\n3\nnull\n\n" + lines[-1], 0),
        (lambda lines: lines[-1].replace(b'"offset": ', b'"offset": 1'), 1),
        (lambda lines: lines[-1].replace(b'"sha256": "', b'"sha256": "x'), 1),
        (lambda lines: lines[-1].replace(b'"sha256"', b'"sha512"'), 1),
        (lambda lines: lines[-1] + b'{"name": "h.0"}\n', 0),
    ],
    ids=["torn", "no end", "damaged", "nested", "strange", "offset", "hash", "no hash", "unknown"],
)
def test_lines_of_the_journal_that_are_damaged_are_as_if_not_there(
    tmp_path: Path, clean: dict[str, bytes], tail: Any, lost: int
):
    out, source = tmp_path / "out", Source()
    journal = journal_of(interrupted(out, 10))
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    journal.write_bytes(b"".join(lines[:-1]) + tail(lines))
    interrupted(out, 2, resume=True)  # appends to the damaged journal
    write(out, source, resume=True)
    assert contents(out) == clean
    assert len(source.asked) == len(SPECS) - 9 + lost - 1


@pytest.mark.parametrize("damage", ["a bit", "the end", "the file", "all zeros", "longer"])
def test_tensors_that_are_not_as_the_journal_says_are_written_again(
    tmp_path: Path, clean: dict[str, bytes], damage: str
):
    out, source = tmp_path / "out", Source()
    interrupted(out, 10)
    (place,) = tmp_path.glob("out.partial.*")
    shard = min(place.rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    first = len(content) - 1  # the last tensor of the first shard, which was written
    match damage:
        case "a bit":
            content[first] ^= 1
        case "the end":
            del content[-100:]
        case "all zeros":
            content[:] = bytes(len(content))
        case "longer":
            content += b"more"
    shard.write_bytes(content)
    if damage == "the file":
        shard.unlink()
    write(out, source, resume=True)
    assert contents(out) == clean
    again = len(source.asked) - (len(SPECS) - 9)
    assert again == 0 if damage == "longer" else again > 0


@pytest.mark.parametrize(
    "change",
    [
        {"identity": ["source", 2]},
        {"files": {"a.txt": b"b"}},
        {"shard_bytes": 2 * LIMIT},
        {"config": tiny.config(layer_norm_epsilon=0.1)},
        {"specs": [*SPECS[:-1], TensorSpec("ln_f.bias", (24,), "float32", layout="D -> D")]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_another_write_has_left_is_not_taken_and_not_touched(tmp_path: Path, change: Any):
    out, source, notes = tmp_path / "out", Source(), []
    left = interrupted(out, 10)
    before = contents(left)
    write(out, source, resume=True, on_note=notes.append, **change)
    assert len(source.asked) == len(SPECS)
    assert contents(left) == before
    assert notes == [
        f"there is nothing to resume ({left.name} is of another source, plan or version); "
        "starting from the beginning"
    ]


def test_without_resume_a_dead_write_s_place_is_begun_anew(tmp_path: Path, clean: dict[str, bytes]):
    out, source = tmp_path / "out", Source()
    place = interrupted(out, 10)
    before = place.stat().st_ino
    assert interrupted(out, 3) == place
    assert place.stat().st_ino == before
    assert len(journal_of(place).read_bytes().splitlines()) == 2
    write(out, source)
    assert len(source.asked) == len(SPECS)
    assert contents(out) == clean
    assert not place.exists()


def test_what_was_put_into_the_leftover_is_not_in_the_model(
    tmp_path: Path, clean: dict[str, bytes]
):
    place = interrupted(tmp_path / "out", 10)
    (place / "folder" / "stray").mkdir()
    (place / "folder" / "stray" / "file").write_text("x")
    (place / "folder" / "manifest.json").write_text("{}")
    write(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == clean


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_writer_of_the_same_is_refused_while_the_first_lives(
    tmp_path: Path, clean: dict[str, bytes], resume: bool
):
    out, refused = tmp_path / "out", []

    def again() -> None:
        with pytest.raises(CheckpointError) as caught:
            write(out, resume=resume)
        refused.append(str(caught.value))

    write(out, Source(10, again))
    (message,) = refused
    assert "another process is writing just this there; wait until it ends, or end it" in message
    assert contents(out) == clean


def test_a_lock_is_of_the_process_that_lives(tmp_path: Path, clean: dict[str, bytes]):
    out = tmp_path / "out"
    journal = journal_of(interrupted(out, 10))
    program = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, journal], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        before = contents(tmp_path)
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="another process is writing just this"):
                write(out, resume=resume)
        assert contents(tmp_path) == before
        other.kill()
    write(out, resume=True)
    assert contents(out) == clean


def test_another_write_of_the_same_folder_may_live(tmp_path: Path, clean: dict[str, bytes]):
    out, source = tmp_path / "out", Source()
    other = Source(10, lambda: write(out, source, identity=["another"]))
    with pytest.raises(FileExistsError, match="something else was written there meanwhile"):
        write(out, other)
    assert contents(out) == clean


@pytest.mark.parametrize("error", [OSError("the source is gone"), ValueError("a bug")], ids=repr)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_leaves_nothing(tmp_path: Path, error: Exception, threads: int):
    def fail() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        write(tmp_path / "out", Source(10, fail), threads=threads)
    assert list(tmp_path.iterdir()) == []


def test_an_error_stops_the_other_threads_within_a_part(tmp_path: Path):
    endless = itertools.repeat(np.zeros(6, np.float32))
    given = itertools.count()

    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        if spec.name == "ln_f.scale":
            raise OSError("the source is gone")
        for part, _ in zip(endless, given, strict=False):
            yield part

    big = tiny.config(vocab_size=10_000_000)
    specs = [
        TensorSpec(name, axes.shape(word, big.axes), "float32")
        for name, word in big.tensors().items()
        if name in ("wte.embedding", "ln_f.scale")
    ]
    from core import shards

    with pytest.raises(OSError, match="the source is gone"):
        shards.write(tmp_path, [shards.lay_out("a", specs)], read, threads=2)
    assert next(given) < 1_000_000  # of ten million


def test_a_place_half_made_is_begun_anew(tmp_path: Path, clean: dict[str, bytes]):
    """A kill between two steps of the beginning, or of the end."""
    for half in ("no folder", "no journal", "empty journal"):
        out, source, notes = tmp_path / half, Source(), []
        place = interrupted(out, 10)
        match half:
            case "no folder":
                shutil.rmtree(place / "folder")
            case "no journal":
                journal_of(place).unlink()
            case "empty journal":
                journal_of(place).write_text("")
        write(out, source, resume=True, on_note=notes.append)
        assert contents(out) == clean
        assert len(source.asked) == len(SPECS)
        assert notes == ["there is nothing to resume; starting from the beginning"]


def test_without_locks_nothing_is_resumed_and_all_is_written(
    tmp_path: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    notes: list[str] = []
    write(tmp_path / "out", resume=True, on_note=notes.append)
    assert contents(tmp_path / "out") == clean
    assert notes == ["there is nothing to resume; starting from the beginning"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]
    with pytest.raises(KeyboardInterrupt) as caught:
        write(tmp_path / "other", Source(10, interrupt))
    assert not caught.value.args
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]


def test_what_is_there_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    interrupted(out, 10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(CheckpointError, match="are needed"):
        write(out, identity="another")
    write(out, resume=True)


def test_overwriting_is_resumed_too_and_keeps_the_old_until_the_end(
    tmp_path: Path, clean: dict[str, bytes]
):
    out = tmp_path / "out"
    write(out, files={"a.txt": b"old"})
    before = contents(out)
    with pytest.raises(KeyboardInterrupt):
        write(out, Source(10, interrupt), overwrite=True)
    assert contents(out) == before
    write(out, overwrite=True, resume=True)
    assert contents(out) == clean


class TestWorkers:
    @pytest.mark.parametrize("threads", [1, 4])
    def test_results_are_in_the_order_of_the_items(self, threads: int):
        assert workers.each(lambda item, stop: item * 2, range(50), threads=threads) == [
            *range(0, 100, 2)
        ]

    @pytest.mark.parametrize("threads", [1, 4])
    def test_the_first_error_is_raised_and_the_rest_dropped(self, threads: int):
        begun: list[int] = []

        def work(item: int, stop: Any) -> None:
            begun.append(item)
            if item == 3:
                raise KeyError("three")
            stop.wait(0.05)

        with pytest.raises(KeyError, match="three"):
            workers.each(work, range(20_000), threads=threads)
        assert len(begun) < 20

    def test_what_runs_beside_is_stopped_with_the_block(self):
        stopped: list[bool] = []

        def work(stop: Any) -> None:
            stopped.append(stop.wait(10))

        with pytest.raises(KeyError), workers.beside(work):
            raise KeyError
        assert stopped == [True]
        with workers.beside(lambda stop: 7) as result:
            assert result() == 7
