"""What `np.load` opens: one .npz of all parameters by name, config.json and the tokenizer's files beside it.

The arrays are stored, not compressed, and begin on 64 bytes, so that whoever maps the file can use them as they lie.
numpy has no bfloat16: those arrays are written as float32, which holds every value of theirs.
"""

import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.npz import FILE
from convert.targets import params_folder
from core.checkpoint import ALIGNMENT, ModelFolder
from core.checkpoint import parts as in_parts

IS_FILE = False

_FIRST_DAY = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # of a zip's calendar; a true date would make every export another
_PADDING = 0xD935  # the extra field that Android's zipalign pads with
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20
_MAGIC = b"\x93NUMPY\x01\x00"


def check(folder: ModelFolder) -> list[str]:
    """Returns nothing: it holds every model."""
    return []


def nbytes(folder: ModelFolder) -> int:
    """Returns the size of the arrays as they are written."""
    return sum(array.size * _dtype(array).itemsize for array in folder.tensors.values())


def write(
    folder: ModelFolder, out: Path, on_bytes: Callable[[int], None], **options: Any
) -> list[str]:
    """Writes the arrays, part by part, and copies the files beside; returns which arrays have another type now."""
    with zipfile.ZipFile(out / FILE, "w", zipfile.ZIP_STORED) as archive:
        for name, array in folder.tensors.items():
            header = _header(_dtype(array), array.shape)
            with archive.open(_entry(archive, name), "w", force_zip64=True) as entry:
                entry.write(header)
                for part in _parts(array):
                    entry.write(part.data)
                    on_bytes(part.nbytes)
    params_folder.copy_files(folder, out)
    wider = [name for name, array in folder.tensors.items() if _dtype(array) != array.dtype]
    if not wider:
        return []
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in wider)
    which = "all" if len(wider) == len(folder.tensors) else ", ".join(kinds)
    return [
        f"npz has no bfloat16: {len(wider)} tensors are float32 there, which holds every value of theirs; converted "
        f"back with --dtype=bfloat16 they are the same bits: {which}"
    ]


def is_own(path: Path) -> bool:
    """Tells whether such an export lies at `path`."""
    return (path / FILE).is_file() and params_folder.is_own(path)


def _dtype(array: np.ndarray) -> np.dtype:
    return np.dtype("<f4") if array.dtype.name == "bfloat16" else array.dtype


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the bytes of an array as it is written, in consecutive pieces."""
    for part in in_parts(array):
        yield np.ascontiguousarray(part, _dtype(array)).reshape(-1).view(np.uint8)


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Returns an entry whose content begins on 64 bytes; the .npy header is a multiple of that long."""
    entry = zipfile.ZipInfo(f"{name}.npy", _FIRST_DAY)
    entry.create_system = 3  # as on every Unix, also where this runs on another system
    entry.external_attr = 0o644 << 16
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL_HEADER + len(entry.filename.encode()) + _ZIP64_EXTRA
    length = -(start + 4) % ALIGNMENT
    entry.extra = b"".join(n.to_bytes(2, "little") for n in (_PADDING, length)) + bytes(length)
    return entry


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Returns the header that numpy writes, padded so that the data begin on 64 bytes after it."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    size = -(-(len(_MAGIC) + 2 + len(text) + 1) // ALIGNMENT) * ALIGNMENT - len(_MAGIC) - 2
    return _MAGIC + size.to_bytes(2, "little") + text.ljust(size - 1) + b"\n"
