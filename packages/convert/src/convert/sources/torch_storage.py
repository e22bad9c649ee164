"""What the pickles in PyTorch's files say: storages, and tensors as views of them, as data and without torch.

A tensor is rebuilt as a description (`View`): which storage, from which element, with which shape and strides. Where a
storage's bytes lie is the container's business (`torch_zip`, `torch_legacy`), which maps them.
"""

import dataclasses
import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import ConvertError
from convert.sources import SourceTensor

_MAX_AXES = 64  # numpy's and torch's
_MAX_BYTES = 1 << 62
# A view may show its storage that many times over; more takes time without end to read.
_MAX_OVERLAP = 16

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype(bool),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}
"""The typed storages, by their class in torch."""

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype(bool),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}
"""torch's types by their names."""

UNTYPED = np.dtype("u1")  # an untyped storage counts bytes; the tensor says what they are


@dataclasses.dataclass(frozen=True)
class Storage:
    """So many numbers under a key; in legacy files it may be a part of another one, from element `start`."""

    key: str
    dtype: np.dtype
    length: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor: `offset` and `strides` count elements of `dtype` in its storage, which holds them all."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the bytes of a storage lie; `is_big_endian` if the machine that wrote them was."""

    buffer: mmap.mmap
    offset: int
    is_big_endian: bool = False


def storage_of(pid: Any, *, where: object, fields: int) -> tuple[Storage, Any]:
    """Returns the storage that a persistent id describes, and what follows its five first fields.

    Raises:
      ConvertError: the id is not ("storage", type, key, location, length, ...).
    """
    if (
        type(pid) is not tuple
        or len(pid) != fields
        or pid[0] != "storage"
        or not isinstance(pid[1], np.dtype)
        or type(pid[2]) is not str
        or not _is_count(pid[4])
    ):
        raise ConvertError(f"{where}: refused to unpickle: {str(pid)[:200]} is no id of a storage")
    return Storage(pid[2], pid[1], pid[4]), pid[5:]


def source_tensor(name: str, view: View, place: Place) -> SourceTensor:
    """Returns the tensor at its place, mapped."""

    def read() -> np.ndarray:
        if 0 in view.shape:
            return np.empty(view.shape, view.dtype)
        size = view.dtype.itemsize
        start = place.offset + view.storage.start * view.storage.dtype.itemsize + view.offset * size
        strides = [stride * size for stride in view.strides]
        if not place.is_big_endian or size == 1:
            return np.ndarray(view.shape, view.dtype, place.buffer, start, strides)
        part = size // 2 if view.dtype.kind == "c" else size
        raw = np.ndarray(
            (*view.shape, size // part), f">u{part}", place.buffer, start, [*strides, part]
        )
        return raw.astype(f"<u{part}").view(view.dtype).reshape(view.shape)

    return SourceTensor(name, view.dtype.name, view.shape, read)


def _rebuild(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None
) -> View:
    if not isinstance(storage, Storage):
        raise ValueError("its storage is none")
    if not _is_count(offset) or not all(
        type(part) is tuple and all(map(_is_count, part)) for part in (shape, strides)
    ):
        raise ValueError("offset, shape and strides must be numbers of elements")
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise ValueError(f"{len(shape)} axes and {len(strides)} strides")
    dtype = storage.dtype if dtype is None else dtype
    if math.prod(shape) * dtype.itemsize > _MAX_BYTES:
        raise ValueError(f"shape {list(shape)} is too large")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError(
            f"element {last} of a storage of {storage.nbytes // dtype.itemsize} {dtype.name}"
        )
    if math.prod(shape) * dtype.itemsize > _MAX_OVERLAP * storage.nbytes:
        raise ValueError(f"an element is repeated until shape {list(shape)} is full")
    return View(storage, dtype, offset, shape, strides)


def _tensor_v1(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    return _rebuild(storage, offset, shape, strides)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, bits: Any = None
) -> View:
    if bits:
        raise ValueError("conjugate and negative views are not supported")
    return _rebuild(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    bits: Any = None,
) -> View:
    if bits or not isinstance(dtype, np.dtype):
        raise ValueError("expected a type, and no conjugate or negative view")
    return _rebuild(storage, offset, shape, strides, dtype)


def _parameter(view: Any, grad: Any, hooks: Any, state: Any = None) -> View:
    if not isinstance(view, View):
        raise ValueError("expected a tensor")
    return view


def _size(shape: Any = ()) -> tuple[int, ...]:
    if type(shape) is not tuple or not all(map(_is_count, shape)):
        raise ValueError("expected a tuple of sizes")
    return shape


def _device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str:
        raise ValueError("expected a name")
    return kind if index is None else f"{kind}:{index}"


def _ordered(pairs: Any = ()) -> dict[str, Any]:
    """Returns an ordered dict, made of nothing or of pairs; nothing but a name is hashed."""
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("expected pairs")
    if not all(type(name) is str for name, _ in pairs):
        raise ValueError("expected names as keys")
    return dict(pairs)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_BYTES


CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor_v1,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
"""All that such a pickle may call; data in, data out."""

CONSTANTS: Mapping[str, np.dtype] = {
    **{f"torch.{name}": dtype for name, dtype in (STORAGES | DTYPES).items()},
    **{f"torch.storage.{name}": dtype for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": UNTYPED,
    "torch.UntypedStorage": UNTYPED,
}
"""The classes and types that it may name."""
