"""GPT-2's kernels in int8: whole numbers from -127 to 127, and one float32 scale for each output channel.

A channel's scale is a 127th of its largest weight, rounded to float32, and at least the smallest normal number: XLA's
arithmetic has no smaller ones on a CPU. That of a channel of zeros is 1. A weight becomes the nearest multiple of its
scale, of two equally near the even one, so it moves by at most half a scale.
"""

from collections.abc import Callable, Iterator

import numpy as np

from convert.errors import ConvertError

KERNEL = ".kernel"
PARTS = (".values", ".scales")
"""What the names of kernels end in, and what a quantised one's two parts are called."""

_PART = 1 << 19  # weights rounded at a time, in float64


def values(weights: np.ndarray, outputs: int, name: str) -> Iterator[np.ndarray]:
    """Yields `weights` [*outputs, *inputs], which has so many output axes, in consecutive parts [rows, inputs].

    Raises:
      ConvertError: a weight of the tensor called `name` is no finite number.
    """

    def rounded(rows: np.ndarray) -> np.ndarray:
        multiples = np.rint(rows / _scales(rows, name)[:, None].astype(np.float64))
        return np.clip(multiples, -127, 127).astype(np.int8)

    return _in_rows(weights, outputs, rounded)


def scales(weights: np.ndarray, outputs: int, name: str) -> Iterator[np.ndarray]:
    """Yields the scales of what `values` yields, as float32 [rows]."""
    return _in_rows(weights, outputs, lambda rows: _scales(rows, name))


def _in_rows(
    weights: np.ndarray, outputs: int, make: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields what is made of the channels, a few at a time, each whole and in float64."""
    channels = weights.reshape(int(np.prod(weights.shape[:outputs])), -1)
    step = max(1, _PART // max(1, channels.shape[1]))
    for start in range(0, len(channels), step):
        yield make(np.ascontiguousarray(channels[start : start + step]).astype(np.float64))


def _scales(rows: np.ndarray, name: str) -> np.ndarray:
    largest = np.abs(rows).max(axis=1)
    if not np.isfinite(largest).all():
        raise ConvertError(
            f"{name}: a weight is not finite, so its channel cannot be written as int8"
        )
    least = np.finfo(np.float32).smallest_normal
    scale = np.maximum((largest / 127).astype(np.float32), least)
    return np.where(largest == 0, np.float32(1), scale)
