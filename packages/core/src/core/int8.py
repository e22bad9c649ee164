"""Rounding weights to int8: whole numbers from -127 to 127, and one float32 scale for each output channel.

A channel's scale is a 127th of its largest weight, rounded to float32, and at least the smallest normal number: XLA's
arithmetic has no smaller ones on a CPU. That of a channel of zeros is 1. A weight becomes the nearest multiple of its
scale, of two equally near the even one, so it moves by at most half a scale.
"""

from collections.abc import Iterator

import numpy as np

_PART = 1 << 19  # weights at a time, in float64


class NotFinite(ValueError):
    """A weight is infinite or no number, so that its channel has no scale."""


def channels(weights: np.ndarray, outputs: int) -> Iterator[np.ndarray]:
    """Yields the channels of `weights` [*outputs, *inputs], which has so many output axes: [rows, inputs] in float64.

    A few rows at a time, each whole.
    """
    matrix = weights.reshape(int(np.prod(weights.shape[:outputs])), -1)
    step = max(1, _PART // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield np.ascontiguousarray(matrix[start : start + step]).astype(np.float64)


def scales(rows: np.ndarray) -> np.ndarray:
    """Returns the scales of `rows`, channels in float64.

    Raises:
      NotFinite: a weight is infinite or no number.
    """
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    if not np.isfinite(largest).all():
        raise NotFinite("a weight is not finite")
    least = np.finfo(np.float32).smallest_normal
    scale = np.maximum((largest / 127).astype(np.float32), least)
    return np.where(largest == 0, np.float32(1), scale)


def values(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the multiples of `scales` that are nearest to `rows`."""
    multiples = np.rint(rows / scales[:, None].astype(np.float64))
    return np.clip(multiples, -127, 127).astype(np.int8)
