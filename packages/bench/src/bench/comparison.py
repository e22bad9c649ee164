"""What samples say: medians with their spread, ratios taken pairwise, and whether two contestants agree.

Contestants take turns, so the i-th samples of two of them were taken side by side: a slow minute of the machine hits
both, and their quotient knows less of it than either.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Spread:
    """A central value with the middle half (`low` to `high`) and the extremes of what it summarises."""

    value: float
    low: float
    high: float
    minimum: float
    maximum: float


def spread(samples: Sequence[float]) -> Spread:
    """Returns the median of `samples` with its quartiles and extremes.

    >>> spread([1.0, 2.0, 3.0, 4.0, 10.0])
    Spread(value=3.0, low=2.0, high=4.0, minimum=1.0, maximum=10.0)
    """
    low, high = _quartiles(samples)
    return Spread(statistics.median(samples), low, high, min(samples), max(samples))


def speedup(ours_s: Sequence[float], theirs_s: Sequence[float]) -> Spread:
    """Returns how many times as fast we are, turn by turn: the median of the pairwise ratios with its spread.

    >>> speedup([1.0, 1.0, 2.0], [2.0, 3.0, 5.0])
    Spread(value=2.5, low=2.25, high=2.75, minimum=2.0, maximum=3.0)
    """
    return spread([theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)])


def _quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The largest difference between two contestants' outputs, and the complaint when they are not the same thing."""

    difference: float
    complaint: str = ""


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Agreement:
    """Compares what two contestants computed: integers exactly, floats to `TOLERANCE`."""
    if ours.keys() != theirs.keys():
        return Agreement(math.inf, f"computed {sorted(theirs)} instead of {sorted(ours)}")
    worst = 0.0
    for name in ours:
        a, b = _flat(ours[name]), _flat(theirs[name])
        if len(a) != len(b):
            return Agreement(math.inf, f"{name}: {len(b)} values instead of {len(a)}")
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            difference = abs(x - y)
            exact = isinstance(x, int) and isinstance(y, int)
            # Not `difference > tolerance`: a NaN must not pass.
            if not difference <= (0 if exact else TOLERANCE):
                return Agreement(difference, f"{name}[{i}] is {y:.6g} instead of {x:.6g}")
            worst = max(worst, float(difference))
    return Agreement(worst)


def _flat(values: Any) -> list[float]:
    if isinstance(values, Sequence):
        return [x for value in values for x in _flat(value)]
    return [values]
