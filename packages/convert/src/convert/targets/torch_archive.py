"""Writes what torch.load reads, without torch: a zip archive with a pickle of descriptions and a record a storage.

Storages stream through, each on 64 bytes, so that they can be mapped. The same input gives the same bytes: nothing in
the archive is a time, an identity or a random number.
"""

import dataclasses
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 64
WRITER = ".written_by"
_LOCAL_HEADER, _ZIP64_EXTRA, _EXTRA_HEADER = 30, 20, 4
_ZIP64_FROM = 1 << 30

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A contiguous tensor that is the whole of the storage `key`; several may name the same."""

    key: str
    dtype: str
    shape: tuple[int, ...]


def write(
    path: Path,
    value: Any,
    storages: Mapping[str, np.ndarray],
    parts: Callable[[np.ndarray], Iterable[np.ndarray]],
    on_bytes: Callable[[int], None],
) -> None:
    """Writes `value`, a tree of dicts, lists, tuples, numbers, strings and `Tensor`s, and its storages.

    Args:
      path: the file.
      value: what torch.load will return.
      storages: the elements of each storage, in any shape.
      parts: cuts an array into consecutive parts, which are written one by one.
      on_bytes: told how many bytes of storages have just been written.
    """
    top = path.stem
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

        def record(name: str, nbytes: int, content: Iterable[bytes | memoryview]) -> None:
            with archive.open(
                _entry(f"{top}/{name}", nbytes, file.tell()), "w", force_zip64=nbytes > _ZIP64_FROM
            ) as written:
                for part in content:
                    written.write(part)

        def raw(array: np.ndarray) -> Iterable[memoryview]:
            for part in parts(array):
                data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                yield data
                on_bytes(data.nbytes)

        pickled = dumps(value)
        record("data.pkl", len(pickled), [pickled])
        for key, array in storages.items():
            record(f"data/{key}", array.nbytes, raw(array))
        for name, content in {
            "byteorder": b"little",
            "version": b"3\n",
            WRITER: b"flaxmill",
        }.items():
            record(name, len(content), [content])


def is_ours(path: Path) -> bool:
    """Tells whether `write` wrote the file, and not torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"{path.stem}/{WRITER}") == b"flaxmill"
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False


def dumps(value: Any) -> bytes:
    """Returns `value` as the pickle of an archive: protocol 2, which is what torch.load expects."""
    return b"\x80\x02" + _pickled(value) + b"."


def _entry(name: str, nbytes: int, at: int) -> zipfile.ZipInfo:
    """Returns a record's entry, with as much padding as puts its bytes on a multiple of `ALIGNMENT`."""
    entry = zipfile.ZipInfo(name)
    entry.file_size, entry.create_system = nbytes, 3
    header = _LOCAL_HEADER + len(name) + _EXTRA_HEADER + _ZIP64_EXTRA * (nbytes > _ZIP64_FROM)
    padding = -(at + header) % ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)  # torch's own mark for it
    return entry


def _pickled(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            return b"\x8a\x08" + struct.pack("<q", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_pickled, value)) + b"e"
        case dict():
            items = (_pickled(key) + _pickled(item) for key, item in value.items())
            return b"}(" + b"".join(items) + b"u"
        case Tensor():
            return _tensor(value)
    raise TypeError(f"{value!r} has no place in a checkpoint")


def _tensor(tensor: Tensor) -> bytes:
    """Returns a call of torch's function that makes a tensor of a storage, which is a reference by its key."""
    length = int(np.prod(tensor.shape))
    strides = tuple(int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape)))
    storage = (
        *(b"(" + _pickled("storage"), f"ctorch\n{_STORAGES[tensor.dtype]}\n".encode()),
        *(_pickled(tensor.key), _pickled("cpu"), _pickled(length) + b"tQ"),
    )
    no_hooks = b"ccollections\nOrderedDict\n)R"
    view = (_pickled(0), _pickled(tensor.shape), _pickled(strides), _pickled(False), no_hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join((*storage, *view)) + b"tR"
