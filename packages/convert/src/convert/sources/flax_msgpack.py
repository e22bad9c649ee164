"""Reads what flax.serialization writes (`flax_model.msgpack`): a nested map whose leaves are arrays.

The file is walked over its memory map, and an array is a view of where it lies; only one above 1 GiB, which flax cuts
into pieces, is put together in memory when it is read.
"""

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import ConvertError
from convert.sources import CONFIG, Source, SourceTensor, companions, params_tree
from convert.sources import msgpack_walker as walker

FILES = ("flax_model.msgpack", "model.msgpack")
EXPECTED = f"a folder with {FILES[0]} (or another file of flax.serialization) and {CONFIG}"

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}
"""flax names types as numpy and ml_dtypes do."""

NDARRAY, COMPLEX, SCALAR = 1, 2, 3
"""The numbers of flax's extensions to MessagePack."""

CHUNKED = "__msgpack_chunked_array__"

_DEPTH_LIMIT = 64
_LEAF_LIMIT = 1 << 20


def recognizes(path: Path) -> bool:
    """Tells whether flax's MessagePack lies at `path`, by the file's name and its first byte, which begins a map."""
    file = _file(path)
    if file is None or file.suffix != ".msgpack":
        return False
    try:
        with file.open("rb") as opened:
            first = opened.read(1)
    except OSError:
        return False
    return first != b"" and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def open(path: Path) -> Source:
    """Opens the file in a folder, or the one at `path`, with the config.json beside it."""
    file = _file(path)
    if file is None:
        raise ConvertError(f"{path}: expected {EXPECTED}")
    config_file, config = params_tree.read_config(file, [file.parent])
    try:
        tensors, notes = params_tree.parameters(_read(file))
    except walker.Malformed as error:
        raise ConvertError(f"{file}: {error}; copy or download it again") from error
    return Source(
        path=path,
        format="flax_msgpack",
        config=config,
        tensors=tensors,
        files=(config_file, file),
        companions=companions(file.parent),
        notes=notes,
    )


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path
    return next((path / name for name in FILES if (path / name).is_file()), None)


def _read(file: Path) -> dict[str, SourceTensor]:
    """Returns the leaves of the tree that are arrays, by their paths joined by dots."""
    if file.stat().st_size == 0:
        raise ConvertError(f"{file}: empty")
    with file.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    tensors: dict[str, SourceTensor] = {}
    end = 0
    for keys, tensor, stop in _leaves(data, 0, ()):
        end = stop
        if tensor is None:
            continue
        name = ".".join(keys)
        if name in tensors:
            raise ConvertError(f"{file}: holds {name[:60]!r} twice")
        if len(tensors) == _LEAF_LIMIT:
            raise ConvertError(f"{file}: holds more than {_LEAF_LIMIT:,} arrays")
        tensors[name] = SourceTensor(name, *tensor)
    if end != len(data):
        raise walker.Malformed(f"{len(data)} bytes, of which the tree takes {end}")
    return tensors


_Leaf = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def _leaves(
    data: mmap.mmap, offset: int, keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], _Leaf | None, int]]:
    """Yields every leaf at and below `offset`: path, array (None where it is none), and where it ends.

    A map or list yields itself last, as no array, so that the last end is the end of the tree.
    """
    if len(keys) > _DEPTH_LIMIT:
        raise walker.Malformed(f"nested deeper than {_DEPTH_LIMIT} levels")
    found = walker.item(data, offset)
    if found.kind in ("map", "array"):
        end, is_map = found.start, found.kind == "map"
        if is_map and _is_chunked(data, found):
            leaf, end = _chunked(data, found)
            yield keys, leaf, end
            return
        for i in range(found.size):
            key, end = _key(data, end) if is_map else (str(i), end)
            for leaf in _leaves(data, end, (*keys, key)):
                end = leaf[2]
                yield leaf
        yield keys, None, end
    elif found.kind == "ext" and found.value in (NDARRAY, SCALAR):
        dtype, shape, start = _array(data, found)
        yield keys, (dtype.name, shape, _view(data, dtype, shape, start)), found.start + found.size
    elif found.kind == "ext" and found.value != COMPLEX:
        raise walker.Malformed(f"byte {offset}: extension {found.value} is none of flax's")
    else:
        yield keys, None, found.start + found.size


def _key(data: mmap.mmap, offset: int) -> tuple[str, int]:
    found = walker.item(data, offset)
    if found.kind == "value" and type(found.value) is int:
        return str(found.value), found.start
    return walker.text(data, offset)


def _array(data: mmap.mmap, found: walker.Item) -> tuple[np.dtype, tuple[int, ...], int]:
    """Returns type, shape and first byte of an ndarray: a list of its shape, the type's name and the bytes."""
    inner = walker.expect(data, found.start, "array")
    if inner.size != 3:
        raise walker.Malformed(f"byte {found.start}: an array of {inner.size} parts, expected 3")
    shape, end = walker.sizes(data, inner.start)
    name, end = walker.text(data, end)
    content = walker.item(data, end)
    if name not in DTYPES:
        raise walker.Malformed(f"byte {end}: type {name[:60]!r}; known are {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * DTYPES[name].itemsize
    if content.kind not in ("bin", "str") or content.size != nbytes:
        raise walker.Malformed(
            f"byte {end}: {content.kind} of {content.size}, expected {nbytes} bytes of {name}{list(shape)}"
        )
    if content.start + nbytes != found.start + found.size:
        raise walker.Malformed(f"byte {found.start}: an array is not as long as its extension")
    return DTYPES[name], shape, content.start


def _is_chunked(data: mmap.mmap, found: walker.Item) -> bool:
    if found.size != 3 or walker.item(data, found.start).kind != "str":
        return False
    return walker.text(data, found.start)[0] == CHUNKED


def _chunked(data: mmap.mmap, found: walker.Item) -> tuple[_Leaf, int]:
    """Returns an array that is stored in flat pieces, and where it ends."""
    end = walker.item(data, walker.text(data, found.start)[1]).start  # past the mark: True
    shape, end = _numbered(data, end, "shape", _size)
    pieces, end = _numbered(data, end, "chunks", _piece)
    kinds = {dtype for dtype, _, _ in pieces}
    if len(kinds) != 1 or any(len(lengths) != 1 for _, lengths, _ in pieces):
        raise walker.Malformed(f"byte {found.start}: the pieces are not flat and of one type")
    (dtype,) = kinds
    if sum(lengths[0] for _, lengths, _ in pieces) != math.prod(shape):
        raise walker.Malformed(f"byte {found.start}: the pieces do not make {list(shape)}")

    def read() -> np.ndarray:
        views = [np.ndarray(flat, dtype, buffer=data, offset=at) for _, flat, at in pieces]
        return np.concatenate(views).reshape(shape)

    return (dtype.name, tuple(shape), read), end


def _numbered(
    data: mmap.mmap, offset: int, key: str, read: Callable[[mmap.mmap, int], tuple[Any, int]]
) -> tuple[list[Any], int]:
    """Returns the values of the map called `key`, whose own keys count from "0", and where it ends."""
    name, end = walker.text(data, offset)
    if name != key:
        raise walker.Malformed(f"byte {offset}: expected {key!r}, found {name[:60]!r}")
    found = walker.expect(data, end, "map")
    values: dict[str, Any] = {}
    end = found.start
    for _ in range(found.size):
        number, end = walker.text(data, end)
        values[number], end = read(data, end)
    try:
        return [values[str(i)] for i in range(found.size)], end
    except KeyError as error:
        raise walker.Malformed(f"byte {offset}: {key} lacks {error}") from error


def _size(data: mmap.mmap, offset: int) -> tuple[int, int]:
    found = walker.item(data, offset)
    if found.kind != "value" or type(found.value) is not int or found.value < 0:
        raise walker.Malformed(f"byte {offset}: no size")
    return found.value, found.start


def _piece(data: mmap.mmap, offset: int) -> tuple[tuple[np.dtype, tuple[int, ...], int], int]:
    found = walker.expect(data, offset, "ext")
    return _array(data, found), found.start + found.size


def _view(
    data: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> Callable[[], np.ndarray]:
    return lambda: np.ndarray(shape, dtype, buffer=data, offset=offset)
