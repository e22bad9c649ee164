"""The header of a .npy array: what lies behind it, and where.

numpy's own reader evaluates the header as a Python literal; this takes the one form that arrays of numbers have.
"""

import dataclasses
import math
import re

import ml_dtypes
import numpy as np

from convert.errors import ConvertError

DTYPES: dict[str, np.dtype] = {
    "|b1": np.dtype(bool),
    "|u1": np.dtype("u1"),
    "|i1": np.dtype("i1"),
    "<u2": np.dtype("<u2"),
    "<i2": np.dtype("<i2"),
    "<u4": np.dtype("<u4"),
    "<i4": np.dtype("<i4"),
    "<u8": np.dtype("<u8"),
    "<i8": np.dtype("<i8"),
    "<f2": np.dtype("<f2"),
    "<f4": np.dtype("<f4"),
    "<f8": np.dtype("<f8"),
    # numpy has no bfloat16 and saves ml_dtypes' as two bytes of nothing; no other type of two bytes is saved so.
    "|V2": np.dtype(ml_dtypes.bfloat16),
    "<V2": np.dtype(ml_dtypes.bfloat16),
}
"""numpy's codes of types."""

HEADER_BYTES = 12 + (1 << 14)
"""As much of a file as a header is looked for in; numpy itself takes 10,000 bytes."""

_HEADER = re.compile(
    rb"\{'descr': ('[^']{1,20}'|\[.*\]), 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18},? ?){0,32})\), ?\} *\n?",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Header:
    """The array's data begin `size` bytes into the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    size: int
    descr: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(start: bytes, where: str) -> Header:
    """Returns the header at the start of a .npy file, of which `start` is the first `HEADER_BYTES` or fewer.

    Raises:
      ConvertError: it is damaged, or no array of numbers; `where` says of what it is the header.
    """
    width = {b"\x01\x00": 2, b"\x02\x00": 4}.get(start[6:8])
    if start[:6] != b"\x93NUMPY" or width is None:
        raise ConvertError(
            f"{where}: begins with {start[:8]!r}; expected a .npy array, version 1 or 2"
        )
    begin = 8 + width
    size = begin + int.from_bytes(start[8:begin], "little")
    found = _HEADER.fullmatch(start[begin:size])
    if len(start) < size or found is None:
        raise ConvertError(f"{where}: the .npy header {start[begin:][:60]!r} cannot be read")
    descr = found[1].decode("latin-1").strip("'")
    if descr.lstrip("|<>=").startswith("O"):
        raise ConvertError(
            f"{where}: holds Python objects, which are pickled and could run code; save arrays of numbers"
        )
    if descr not in DTYPES:
        raise ConvertError(f"{where}: has type {descr[:60]}; known are {', '.join(DTYPES)}")
    shape = tuple(int(length) for length in re.findall(rb"\d+", found[3]))
    return Header(DTYPES[descr], shape, found[2] == b"True", size, descr)


def view(buffer, header: Header, offset: int) -> np.ndarray:
    """Returns the array whose data begin at `offset` of `buffer`."""
    order = "F" if header.is_fortran else "C"
    return np.ndarray(header.shape, header.dtype, buffer=buffer, offset=offset, order=order)
