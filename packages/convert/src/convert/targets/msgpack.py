"""What `flax.serialization.msgpack_restore` opens: the nested dict of parameters in one file, config.json beside it.

The bytes are those that flax's own `msgpack_serialize` gives for the same tree; they are written array by array, and
an array above 1 GiB in pieces, as flax cuts it.
"""

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.sources.flax_msgpack import CHUNKED, NDARRAY
from convert.targets import params_folder
from core.checkpoint import ModelFolder
from core.checkpoint import parts as in_parts

IS_FILE = False
FILE = "model.msgpack"
CHUNK_BYTES = 1 << 30
"""flax's limit: MessagePack counts the bytes of an object in 31 bits."""


def check(folder: ModelFolder) -> list[str]:
    """Returns nothing: it holds every model."""
    return []


def nbytes(folder: ModelFolder) -> int:
    """Returns the size of the arrays."""
    return sum(array.nbytes for array in folder.tensors.values())


def write(
    folder: ModelFolder, out: Path, on_bytes: Callable[[int], None], **options: Any
) -> list[str]:
    """Writes the tree and copies the files beside."""
    with (out / FILE).open("wb") as file:
        write_tree(_nested(folder.tensors), file, on_bytes)
    params_folder.copy_files(folder, out)
    return []


def is_own(path: Path) -> bool:
    """Tells whether such an export lies at `path`."""
    return (path / FILE).is_file() and params_folder.is_own(path)


def write_tree(tree: Mapping[str, Any], file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
    """Writes nested dicts of arrays, keys in sorted order, as JAX gives them to flax."""
    import msgpack

    packer = msgpack.Packer()
    file.write(packer.pack_map_header(len(tree)))
    for key in sorted(tree):
        file.write(packer.pack(key))
        if isinstance(tree[key], Mapping):
            write_tree(tree[key], file, on_bytes)
        elif tree[key].nbytes > CHUNK_BYTES:
            _write_chunks(tree[key], file, on_bytes)
        else:
            _write_array(tree[key], file, on_bytes)


def _nested(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return tree


def _write_array(array: np.ndarray, file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
    """Writes the extension that flax keeps an array in: the list of its shape, its type's name and its bytes."""
    import msgpack

    packer = msgpack.Packer()
    head = packer.pack_array_header(3) + packer.pack(array.shape) + packer.pack(array.dtype.name)
    head += _bin_header(array.nbytes)
    file.write(_ext_header(len(head) + array.nbytes) + head)
    for part in in_parts(array):
        file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        on_bytes(part.nbytes)


def _write_chunks(array: np.ndarray, file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
    import msgpack

    packer = msgpack.Packer()
    flat = array.reshape(-1)
    length = max(1, CHUNK_BYTES // array.dtype.itemsize)
    shape = {str(i): size for i, size in enumerate(array.shape)}
    file.write(packer.pack_map_header(3) + packer.pack(CHUNKED) + packer.pack(True))
    file.write(packer.pack("shape") + packer.pack(shape) + packer.pack("chunks"))
    file.write(packer.pack_map_header(math.ceil(flat.size / length)))
    for number, start in enumerate(range(0, flat.size, length)):
        file.write(packer.pack(str(number)))
        _write_array(flat[start : start + length], file, on_bytes)


def _bin_header(size: int) -> bytes:
    if size < 1 << 8:
        return struct.pack(">BB", 0xC4, size)
    if size < 1 << 16:
        return struct.pack(">BH", 0xC5, size)
    return struct.pack(">BI", 0xC6, size)


def _ext_header(size: int) -> bytes:
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    if size in fixed:
        return struct.pack(">Bb", fixed[size], NDARRAY)
    if size < 1 << 8:
        return struct.pack(">BBb", 0xC7, size, NDARRAY)
    if size < 1 << 16:
        return struct.pack(">BHb", 0xC8, size, NDARRAY)
    return struct.pack(">BIb", 0xC9, size, NDARRAY)
