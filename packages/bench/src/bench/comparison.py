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
# Of the root mean square of the differences to that of the numbers themselves, where fewer bits are computed with.
RELATIVE_TOLERANCE = {"bfloat16": 0.25, "int8": 0.5}
# How far below the best token's logit a greedy choice may lie, in standard deviations of the logits: what rounding
# can do (llama.cpp has GELU from a table in float16: 0.0017 in its float32; transformers in bfloat16: 0.28), and no
# wrong model: a token taken at random lies four below, and one such is enough.
SHORTFALL = {"float32": 0.02, "bfloat16": 1.0, "int8": 2.0}


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


def agreement(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], precision: str = "float32"
) -> Agreement:
    """Compares what two contestants computed, as far as both did: integers exactly, floats to `TOLERANCE`.

    At a precision below float32, floats are compared as a whole, by `RELATIVE_TOLERANCE`.
    """
    common = [name for name in ours if name in theirs]
    if not common:
        return Agreement(math.inf, f"computed {sorted(theirs)} instead of {sorted(ours)}")
    worst = 0.0
    for name in common:
        a, b = _flat(ours[name]), _flat(theirs[name])
        if len(a) != len(b):
            return Agreement(math.inf, f"{name}: {len(b)} values instead of {len(a)}")
        is_rounded = precision in RELATIVE_TOLERANCE and any(isinstance(x, float) for x in a)
        found = _rounded(name, a, b, precision) if is_rounded else _numbers(name, a, b)
        if found.complaint:
            return found
        worst = max(worst, found.difference)
    return Agreement(worst)


def _numbers(name: str, a: Sequence[float], b: Sequence[float]) -> Agreement:
    worst = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        difference = abs(x - y)
        exact = isinstance(x, int) and isinstance(y, int)
        # Not `difference > tolerance`: a NaN must not pass.
        if not difference <= (0 if exact else TOLERANCE):
            return Agreement(difference, f"{name}[{i}] is {y:.6g} instead of {x:.6g}")
        worst = max(worst, float(difference))
    return Agreement(worst)


def _rounded(name: str, a: Sequence[float], b: Sequence[float], precision: str) -> Agreement:
    off = math.hypot(*(x - y for x, y in zip(a, b, strict=True))) / math.hypot(*a)
    if not off <= RELATIVE_TOLERANCE[precision]:
        return Agreement(off, f"{name} are off by {off:.2g} of their size")
    return Agreement(off)


def judged(shortfalls: Sequence[float], precision: str) -> Agreement:
    """Returns whether greedy tokens are this model's, by how far each lies below the best in float32.

    Two that round differently may choose differently where two tokens are close, and go different ways from there.
    """
    worst = math.nan if any(map(math.isnan, shortfalls)) else max(shortfalls)
    if not worst <= SHORTFALL[precision]:
        return Agreement(worst, f"a token lies {worst:.2g} deviations below the likeliest one")
    return Agreement(worst)


def _flat(values: Any) -> list[float]:
    if isinstance(values, Sequence):
        return [x for value in values for x in _flat(value)]
    return [values]
