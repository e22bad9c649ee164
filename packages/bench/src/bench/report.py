"""What a run found, as a table on the terminal, JSON with every sample, Markdown and a plot.

All four are drawn from one `Report`; nothing is computed here that is not in results.json too.
"""

import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import comparison, gate, machine, plot, shapes
from bench.driver import Row
from bench.peers.contestants import OURS
from bench.workloads import Workload

COLUMNS = (
    "contestant",
    "median",
    "middle half",
    "flaxmill is",
    "limit",
    "memory",
    "first call",
    "agrees",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One run of the benchmark. `ceilings` and `versions` are by contestant; `date` is ISO 8601, UTC.

    `wall_s` is what each workload took in all, preparation included.
    """

    suite: str
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, dict[str, str]]
    ceilings: dict[str, dict[str, float]]
    rows: Sequence[Row]
    verdicts: Sequence[gate.Verdict]
    wall_s: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """What must make the command fail, a line each: disagreements, whatever of ours broke, the gate."""
        broken = [
            f"{row.workload.name}: {row.contestant} {row.status}: {row.reason}"
            for row in self.rows
            if row.status == "wrong" or (row.contestant == OURS and row.status == "failed")
        ]
        beyond = [
            f"{verdict.workload}: {verdict.found}, asked for {verdict.threshold.asked}"
            for verdict in self.verdicts
            if verdict.outcome == "failed"
        ]
        return broken + beyond

    @property
    def neighbours(self) -> float:
        """The largest share of the cores that others used during a workload."""
        return max((row.neighbours or 0.0 for row in self.rows), default=0.0)

    @property
    def is_busy(self) -> bool:
        return self.neighbours > machine.BUSY

    def ceiling(self, name: str) -> float | None:
        """Returns the best rate that anyone reached."""
        found = [rates[name] for rates in self.ceilings.values() if name in rates]
        return max(found, default=None)

    def speedup(self, row: Row) -> comparison.Spread | None:
        """Returns how many times as fast as this row's contestant we are; None where there is no such figure."""
        ours = next(
            (r for r in self.rows if r.workload == row.workload and r.contestant == OURS), None
        )
        if ours is None or row is ours or "measured" not in (ours.status, row.status):
            return None
        if ours.status != row.status:
            return None
        return comparison.speedup(ours.samples, row.samples)

    def share_of_limit(self, row: Row) -> float | None:
        """Returns the least time this machine needs for the workload as a share of the time taken."""
        flops = self.ceiling(f"gemm_{row.workload.precision}_flops_per_s")
        read = self.ceiling("read_bytes_per_s")
        if row.status != "measured" or not flops or not read:
            return None
        floor_s = row.workload.floor_s(flops_per_s=flops, bytes_per_s=read)
        return floor_s and floor_s / comparison.spread(row.samples).value

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 2,
            "suite": self.suite,
            "command": self.command,
            "date": self.date,
            "machine": self.machine,
            "versions": self.versions,
            "ceilings": self.ceilings,
            "wall_s": self.wall_s,
            "rows": [self._row(row) for row in self.rows],
            "gate": [dataclasses.asdict(verdict) for verdict in self.verdicts],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        speedup = self.speedup(row)
        return {
            **dataclasses.asdict(row),
            "unit": row.workload.unit,
            "counts": row.workload.counts,
            "figure": dataclasses.asdict(figure(row)) if row.turns else None,
            "speedup": dataclasses.asdict(speedup) if speedup else None,
            "share_of_limit": self.share_of_limit(row),
            "memory_bytes": row.memory_bytes,
        }


def figure(row: Row) -> comparison.Spread:
    """Returns the row's samples in the workload's unit."""
    return comparison.spread([row.workload.figure(s) for s in row.samples])


def write(report: Report, out: Path) -> list[Path]:
    """Writes results.json, results.md and the pictures to the folder `out`, and returns their paths.

    A picture that has nothing to show is left out, and an earlier one removed.
    """
    return [
        _replace(out / "results.json", _samples(report)),
        _replace(out / "results.md", markdown(report).encode()),
        _replace(out / "results.png", picture(report)),
        *_optional(out / "roofline.png", roofline(report)),
        *_optional(out / "latency.png", latency(report)),
    ]


def keep(report: Report, out: Path) -> None:
    """Writes results.json alone, and removes what was drawn of another state of it."""
    for name in ("results.md", "results.png", "roofline.png", "latency.png"):
        (out / name).unlink(missing_ok=True)
    _replace(out / "results.json", _samples(report))


def _samples(report: Report) -> bytes:
    results = json.dumps(report.to_dict(), indent=1) + "\n"
    # Thousands of samples: a list of numbers is one line.
    results = re.sub(r"\[[-+.\deE,\s]+\]", lambda m: " ".join(m[0].split()), results)
    return results.encode()


def _optional(path: Path, content: bytes | None) -> list[Path]:
    if content is None:
        path.unlink(missing_ok=True)
        return []
    return [_replace(path, content)]


def _replace(path: Path, content: bytes) -> Path:
    """Writes under another name first, so that a reader sees the old results or the new ones."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    return partial.replace(path)


def show(report: Report) -> None:
    """Prints the table, what did not run and why, and the gate's verdict to stdout."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(title=Text(_headline(report)), title_justify="left", header_style="bold")
    for i, name in enumerate(("workload", *COLUMNS)):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for workload, rows in _by_workload(report):
        for row in rows:
            cells = _cells(report, row)
            first = row is rows[0]
            table.add_row(
                workload.name if first else "",
                *(
                    Text(cell, style=_style(report, row, name))
                    for name, cell in zip(COLUMNS, cells, strict=True)
                ),
                end_section=row is rows[-1],
            )
    console.print(table)
    for line in _lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _style(report: Report, row: Row, column: str) -> str:
    if row.status != "measured":
        return "red" if row.status == "wrong" else "dim"
    speedup = report.speedup(row)
    if column == "flaxmill is" and speedup:
        # A colour only where every pair of turns says the same.
        return "green" if speedup.minimum > 1 else "red" if speedup.maximum < 1 else ""
    return "bold" if row.contestant == OURS and column in ("contestant", "median") else ""


def markdown(report: Report) -> str:
    """Returns the page that can be read without running anything."""
    lines = [
        f"# bench, suite {report.suite}",
        "",
        f"`{report.command}`, {report.date}",
        "",
        *(f"- {line}" for line in _circumstances(report)),
        "",
        "![How many times as fast as its peers flaxmill is](results.png)",
        *(["![What was reached of the limits](roofline.png)"] if _works(report) else []),
        *(["![Milliseconds by number of tokens](latency.png)"] if _latencies(report) else []),
        "",
        "| workload | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 1),
    ]
    for workload, rows in _by_workload(report):
        for row in rows:
            name = f"**{workload.name}**: {workload.counts}" if row is rows[0] else ""
            lines.append(" | ".join((f"| {name}", *_cells(report, row))) + " |")
    lines += [
        "",
        *(f"{line}  " for line in _lines(report)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def picture(report: Report) -> bytes:
    """Returns the plot as a PNG."""
    bars = [
        plot.Bar(row.workload.name, row.contestant, report.speedup(row), _absence(report, row))
        for row in report.rows
        if row.contestant != OURS
    ]
    subtitle = "\n".join((f"{report.command}, {report.date}", *_circumstances(report)))
    return plot.png("flaxmill and its peers", subtitle, bars)


def roofline(report: Report) -> bytes | None:
    """Returns the picture of work under the limits; None where nothing was measured that has some."""
    works = _works(report)
    rates = {p: report.ceiling(f"gemm_{p}_flops_per_s") for p in shapes.WEIGHT_BYTES}
    known = {precision: rate for precision, rate in rates.items() if rate}
    return plot.roofline(works, known, report.ceiling("read_bytes_per_s")) if works else None


def _works(report: Report) -> list[plot.Work]:
    works = []
    for row in report.rows:
        if report.share_of_limit(row) is None:
            continue
        phases = row.workload.phases()
        flops = sum(phase.times * phase.flops for phase in phases)
        read = sum(phase.times * phase.bytes for phase in phases)
        rate = flops / comparison.spread(row.samples).value
        name, precision = row.workload.name, row.workload.precision
        works.append(plot.Work(name, row.contestant, precision, flops / read, rate))
    return works


def latency(report: Report) -> bytes | None:
    """Returns the picture of times by length; None where nothing was measured at several lengths."""
    series = _latencies(report)
    return plot.latency(series) if series else None


def _latencies(report: Report) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Returns lengths and milliseconds by kind and model, and by contestant and precision, of several lengths each."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in report.rows:
        work = row.workload
        if work.kind in ("forward", "prefill") and row.turns:
            lines = series.setdefault(f"{work.kind}, {work.shape.name}", {})
            points = lines.setdefault(f"{row.contestant}, {work.precision}", [])
            points.append((work.length, figure(row).value))
    several = {
        title: {name: points for name, points in lines.items() if len(points) > 1}
        for title, lines in series.items()
    }
    return {title: lines for title, lines in several.items() if lines}


def _absence(report: Report, row: Row) -> str:
    """Says why `row` has no bar."""
    return row.status if row.status != "measured" else f"{OURS} has no figure"


def _by_workload(report: Report) -> list[tuple[Workload, list[Row]]]:
    workloads = dict.fromkeys(row.workload for row in report.rows)
    return [(w, [row for row in report.rows if row.workload == w]) for w in workloads]


def _cells(report: Report, row: Row) -> tuple[str, ...]:
    if row.status != "measured":
        return (row.contestant, row.status, *[""] * (len(COLUMNS) - 2))
    found, speedup = figure(row), report.speedup(row)
    share = report.share_of_limit(row)
    return (
        row.contestant,
        f"{_short(found.value)} {row.workload.unit}",
        f"{_short(found.low)}-{_short(found.high)}",
        f"{_times(speedup)} ({speedup.low:.2f}-{speedup.high:.2f})" if speedup else "",
        f"{share:.0%}" if share else "",
        f"{row.memory_bytes / 1e6:,.0f} MB" if row.memory_bytes is not None else "",
        f"{row.first_call_s:.2f} s" if row.first_call_s is not None else "",
        f"to {row.difference:.0e}"
        if row.difference
        else "exactly"
        if row.contestant != OURS
        else "",
    )


def _short(number: float) -> str:
    """Returns three significant digits, without an exponent.

    >>> _short(1234.5), _short(12.345), _short(0.012345)
    ('1,234', '12.3', '0.0123')
    """
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def _times(speedup: comparison.Spread | None) -> str:
    return f"{speedup.value:.2f}x" if speedup else ""


def _headline(report: Report) -> str:
    return f"{report.command}\n" + "\n".join(_circumstances(report))


def _circumstances(report: Report) -> list[str]:
    facts = report.machine
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads for everyone, {facts['memory_gib']:g} GiB, "
        f"{facts['system']}, Python {facts['python']}",
        ", ".join(f"{name} {version}" for name, version in _versions(report).items()),
    ]
    if report.is_busy:
        lines.append(
            f"THE MACHINE WAS BUSY: others used up to {report.neighbours:.0%} of its cores meanwhile, "
            "so figures and ratios are not to be trusted"
        )
    return [line for line in lines if line]


def _versions(report: Report) -> dict[str, str]:
    return {name: version for found in report.versions.values() for name, version in found.items()}


def _lines(report: Report) -> list[str]:
    """Returns what stands below the table."""
    told = (_limits(report), _processes(report), _remarks(report), _verdict(report), _walls(report))
    return [line for lines in told for line in lines]


def _walls(report: Report) -> list[str]:
    if not report.wall_s:
        return []
    longest = sorted(report.wall_s.items(), key=lambda item: -item[1])[:3]
    told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in longest)
    return [f"took {sum(report.wall_s.values()) / 60:.1f} minutes; the longest: {told}"]


def _processes(report: Report) -> list[str]:
    """Returns what is known of work in processes of its own beyond the table: whole commands, sharing, the cache."""
    lines = []
    for workload, rows in _by_workload(report):
        whole = {
            row.contestant: statistics.median(usage.command_s for usage in row.usages)
            for row in rows
            if row.usages
        }
        if whole:
            told = [
                f"{name} {_short(seconds)} s"
                + (f" ({seconds / whole[OURS]:.2f}x)" if name != OURS and OURS in whole else "")
                for name, seconds in whole.items()
            ]
            lines.append(f"{workload.name}, interpreter and imports included: {', '.join(told)}")
        lines += [
            f"{workload.name}: {row.contestant} has {_short(row.shared.alone_bytes / 1e6)} MB of it alone, "
            f"{_short(row.shared.together_bytes / 1e6)} MB in each of two processes"
            for row in rows
            if row.shared
        ]
        lines += [
            f"{workload.name}: {row.contestant}: {', '.join(_told(row))}"
            for row in rows
            if _told(row)
        ]
        lines += [
            f"{workload.name}: {row.contestant} had {_short(read / 1e9)} GB from the disk, not from the cache"
            for row in rows
            if (read := max((u.disk_bytes for u in row.usages), default=0))
            > workload.source_bytes / 50
        ]
    return lines


def _told(row: Row) -> list[str]:
    """Returns what is known of a row beyond its figure: parts of its time, and facts."""
    parts = [usage.parts_s for usage in row.usages]
    names = dict.fromkeys(name for part in parts for name in part)
    medians = {name: statistics.median(part[name] for part in parts) for name in names}
    told = [f"{name} {_short(seconds)} s" for name, seconds in medians.items()]
    if "prompt" in medians:
        told.append(f"prompt at {_short(row.workload.length / medians['prompt'])} tokens/s")
    if row.workload.kind == "giant" and row.turns:
        told.append(f"{_short(1 / figure(row).value)} s a token")
    for name, value in row.facts.items():
        if name == "slot_utilisation":
            told.append(f"slots in use {value:.1%} of the time")
        elif name == "rows_that_differ" and value:
            told.append(f"{value:.0f} of its rows go another way where tokens are level")
    return told


def _limits(report: Report) -> list[str]:
    """Returns the highest rates that were measured, and who reached them in products."""
    parts = []
    for precision, unit in (("float32", "GFLOP/s"), ("bfloat16", "GFLOP/s"), ("int8", "GOP/s")):
        name = f"gemm_{precision}_flops_per_s"
        rates = {who: r[name] for who, r in report.ceilings.items() if name in r}
        if rates:
            told = ", ".join(f"{who} {rate / 1e9:,.0f}" for who, rate in rates.items())
            parts.append(f"{precision} products {told} {unit}")
    for name, threads in (("read_1_thread_bytes_per_s", "one thread"), ("read_bytes_per_s", "all")):
        if rate := report.ceiling(name):
            parts.append(f"{rate / 1e9:.0f} GB/s from memory with {threads}")
    return [f"limits measured in this run: {'; '.join(parts)}"] if parts else []


def _remarks(report: Report) -> list[str]:
    """Returns a line for each reason why a contestant has no figures, with the workloads it holds for."""
    workloads: dict[tuple[str, str, str], list[str]] = {}
    for row in report.rows:
        if row.status != "measured":
            workloads.setdefault((row.contestant, row.status, row.reason), []).append(
                row.workload.name
            )
    return [
        f"{contestant} {status}: {reason} [{', '.join(names)}]"
        for (contestant, status, reason), names in workloads.items()
    ]


def _verdict(report: Report) -> list[str]:
    outcomes = [verdict.outcome for verdict in report.verdicts]
    counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    if not counts:
        return []
    busy = " on a busy machine; run it again on a quiet one" if report.is_busy else ""
    outcome_counts = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    lines = [f"gate: {outcome_counts}{busy}"]
    for verdict in report.verdicts:
        if verdict.outcome == "not judged":
            lines.append(f"gate: {verdict.workload} not judged: {verdict.reason}")
        elif verdict.outcome != "passed":
            lines.append(
                f"gate: {verdict.workload} {verdict.outcome}: {verdict.found}, "
                f"asked for {verdict.threshold.asked}"
            )
    return lines
