"""The gate: thresholds on ratios, with a verdict that noise alone cannot turn, and limits on memory.

Knows numbers and names; it neither measures nor prints.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from bench import comparison
from bench.driver import Row
from bench.peers.contestants import OURS, TORCH
from bench.workloads import SUITES
from core.errors import FlaxmillError

THRESHOLDS = Path(__file__).with_name("gate.toml")

MOST_LEAD = 2.2  # what was ever measured; more is a disturbed peak of PyTorch's
LEAD_DOUBT = (
    1.2  # a lead is one ratio of two peaks, and either may have been disturbed as much as this
)

_PRODUCTS = "gemm_float32_flops_per_s"

Outcome = Literal["passed", "unclear", "failed", "not judged"]


class GateError(FlaxmillError):
    """A file of thresholds that cannot be meant as it stands."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """On workloads whose whole name matches, we are `at_least` this many times as fast as `against`.

    And at least `of_lead` times as many as our float32 products are faster than PyTorch's on this machine: they are
    twice as fast on some processors, and level on others.
    """

    workload: str
    against: str
    at_least: float
    of_lead: float = 0.0

    def on(self, lead: float) -> "Threshold":
        """Returns the threshold on a machine where our products are so many times as fast as PyTorch's."""
        return dataclasses.replace(self, at_least=max(self.at_least, self.of_lead * lead))

    @property
    def asked(self) -> str:
        return f"at least {self.at_least:.3g}x of {self.against}"


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """On workloads whose whole name matches, we add at most so much to our process's anonymous memory."""

    workload: str
    at_most_mb: float

    @property
    def asked(self) -> str:
        return f"at most {self.at_most_mb:g} MB of memory"


@dataclasses.dataclass(frozen=True)
class ShareLimit:
    """On workloads whose whole name matches, of two processes each has at most this share of what one has alone."""

    workload: str
    at_most: float

    @property
    def asked(self) -> str:
        return f"at most {self.at_most:.0%} of the memory in each of two processes"


Rule = Threshold | MemoryLimit | ShareLimit


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a rule says of a workload. Only "failed" breaks the gate.

    "unclear": the median is below the threshold, but some pair of turns is not, or would not be if our lead in products
    were `LEAD_DOUBT` times smaller. `found` is what was measured, in words; `reason` why there was nothing to judge.
    """

    workload: str
    threshold: Rule
    outcome: Outcome
    speedup: comparison.Spread | None = None
    found: str = ""
    reason: str = ""


_SECTIONS: dict[str, type[Rule]] = {
    "threshold": Threshold,
    "memory": MemoryLimit,
    "shared": ShareLimit,
}


def load(path: Path = THRESHOLDS) -> tuple[Rule, ...]:
    """Reads the rules; one that matches no declared workload is an error, for it would guard nothing."""
    try:
        sections = tomllib.loads(path.read_text())
        thresholds = tuple(
            _SECTIONS[section](**entry) for section, rules in sections.items() for entry in rules
        )
        names = {workload.name for suite in SUITES.values() for workload in suite}
        idle = [
            t.workload for t in thresholds if not any(re.fullmatch(t.workload, n) for n in names)
        ]
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, re.error) as error:
        raise GateError(f"{path}: {error}") from error
    if idle:
        raise GateError(f"{path}: no workload is called {', '.join(map(repr, idle))}")
    return thresholds


def judge(
    rows: Sequence[Row],
    thresholds: Sequence[Rule],
    ceilings: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Verdict]:
    """Returns a verdict for each workload in `rows` that a rule speaks of, if its peer was not left out on purpose.

    `ceilings` are the rates that contestants reached in the run; where products of both were not measured, thresholds
    ask for no lead, and never for more than `MOST_LEAD`.
    """
    lead = _lead(ceilings or {})
    by_name = {(row.workload.name, row.contestant): row for row in rows}
    workloads = {row.workload.name: row.workload for row in rows}
    return [
        _verdict(name, threshold, by_name, lead)
        for name, workload in workloads.items()
        for threshold in thresholds
        if re.fullmatch(threshold.workload, name)
        and getattr(threshold, "against", OURS) not in workload.without
    ]


def _lead(ceilings: Mapping[str, Mapping[str, float]]) -> float:
    ours, theirs = (ceilings.get(name, {}).get(_PRODUCTS) for name in (OURS, TORCH))
    return min(ours / theirs, MOST_LEAD) if ours and theirs else 0.0


def _verdict(name: str, rule: Rule, rows: dict[tuple[str, str], Row], lead: float) -> Verdict:
    surely = 0.0
    contestants = [OURS]
    if isinstance(rule, Threshold):
        surely = rule.on(lead / LEAD_DOUBT).at_least
        rule = rule.on(lead)
        contestants.append(rule.against)
    measured = []
    for contestant in contestants:
        row = rows.get((name, contestant))
        if row is None or row.status != "measured":
            reason = f"{contestant}: {row.status}" if row else f"{contestant} does not take part"
            return Verdict(name, rule, "not judged", reason=reason)
        measured.append(row)
    match rule:
        case Threshold():
            return _speed(name, rule, surely, *measured)
        case MemoryLimit():
            used = measured[0].memory_bytes
            found = None if used is None else f"{used / 1e6:.0f} MB of memory"
            return _amount(name, rule, found, used is not None and used <= 1e6 * rule.at_most_mb)
        case ShareLimit():
            shared = measured[0].shared
            found = None if shared is None else f"{shared.share:.0%} in each of two processes"
            return _amount(name, rule, found, shared is not None and shared.share <= rule.at_most)


def _speed(name: str, threshold: Threshold, surely: float, ours: Row, theirs: Row) -> Verdict:
    speedup = comparison.speedup(ours.samples, theirs.samples)
    outcome = "failed" if speedup.maximum < surely else "unclear"
    if speedup.value >= threshold.at_least:
        outcome = "passed"
    found = f"{speedup.value:.2f}x ({speedup.minimum:.2f}-{speedup.maximum:.2f})"
    return Verdict(name, threshold, outcome, speedup=speedup, found=found)


def _amount(name: str, limit: Rule, found: str | None, is_within: bool) -> Verdict:
    if found is None:
        return Verdict(name, limit, "not judged", reason="this system does not tell it")
    return Verdict(name, limit, "passed" if is_within else "failed", found=found)
