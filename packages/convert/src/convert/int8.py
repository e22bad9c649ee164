"""GPT-2's kernels in int8, as `core.int8` rounds them, in the parts in which a model folder is written."""

from collections.abc import Callable, Iterator

import numpy as np

from convert.errors import ConvertError
from core import int8

KERNEL = ".kernel"
PARTS = (".values", ".scales")
"""What the names of kernels end in, and what a quantised one's two parts are called."""


def values(weights: np.ndarray, outputs: int, name: str) -> Iterator[np.ndarray]:
    """Yields `weights` [*outputs, *inputs], which has so many output axes, in consecutive parts [rows, inputs].

    Raises:
      ConvertError: a weight of the tensor called `name` is no finite number.
    """
    return _made(weights, outputs, name, lambda rows: int8.values(rows, int8.scales(rows)))


def scales(weights: np.ndarray, outputs: int, name: str) -> Iterator[np.ndarray]:
    """Yields the scales of what `values` yields, as float32 [rows]."""
    return _made(weights, outputs, name, int8.scales)


def _made(
    weights: np.ndarray, outputs: int, name: str, make: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    try:
        for rows in int8.channels(weights, outputs):
            yield make(rows)
    except int8.NotFinite as error:
        raise ConvertError(f"{name}: {error}, so its channel cannot be written as int8") from error
