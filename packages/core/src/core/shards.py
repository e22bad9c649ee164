"""Safetensors files, every byte of which has its place before the first is written.

A shard is laid out from what its tensors will be: header, size and every tensor's offset. Then the file is made in its
full size, and the tensors are filled in part by part, by several threads, in whatever order; the bytes are the same for
any number of them. Each tensor's SHA-256 is taken on the way. What a tensor means is not known here.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from core import workers
from core.errors import CheckpointError
from core.journal import Journal

ALIGNMENT = 64  # jax.device_put shares pages from here on
PART_BYTES = 4 * 2**20  # of a tensor at a time: a thread holds two or three; larger is not faster
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}
NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}

_COLUMNS = 128  # copied at a time from a transposed matrix
_BLOCK_BYTES = 2**20  # hashed, and written while the processor's cache has it


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written: `dtype` by its numpy name (integers: quantised); its origin is for the manifest."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...] = ()
    layout: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_DTYPES[DTYPES[self.dtype]].itemsize


Read = Callable[[TensorSpec], Iterable[np.ndarray]]
"""Gives a tensor's consecutive parts, of its dtype: joined in C order they are the tensor (see `parts`).

With several threads it is called for several tensors at a time.
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: in which file, and how far from its start."""

    spec: TensorSpec
    shard: str
    offset: int

    def entry(self, sha256: str) -> dict[str, Any]:
        """Returns what the manifest says of the tensor."""
        return {
            "dtype": self.spec.dtype,
            "shape": list(self.spec.shape),
            "shard": self.shard,
            "offset": self.offset,
            "nbytes": self.spec.nbytes,
            "sha256": sha256,
            "sources": list(self.spec.sources),
            "layout": self.spec.layout,
        }

    def line(self, sha256: str) -> dict[str, Any]:
        """Returns what the journal says of the tensor."""
        entry = self.entry(sha256)
        kept = {key: entry[key] for key in ("shard", "offset", "nbytes", "sha256")}
        return {"name": self.spec.name, **kept}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to be written: its name, how it begins, and where its tensors lie, one after another."""

    name: str
    header: bytes
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(place.spec.nbytes for place in self.places)


def lay_out(
    name: str, specs: Sequence[TensorSpec], *, kind: str = "flax", alignment: int = ALIGNMENT
) -> Shard:
    """Returns the file `name` with `specs` in that order.

    Args:
      name: of the file.
      specs: what is in it.
      kind: the "format" of the file's metadata; older transformers read nothing but "pt".
      alignment: what the place of the first tensor is a multiple of.
    """
    header: dict[str, Any] = {"__metadata__": {"format": kind}}
    end = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    begin = len(text) + 8
    places = tuple(Place(s, name, begin + header[s.name]["data_offsets"][0]) for s in specs)
    return Shard(name, len(text).to_bytes(8, "little") + text, places)


def split(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Returns `specs` in shards, in order, none above `shard_bytes` unless one tensor alone is."""
    shards: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def parts(array: np.ndarray, part_bytes: int = PART_BYTES) -> Iterator[np.ndarray]:
    """Gives `array` in consecutive parts of at most `part_bytes`: views where its memory is in C order, else copies.

    >>> [part.tolist() for part in parts(np.arange(6, dtype=np.uint8).reshape(2, 3).T, part_bytes=4)]
    [[[0, 3], [1, 4]], [[2, 5]]]
    """
    if array.nbytes <= part_bytes or array.ndim == 0:
        yield _packed(array)
    elif (row_bytes := array.nbytes // len(array)) > part_bytes and array.ndim > 1:
        for row in array:
            yield from parts(row, part_bytes)
    else:
        step = max(part_bytes // row_bytes, 1)
        for start in range(0, len(array), step):
            yield _packed(array[start : start + step])


def _packed(array: np.ndarray) -> np.ndarray:
    """Returns `array` in C order, itself if it is.

    A transposed matrix is copied a few columns at a time, so that a line of memory once fetched is used up: more than
    twice as fast as at once.
    """
    if array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    try:
        flat = np.reshape(array, (len(array), -1), copy=False)
    except ValueError:  # no matrix without a copy
        result[...] = array
        return result
    flat_result = result.reshape(flat.shape)
    for start in range(0, flat.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        flat_result[:, columns] = flat[:, columns]
    return result


def write(
    folder: Path,
    shards: Sequence[Shard],
    read: Read,
    *,
    on_bytes: Callable[[int], None] | None = None,
    threads: int = 1,
    journal: Journal | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes `shards` into `folder` and returns every tensor's manifest entry.

    All files are made in their full size first, so that a disk without room shows at once. At the end all of it is on
    the disk.

    Args:
      folder: where the files go, or already are.
      shards: what to write.
      read: gives a tensor's parts; called once for each tensor that is written.
      on_bytes: told how many bytes have just been written, or found written, by one thread at a time.
      threads: how many tensors are written at a time; a part of each is in memory.
      journal: tensors that it names, and whose bytes are still what it says, are not written again; it is told of
        every other when that is written.

    Raises:
      CheckpointError: the parts are not what a spec says, or the disk refuses.
    """
    finished = journal.entries() if journal is not None else {}
    tell = _one_at_a_time(on_bytes)
    places = [place for shard in shards for place in shard.places]
    with contextlib.ExitStack() as stack:
        files = {s.name: stack.enter_context(_opened(folder / s.name, s)) for s in shards}

        def work(place: Place, stop: threading.Event) -> str:
            file, line = files[place.shard], finished.get(place.spec.name)
            if line is not None and _holds(file, place, line, stop):
                tell(place.spec.nbytes)
                return line["sha256"]
            sha256 = _fill(file, place, read, tell, stop)
            if journal is not None:
                with named(folder):
                    journal.append(**place.line(sha256))
            return sha256

        hashes = workers.each(work, places, threads=threads)
        for file in files.values():
            file.sync()
    return {p.spec.name: p.entry(h) for p, h in zip(places, hashes, strict=True)}


@dataclasses.dataclass(frozen=True)
class _File:
    """An open file whose errors name it."""

    path: Path
    descriptor: int

    def allocate(self, nbytes: int) -> None:
        """Makes the file just so large, with room for all of it where the file system can promise that."""
        with self._named():
            os.ftruncate(self.descriptor, min(os.fstat(self.descriptor).st_size, nbytes))
            try:
                os.posix_fallocate(self.descriptor, 0, nbytes)
            except (
                AttributeError,
                OSError,
            ) as error:  # no such function, or not on this file system
                if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                os.ftruncate(self.descriptor, nbytes)

    def write(self, data: memoryview, offset: int) -> None:
        with self._named():
            while data:
                count = os.pwrite(self.descriptor, data, offset)
                data, offset = data[count:], offset + count

    def read(self, nbytes: int, offset: int) -> bytes:
        with self._named():
            return os.pread(self.descriptor, nbytes, offset)

    def sync(self) -> None:
        with self._named():
            os.fsync(self.descriptor)

    def _named(self) -> contextlib.AbstractContextManager[None]:
        return named(self.path)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Makes an error of the system in writing `path`, which does not always say of what it speaks, one that does."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}; free some space or choose another folder"
        ) from error


@contextlib.contextmanager
def _opened(path: Path, shard: Shard) -> Iterator[_File]:
    """Opens the file, new or not, with its header and in its full size; tensors that are there stay."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        file = _File(path, descriptor)
        file.allocate(shard.nbytes)
        file.write(memoryview(shard.header), 0)
        yield file
    finally:
        os.close(descriptor)


def _fill(
    file: _File,
    place: Place,
    read: Read,
    tell: Callable[[int], None],
    stop: threading.Event,
) -> str:
    """Writes one tensor and returns its SHA-256."""
    digest, offset = hashlib.sha256(), place.offset
    for part in _checked(place.spec, read(place.spec)):
        for start in range(0, len(part), _BLOCK_BYTES):
            block = part[start : start + _BLOCK_BYTES]
            digest.update(block)
            file.write(block, offset)
            offset += len(block)
        tell(len(part))
        if stop.is_set():
            raise workers.Stopped
    return digest.hexdigest()


def _holds(file: _File, place: Place, line: Mapping[str, Any], stop: threading.Event) -> bool:
    """Tells whether the file holds the tensor that the journal's `line` tells of, where it belongs."""
    if line != place.line(str(line.get("sha256"))):
        return False
    digest, end = hashlib.sha256(), place.offset + place.spec.nbytes
    for offset in range(place.offset, end, _BLOCK_BYTES):
        digest.update(file.read(min(_BLOCK_BYTES, end - offset), offset))
        if stop.is_set():
            raise workers.Stopped
    return digest.hexdigest() == line["sha256"]


def _checked(spec: TensorSpec, parts: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """Gives the bytes of the parts that make up `spec`; CheckpointError if they are of another type or number."""
    left = spec.nbytes
    for part in parts:
        left -= part.nbytes
        if part.dtype.name != spec.dtype or left < 0:
            break
        yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
    else:
        if not left:
            return
        part = np.empty(0, spec.dtype)
    raise CheckpointError(
        f"{spec.name}: expected {spec.dtype}{list(spec.shape)}, {spec.nbytes} bytes, "
        f"was given {part.dtype.name}, {spec.nbytes - left} bytes"
    )


def _one_at_a_time(on_bytes: Callable[[int], None] | None) -> Callable[[int], None]:
    lock = threading.Lock()

    def tell(nbytes: int) -> None:
        if on_bytes is not None:
            with lock:
                on_bytes(nbytes)

    return tell
