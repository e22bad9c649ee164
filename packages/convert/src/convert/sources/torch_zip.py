"""Reads what torch.save wrote, without torch: `pytorch_model.bin`, single or sharded, and any state dict.

Since 1.6 such a file is a zip archive of uncompressed records under one top folder: `data.pkl`, the object with
tensors as references; `data/KEY`, the bytes of each storage; `byteorder`. The bytes are mapped where they lie.
Older files are `torch_legacy`'s. The pickle goes through `convert.unpickle` and can do nothing but describe tensors.
"""

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert import unpickle
from convert.errors import ConvertError
from convert.sources import (
    CONFIG,
    GENUINE_BYTES,
    Source,
    SourceTensor,
    check_genuine,
    companions,
    read_json,
    torch_legacy,
)
from convert.sources.safetensors import read_shards
from convert.sources.torch_storage import CALLS, CONSTANTS, Place, Storage, View, source_tensor
from convert.sources.torch_storage import storage_of as _storage_of

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
EXPECTED = (
    f"a folder with {CONFIG} and {SINGLE} (or its shards and {INDEX}), "
    f"or a state dict saved by PyTorch beside its {CONFIG}"
)

_DIRECTORY_LIMIT = 1 << 26  # a record's entry takes some 60 bytes: a million of them
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def recognizes(path: Path) -> bool:
    """Tells whether PyTorch's weights lie at `path`, by the names in a folder and the content of a file."""
    if path.is_dir():
        return (path / INDEX).is_file() or (path / SINGLE).is_file()
    return is_torch(path)


def is_torch(path: Path) -> bool:
    """Tells whether torch.save wrote the file, of either format."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(len(torch_legacy.START))
        if start == torch_legacy.START:
            return True
        if not start.startswith(b"PK\x03\x04"):
            return False
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except _ZIP_ERRORS:
        return False


def open(path: Path) -> Source:
    """Opens a folder with `pytorch_model.bin`, or a single state dict with its config.json beside it."""
    folder = path.parent if path.is_file() else path
    if not (folder / CONFIG).is_file():
        raise ConvertError(f"{folder}: no {CONFIG}; it says what the tensors are, so put it there")
    config = read_json(folder / CONFIG)
    if path.is_file():
        tensors, files = read_file(path), [path]
    elif (folder / INDEX).is_file():
        tensors, shards = read_shards(folder / INDEX, read_file)
        files = [folder / INDEX, *shards]
    else:
        tensors, files = read_file(folder / SINGLE), [folder / SINGLE]
    return Source(
        path=path,
        format="torch",
        config=config,
        tensors=tensors,
        files=(folder / CONFIG, *files),
        companions=companions(folder),
    )


def read_file(path: Path) -> dict[str, SourceTensor]:
    """Returns the tensors of a file that holds one state dict."""
    value, places = load(path)
    return state_dict(path, value, places)


def load(path: Path) -> tuple[Any, dict[str, Place]]:
    """Returns the object in a file of torch.save, with `View`s for its tensors, and where each storage lies.

    Raises:
      ConvertError: not such a file, damaged, cut short, or more than data.
    """
    with path.open("rb") as file:
        if not (start := file.read(GENUINE_BYTES)):
            raise ConvertError(f"{path}: an empty file; expected one of torch.save")
        check_genuine(path, start)
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if start.startswith(torch_legacy.START):
        return torch_legacy.load(path, buffer)
    return _load_zip(path, buffer)


def state_dict(path: Path, value: Any, places: dict[str, Place]) -> dict[str, SourceTensor]:
    """Returns the tensors of a state dict; several may share their bytes.

    Raises:
      ConvertError: it is no dict of names to tensors.
    """
    if type(value) is not dict:
        raise ConvertError(f"{path}: holds {_kind(value)}; expected a dict of names to tensors")
    others = [
        f"{str(name)[:100]} is {_kind(tensor)}"
        for name, tensor in value.items()
        if type(name) is not str or type(tensor) is not View
    ]
    if others:
        raise ConvertError(f"{path}: {len(others)} entries are no tensors with a name", others)
    return {
        name: source_tensor(name, view, places[view.storage.key]) for name, view in value.items()
    }


def _load_zip(path: Path, buffer: mmap.mmap) -> tuple[Any, dict[str, Place]]:
    records = _records(path, buffer)
    top = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(top) != 1:
        raise ConvertError(f"{path}: found {len(top)} records data.pkl; expected one")
    big_endian = _is_big_endian(path, buffer, records.get(f"{top[0]}byteorder"))
    places: dict[str, Place] = {}

    def persistent(pid: Any) -> Storage:
        storage, _ = _storage_of(pid, where=path, fields=5)
        record = records.get(f"{top[0]}data/{storage.key}")
        if record is None:
            raise ConvertError(f"{path}: no record data/{storage.key[:100]}, which a tensor needs")
        if record[1] != storage.nbytes:
            raise ConvertError(
                f"{path}: data/{storage.key} has {record[1]:,} bytes, its tensor says {storage.nbytes:,}"
            )
        places[storage.key] = Place(buffer, record[0], big_endian)
        return storage

    start, size = records[f"{top[0]}data.pkl"]
    with memoryview(buffer) as whole, whole[start : start + size] as pickled:
        value = unpickle.load(
            pickled,
            where=f"{path}: data.pkl",
            calls=CALLS,
            constants=CONSTANTS,
            persistent=persistent,
        )
    return value, places


def _records(path: Path, buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Returns where each record's bytes begin and how many they are."""
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            records = dict(_located(buffer, archive.infolist()))
            if len(records) < len(archive.infolist()):
                raise zipfile.BadZipFile("a record is there twice")
            return records
    except _ZIP_ERRORS as error:
        raise ConvertError(
            f"{path}: the archive is damaged or cut short ({error}); copy or download it again"
        ) from error


def _located(
    buffer: mmap.mmap, entries: list[zipfile.ZipInfo]
) -> Iterator[tuple[str, tuple[int, int]]]:
    for entry in entries:
        at = entry.header_offset
        magic, _, flags, *_, name, extra = _LOCAL_HEADER.unpack_from(buffer, at)
        start = at + _LOCAL_HEADER.size + name + extra
        if magic != b"PK\x03\x04" or start + entry.file_size > len(buffer):
            raise zipfile.BadZipFile(f"{entry.filename} is not where the directory says")
        if flags & 1 or entry.compress_type or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(
                f"{entry.filename} is compressed or encrypted, which torch.save does not do"
            )
        yield entry.filename, (start, entry.file_size)


def _is_big_endian(path: Path, buffer: mmap.mmap, record: tuple[int, int] | None) -> bool:
    if record is None:  # before 2.1: as on the machine that wrote it, and those are little endian
        return False
    order = buffer[record[0] : record[0] + min(record[1], 16)]
    if order not in (b"little", b"big"):
        raise ConvertError(f"{path}: the byte order is {order!r}; expected b'little' or b'big'")
    return order == b"big"


class _Bounded(io.FileIO):
    """A file of which no more is read at once than a directory of records may be long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > _DIRECTORY_LIMIT:
            raise zipfile.BadZipFile("its directory is too long")
        return super().read(size)


_ZIP_ERRORS = (
    zipfile.BadZipFile,
    OSError,
    ValueError,  # of a name that is no text, too
    EOFError,
    struct.error,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)


def _kind(value: Any) -> str:
    if type(value) is dict:
        keys = ", ".join(str(key)[:40] for key in list(value)[:8])
        return f"a dict with {keys or 'nothing in it'}"
    return f"a {type(value).__name__}"
