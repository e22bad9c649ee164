"""Two runs of the benchmark beside each other, with a verdict for each row that noise alone cannot turn.

What a machine does differently from one day to the next hits peers too, so ratios to peers are compared where both runs
have them; where no peer was measured, our own figures are, which is fair on one and the same quiet machine only.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.peers.contestants import OURS
from core.errors import FlaxmillError

# Below this nobody cares, however certain it is.
LEAST_CHANGE = 0.02

Outcome = Literal["faster", "slower", "same", "gone", "new"]
COLOURS: dict[Outcome, str] = {"faster": "green", "slower": "red", "gone": "red"}


class CompareError(FlaxmillError):
    """A file that holds no results of the benchmark."""


@dataclasses.dataclass(frozen=True)
class Range:
    """A figure with the middle half of its samples."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Change:
    """What became of one of our workloads: `before` and `after` are ratios to `against`, or our own figures (None).

    "same": the middle halves of the samples overlap, or the medians are within two per cent.
    """

    workload: str
    against: str | None
    before: Range | None
    after: Range | None
    outcome: Outcome

    @property
    def factor(self) -> float | None:
        """How many times as fast as before; None where there is nothing to compare."""
        if self.before is None or self.after is None:
            return None
        return self.after.value / self.before.value


def read(path: Path) -> dict[str, Any]:
    """Returns the results in a results.json.

    Raises:
      CompareError: it is none.
    """
    try:
        found = json.loads(path.read_text())
        _figures(found)
        _title(found, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        kind = type(error).__name__
        raise CompareError(
            f"{path} is no results.json of the benchmark ({kind}: {error})"
        ) from error
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Returns what changed, workload by workload and peer by peer, in the order of the second run."""
    old, new = _figures(before), _figures(after)
    compared = {name for name, against in old.keys() & new.keys() if against}
    found = []
    for name, against in dict.fromkeys([*new, *old]):
        if against is None and name in compared:
            continue  # ratios say more
        key = (name, against)
        found.append(_change(key, old.get(key), new.get(key)))
    return found


def _change(key: tuple[str, str | None], old: Range | None, new: Range | None) -> Change:
    if old is None or new is None:
        return Change(*key, old, new, "new" if old is None else "gone")
    outcome: Outcome = "same"
    if new.low > old.high and new.value > old.value * (1 + LEAST_CHANGE):
        outcome = "faster"
    if new.high < old.low and new.value < old.value * (1 - LEAST_CHANGE):
        outcome = "slower"
    return Change(*key, old, new, outcome)


def _figures(results: Mapping[str, Any]) -> dict[tuple[str, str | None], Range]:
    """Returns our ratio to each peer and our own figure, the larger the better, by workload and peer."""
    found: dict[tuple[str, str | None], Range] = {}
    for row in results["rows"]:
        name, who, figure = row["workload"]["name"], row["contestant"], row["figure"]
        if who != OURS and row["speedup"]:
            found[name, who] = _range(row["speedup"])
        elif who == OURS and figure:
            own = _range(figure)
            if not row["unit"].endswith("/s"):  # of seconds, fewer are better
                own = Range(1 / own.value, 1 / own.high, 1 / own.low)
            found[name, None] = own
    return found


def _range(spread: Mapping[str, float]) -> Range:
    found = Range(*(float(spread[name]) for name in ("value", "low", "high")))
    if not all(0 < x < math.inf for x in (found.low, found.value, found.high)):
        raise ValueError(f"{found} is no speed")
    return found


def show(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Prints a table of the changes to stdout, and how many there are of each kind."""
    console = Console(width=None if Console().is_terminal else 130)
    found = changes(before, after)
    title = Text(_title(before, after))
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(("workload", "against", "before", "after", "now", "verdict")):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for change in found:
        factor = f"{change.factor:.2f}x" if change.factor else ""
        told = (_told(change, change.before), _told(change, change.after))
        verdict = f"[{COLOURS.get(change.outcome, 'default')}]{change.outcome}"
        names = Text(change.workload), Text(change.against or "(itself)")
        table.add_row(*names, *told, factor, verdict)
    console.print(table)
    outcomes = [change.outcome for change in found]
    counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "nothing")


def _title(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    lines = [f"{r['command']}, {r['date']}, {r['machine']['cpu']}" for r in (before, after)]
    if before["machine"]["cpu"] != after["machine"]["cpu"]:
        lines.append("Not the same processor: a ratio may have changed because of that.")
    return "\n".join(lines)


def _told(change: Change, found: Range | None) -> str:
    if found is None or change.against is None:
        return ""  # the inverse of seconds would be strange to read; `now` says it
    return f"{found.value:.2f}x ({found.low:.2f}-{found.high:.2f})"


def run(paths: Sequence[str]) -> None:
    """Compares the results in two files."""
    before, after = (read(Path(path)) for path in paths)
    show(before, after)
