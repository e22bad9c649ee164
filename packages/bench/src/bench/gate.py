"""The gate: thresholds on ratios, and a verdict that noise alone cannot turn.

Knows numbers and names; it neither measures nor prints.
"""

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bench import comparison
from bench.driver import Row
from bench.peers.contestants import OURS
from bench.workloads import SUITES
from core.errors import FlaxmillError

THRESHOLDS = Path(__file__).with_name("gate.toml")

Outcome = Literal["passed", "unclear", "failed", "not judged"]


class GateError(FlaxmillError):
    """A file of thresholds that cannot be meant as it stands."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """On workloads whose whole name matches, we are `at_least` this many times as fast as `against`."""

    workload: str
    against: str
    at_least: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a threshold says of a workload. Only "failed" breaks the gate.

    "unclear": the median is below the threshold, but not every pair of turns is.
    """

    workload: str
    threshold: Threshold
    outcome: Outcome
    speedup: comparison.Spread | None = None
    reason: str = ""


def load(path: Path = THRESHOLDS) -> tuple[Threshold, ...]:
    """Reads the thresholds; one that matches no declared workload is an error, for it would guard nothing."""
    try:
        entries = tomllib.loads(path.read_text())["threshold"]
        thresholds = tuple(Threshold(**entry) for entry in entries)
        names = {workload.name for suite in SUITES.values() for workload in suite}
        idle = [
            t.workload for t in thresholds if not any(re.fullmatch(t.workload, n) for n in names)
        ]
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, re.error) as error:
        raise GateError(f"{path}: {error}") from error
    if idle:
        raise GateError(f"{path}: no workload is called {', '.join(map(repr, idle))}")
    return thresholds


def judge(rows: Sequence[Row], thresholds: Sequence[Threshold]) -> list[Verdict]:
    """Returns a verdict for each workload in `rows` that a threshold speaks of."""
    by_name = {(row.workload.name, row.contestant): row for row in rows}
    return [
        _verdict(name, threshold, by_name)
        for name in dict.fromkeys(row.workload.name for row in rows)
        for threshold in thresholds
        if re.fullmatch(threshold.workload, name)
    ]


def _verdict(name: str, threshold: Threshold, rows: dict[tuple[str, str], Row]) -> Verdict:
    ours, theirs = rows.get((name, OURS)), rows.get((name, threshold.against))
    for contestant, row in ((OURS, ours), (threshold.against, theirs)):
        if row is None or row.status != "measured":
            reason = f"{contestant}: {row.status}" if row else f"{contestant} does not take part"
            return Verdict(name, threshold, "not judged", reason=reason)
    assert ours is not None
    assert theirs is not None
    found = comparison.speedup(ours.samples, theirs.samples)
    if found.value >= threshold.at_least:
        outcome = "passed"
    else:
        outcome = "failed" if found.maximum < threshold.at_least else "unclear"
    return Verdict(name, threshold, outcome, speedup=found)
