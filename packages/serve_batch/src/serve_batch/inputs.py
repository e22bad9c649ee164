"""The input files: which they are, where their rows end, and the rows themselves.

    .jsonl .txt                  a row a line, found by byte offsets, so that a worker seeks
    .jsonl.gz .txt.zst ...       the same, with offsets in what they hold: a worker reads up to where it begins
    .parquet                     a row a row, found by its number

What cannot be sought stays open between two shards of a process and goes on where it stopped, so a job reads it once
and not once a shard. This module does not know what a row means.
"""

import contextlib
import glob
import io
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import numpy as np

from serve_batch import records, stores
from serve_batch.errors import JobError, Unreachable, UsageError
from serve_batch.records import RowError
from serve_batch.stores import Local, Stat, Store

PARQUET = ".parquet"
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_BYTES = records.MAX_LINE_BYTES + len(_BYTE_ORDER_MARK) + len(b"\r\n")
_IDLE = 4  # files that stay open between shards


class Input(NamedTuple):
    name: str
    """The path below the root of the inputs, with forward slashes."""
    size: int
    version: str | int
    """Changes when the file does."""


class _Name(NamedTuple):
    format: str
    """A suffix of `records.FORMATS`, or that of Parquet."""
    codec: str | None


def _parsed(name: str) -> _Name | None:
    """Returns what a file's suffixes say; None if they say nothing that we know."""
    path = PurePosixPath(name)
    codec = _CODECS.get(path.suffix)
    format = PurePosixPath(path.stem).suffix if codec else path.suffix
    if format in records.FORMATS or (format == PARQUET and codec is None):
        return _Name(format, codec)
    return None


def line_format(name: str) -> records.Format | None:
    """Returns what the lines of a file hold; None for a file of rows that have fields already."""
    parsed = _parsed(name)
    assert parsed is not None
    return records.FORMATS.get(parsed.format)


def is_by_bytes(name: str) -> bool:
    """Whether the rows of a file are ranges of its own bytes, so that the last one ends where it does."""
    parsed = _parsed(name)
    return parsed is not None and parsed.format != PARQUET and parsed.codec is None


def find(patterns: Sequence[str | Path], *, output: str | Path) -> tuple[str, list[Input]]:
    """Returns the root of the inputs, and the files that `patterns` match, in the order of their names.

    A pattern is a file, a glob, or a folder, of which those files are taken that have a known suffix. The root is where
    the fixed part of the patterns ends; it does not depend on which files there are.

    Raises:
      JobError: nothing matches, a file is in no known format, or `output` would be among the inputs.
      UsageError: the patterns are of different stores, or nothing that is installed can reach theirs.
    """
    absolute = [stores.absolute(pattern) for pattern in patterns]
    protocols = sorted({place.rpartition("://")[0] for place in absolute})
    if len(protocols) > 1:
        raise UsageError("the inputs are of different stores; copy them to one")
    protocol = f"{protocols[0]}://" if protocols[0] else ""
    found: dict[str, Stat | None] = {}
    roots: list[PurePosixPath] = []
    for place in absolute:
        pattern = PurePosixPath(place.removeprefix(protocol))
        is_folder = stores.is_folder(place)
        _check_output(pattern / "*" if is_folder else pattern, protocol, stores.absolute(output))
        files = _inside(place) if is_folder else _matching(place)
        if not files:
            what = "no file with a known suffix in" if is_folder else "no file matches"
            raise JobError(f"{what} {place}; known are {_known_suffixes()}")
        found.update(files)
        roots.append(pattern if is_folder else _fixed_part(pattern))
    _check_formats(found)
    root = protocol + os.path.commonpath(roots)
    store = stores.at(root)
    return root, [_input(store, place, found[place]) for place in sorted(found)]


def _matching(place: str) -> dict[str, Stat | None]:
    """Returns the files that a glob matches, with what their store said in passing."""
    if stores.is_remote(place):
        return dict(stores.find(place))
    matches = glob.iglob(place, recursive=True)  # noqa: PTH207 (absolute patterns)
    return {path: None for path in matches if not Path(path).is_dir()}


def _inside(place: str) -> dict[str, Stat | None]:
    """Returns the files of a folder that are input; `_SUCCESS`, `.part.crc` and their like are not."""
    if stores.is_remote(place):
        files = _matching(f"{place}/*")
    else:
        files = dict.fromkeys(str(path) for path in Path(place).iterdir() if not path.is_dir())
    names = {path: path.rpartition("/")[2] for path in files}
    return {
        path: files[path] for path, name in names.items() if name[0] not in "._" and _parsed(name)
    }


def _fixed_part(pattern: PurePosixPath) -> PurePosixPath:
    """Returns the folder above the first wildcard, or above the file."""
    while glob.has_magic(str(pattern)):
        if not glob.has_magic(str(pattern.parent)):
            break
        pattern = pattern.parent
    return pattern.parent


def _check_output(pattern: PurePosixPath, protocol: str, output: str) -> None:
    """Raises JobError if `pattern` would take what a job writes into `output` for its input."""
    if output.rpartition("://")[0] != protocol.removesuffix("://"):
        return
    folder = PurePosixPath(output.removeprefix(protocol))
    if "**" in pattern.parts:
        matches = folder.is_relative_to(_fixed_part(pattern))
    else:
        matches = any(
            len(part.parts) == len(pattern.parts)
            and all(map(fnmatchcase, part.parts, pattern.parts))
            for suffix in ("jsonl", "parquet")
            for part in (
                folder / f"part-00000-of-00001.{suffix}",
                folder / "errors" / f"part-00000-of-00001.{suffix}",
            )
        )
    if matches:
        raise JobError(
            f"the output folder {output} would match the input {protocol}{pattern}; choose another output"
        )


def _check_formats(places: Iterable[str]) -> None:
    unknown = sorted(place for place in places if _parsed(place) is None)
    if unknown:
        raise JobError(
            f"{len(unknown)} of the inputs are in no known format: {', '.join(unknown[:3])}; "
            f"known are {_known_suffixes()}"
        )


def _known_suffixes() -> str:
    lines, codecs = " and ".join(records.FORMATS), ", ".join(_CODECS)
    return f"{PARQUET}, and {lines} as they are or with {codecs}"


def _input(store: Store, place: str, stat: Stat | None) -> Input:
    name = place.removeprefix(store.place).removeprefix("/")
    try:
        name.encode()
        return Input(name, *(stat or store.stat(name)))
    except UnicodeEncodeError:
        raise JobError(f"the file name {name!r} is not UTF-8; rename the file") from None
    except OSError as error:
        raise JobError(
            f"cannot read input {store.place}/{name}: {error.strerror or error}"
        ) from error


def row_ends(store: Store, entry: Input) -> Iterator[np.ndarray]:
    """Yields, piece by piece, where each row ends: in bytes of what the file holds, or in rows of a Parquet file.

    Raises:
      JobError: the file is damaged, cut off, or being written to.
    """
    with _reading(store, entry), contextlib.closing(_open(store, entry)) as cursor:
        yield from cursor.row_ends()
    if not isinstance(store, Local):
        return  # an object does not grow
    with _reading(store, entry):
        now = store.stat(entry.name)
    if now.size != entry.size:
        raise JobError(
            f"input {store.place}/{entry.name} is being written to ({entry.size} bytes, then {now.size}); "
            "wait for it"
        )


def rows(
    store: Store, entry: Input, start: int, end: int
) -> Iterator[tuple[int, bytes | dict[str, Any] | RowError]]:
    """Yields the rows between two of `row_ends`, each with where it begins: a line, or the fields of a Parquet row.

    Of a line that is too long comes only a beginning that shows it.

    Raises:
      JobError: the file is damaged, or shorter than it was.
    """
    cursor = idle.take(store, entry, start)
    with _reading(store, entry):
        cursor = cursor or _open(store, entry)
        try:
            yield from cursor.rows(start, end)
        except BaseException:
            cursor.close()
            raise
    if cursor.is_seekable:
        cursor.close()
    else:
        idle.give(store, entry, cursor)


@contextlib.contextmanager
def _reading(store: Store, entry: Input) -> Iterator[None]:
    """Makes a JobError of what the libraries raise that open files, decompress them and parse them.

    Raises:
      Unreachable: the system or the store failed, not what the file holds.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # Arrow's codecs raise OSError too, of no number.
        is_system = isinstance(error, OSError) and error.errno is not None
        kind = Unreachable if is_system and not isinstance(error, FileNotFoundError) else JobError
        raise kind(
            f"cannot read input {store.place}/{entry.name}: {' '.join(str(why).split())}"
        ) from error


class Cursor(Protocol):
    """A file that is open, and how far it was read."""

    is_seekable: bool
    position: int

    def row_ends(self) -> Iterator[np.ndarray]: ...

    def rows(
        self, start: int, end: int
    ) -> Iterator[tuple[int, bytes | dict[str, Any] | RowError]]: ...

    def close(self) -> None: ...


def _open(store: Store, entry: Input) -> Cursor:
    parsed = _parsed(entry.name)
    assert parsed is not None
    file = store.open(entry.name)
    try:
        if parsed.format == PARQUET:
            from serve_batch.parquet import Rows

            return Rows(file)
        return _Lines(file, parsed.codec)
    except BaseException:
        file.close()
        raise


class _Lines:
    """Lines by byte offsets."""

    def __init__(self, file: BinaryIO, codec: str | None):
        self.is_seekable = codec is None
        self.position = 0
        self._file, self._inner = _decompressed(file, codec), file

    def close(self) -> None:
        self._file.close()
        self._inner.close()

    def row_ends(self) -> Iterator[np.ndarray]:
        offset = last_end = 0
        while block := self._file.read(_BLOCK_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (offset + 1)
            offset += len(block)
            last_end = int(ends[-1]) if len(ends) else last_end
            yield ends
        if offset > last_end:  # the last line has no newline
            yield np.array([offset])

    def rows(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        self._go_to(start)
        readline = self._file.readline
        while self.position < end:
            offset = self.position
            line = rest = readline(_LINE_BYTES)
            self.position += len(line)
            while rest and rest[-1] != ord("\n"):
                rest = readline(_LINE_BYTES)
                self.position += len(rest)
            if not line:
                raise EOFError("it is shorter than it was")
            # A byte order mark belongs to the file, not to its first row.
            yield offset, line if offset else line.removeprefix(_BYTE_ORDER_MARK)

    def _go_to(self, start: int) -> None:
        if self.is_seekable:
            self.position = self._file.seek(start)
        while self.position < start:
            skipped = self._file.read(min(_BLOCK_BYTES, start - self.position))
            self.position += len(skipped)
            if not skipped:
                raise EOFError("it is shorter than it was")


def _decompressed(file: BinaryIO, codec: str | None) -> BinaryIO:
    """Returns what `file` holds. Its end is checked: a stream that was cut off raises."""
    if codec is None:
        return file
    if codec == "xz":
        import lzma

        return cast(BinaryIO, lzma.open(file))
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, codec), _BLOCK_BYTES)


class _Idle:
    """Files that are open between two shards, the last few."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursors: list[tuple[str, Input, Cursor]] = []

    def take(self, store: Store, entry: Input, start: int) -> Cursor | None:
        """Returns the cursor that was given back closest before `start`, for its taker alone."""
        with self._lock:
            fitting = [
                item
                for item in self._cursors
                if item[:2] == (store.place, entry) and item[2].position <= start
            ]
            if not fitting:
                return None
            best = max(fitting, key=lambda item: item[2].position)
            self._cursors.remove(best)
            return best[2]

    def give(self, store: Store, entry: Input, cursor: Cursor) -> None:
        with self._lock:
            self._cursors.append((store.place, entry, cursor))
            dropped = self._cursors[:-_IDLE]
            del self._cursors[:-_IDLE]
        for *_, old in dropped:
            old.close()

    def close(self) -> None:
        with self._lock:
            cursors, self._cursors = self._cursors, []
        for *_, cursor in cursors:
            cursor.close()


idle = _Idle()
"""Of this process; to be closed when a job ends."""
