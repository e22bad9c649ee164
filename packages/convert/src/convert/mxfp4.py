"""MXFP4, as GPT-OSS's experts are stored: blocks of 32 four-bit numbers that share a power of two (OCP MX v1.0).

A byte holds two neighbours of the contracted axis, the first in its low nibble. A code is E2M1 (sign, two bits of
exponent, one of significand), a scale byte s stands for 2^(s-127). Their product has two significant bits, so bfloat16
holds it exactly wherever it does not overflow.
"""

import functools
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from convert.errors import ConvertError

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes stand for."""

KERNELS = ("moe.gate_up.kernel", "moe.down.kernel")
PARTS = (".blocks", ".scales")
"""What the names of packable kernels end in, and what a packed one's two parts are called."""

_NAN = 255  # the one scale that stands for no number; no encoder writes it
_OVERFLOWS = 253  # from this scale on the largest codes are beyond bfloat16 and float32
_PART = 1 << 21  # numbers decoded at a time: index, pairs and result stay in the cache


@functools.cache
def table() -> np.ndarray:
    """Returns, for every scale * 256 + byte, the bits of two bfloat16s: the low nibble's in the low half.

    65,536 entries: looking up a pair is four times as fast as looking up codes and multiplying.
    """
    scales, bytes_ = np.arange(256)[:, None], np.arange(256)
    with np.errstate(over="ignore"):
        values = np.ldexp(np.array(CODES), scales - 127).astype(ml_dtypes.bfloat16)
    bits = values.view(np.uint16).astype(np.uint32)
    return (bits[:, bytes_ & 15] | bits[:, bytes_ >> 4] << 16).reshape(-1)


def unpack(blocks: np.ndarray, scales: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Yields the kernel that `blocks` [E, ..., G, 16] and `scales` [E, ..., G] hold, as bfloat16 [E, 32 * G, ...].

    It comes in consecutive parts [rows, ...] of a few megabytes; an expert is never held whole.

    Raises:
      ConvertError: a scale of the tensor called `name` is no number, or makes one that bfloat16 cannot hold.
    """
    E, G, shape = len(blocks), blocks.shape[-2], scales.shape
    blocks, scales = blocks.reshape(E, -1, G, 16), scales.reshape(E, -1, G)
    step = max(1, _PART // (32 * max(1, blocks.shape[1])))
    for expert in range(E):
        _check(scales[expert], name, shape, expert * scales[expert].size)
        for g in range(0, G, step):
            part = slice(g, g + step)
            yield _unpacked(blocks[expert, :, part], scales[expert, :, part], name)


def checked(parts: Iterable[np.ndarray], name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields the consecutive parts of a tensor of scales as they are.

    Raises:
      ConvertError: one of them stands for no number.
    """
    offset = 0
    for part in parts:
        _check(part, name, shape, offset)
        offset += part.size
        yield part


def _unpacked(blocks_OGY: np.ndarray, scales_OG: np.ndarray, name: str) -> np.ndarray:
    """Returns [32 * G, O] in bfloat16. Bytes are transposed, not numbers: they are a quarter of the size."""
    O, G, Y = blocks_OGY.shape
    bytes_GYO = np.ascontiguousarray(blocks_OGY.reshape(O, G * Y).T).reshape(G, Y, O)
    scales_GO = np.ascontiguousarray(scales_OG.T).astype(np.uint16) << 8
    pairs_GYO = table()[scales_GO[:, None] | bytes_GYO]
    bits = np.empty((G, Y, 2, O), np.uint16)
    bits[:, :, 0] = pairs_GYO
    bits[:, :, 1] = pairs_GYO >> 16
    values = bits.reshape(32 * G, O).view(ml_dtypes.bfloat16)
    if (largest := scales_OG.max(initial=0)) >= _OVERFLOWS and np.isinf(values).any():
        raise ConvertError(
            f"{name}: with a scale byte of {largest} a number does not fit in bfloat16; keep the experts mxfp4"
        )
    return values


def _check(scales: np.ndarray, name: str, shape: tuple[int, ...], offset: int) -> None:
    """Refuses the scale 255 among `scales`, which begin at `offset` of a tensor of `shape`."""
    if scales.max(initial=0) == _NAN:
        place = np.unravel_index(offset + int(np.argmax(scales == _NAN)), shape)
        raise ConvertError(
            f"{name}: the scale at {[int(i) for i in place]} is 255, which stands for no number; "
            "the file is damaged, copy or download it again"
        )
