"""One run of the benchmark from the choice of workloads to the files in the output folder."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import driver, earlier, gate, machine, report
from bench.driver import Field, Row
from bench.peers.contestants import Contestant, contestants, environment
from bench.peers.process import WorkerError
from bench.workloads import SUITES, Workload
from core.errors import FlaxmillError


class BenchError(FlaxmillError):
    """The benchmark cannot begin, or found what must fail it; the text says what."""


def run(
    workloads: Sequence[Workload],
    *,
    suite: str,
    command: str,
    date: str,
    out: Path,
    keep: bool = False,
    resume: bool = False,
    minutes: float | None = None,
) -> tuple[list[str], list[Path]]:
    """Measures, prints the table to stdout and writes the results to `out`, results.json after every workload.

    With `keep` the checkpoints that are made for it stay in `out`/checkpoints, for the next run that keeps them. With
    `resume` the results in `out` are gone on with: what they have is measured again only where the machine was busy,
    or where someone failed or was kept out. Results of before stay until this run has measured the limits.
    After so many `minutes` no workload is begun.

    Returns what must make the command fail, a line each, and the files written.

    Raises:
      BenchError: no GPU for the suite "gpu", or files cannot be written.
      earlier.EarlierError: results that cannot be gone on with.
      gate.GateError: thresholds that cannot be meant.
      KeyboardInterrupt: with what to do to go on, once there is something to go on with.
    """
    thresholds = gate.load() if suite != "gpu" else ()
    begun = report.Report(
        suite=suite,
        command=command,
        date=date,
        machine=machine.describe(),
        versions={},
        ceilings={},
        rows=(),
        verdicts=(),
    )
    try:
        if resume:
            begun = _gone_on_with(out / "results.json", begun)
        found = _measured(
            workloads,
            begun,
            thresholds,
            out=out,
            logs=_fresh_logs(out),
            kept=out / "checkpoints" if keep else None,
            end_s=math.inf if minutes is None else time.monotonic() + 60 * minutes,
        )
        paths = report.write(found, out)
    except OSError as error:
        raise BenchError(f"a file cannot be written: {error}") from error
    report.show(found)
    return found.failures, paths


def _gone_on_with(path: Path, begun: report.Report) -> report.Report:
    """Returns the run whose results lie at `path`, with the command that adds to it; `begun` if there is none."""
    found = earlier.read(path, suite=begun.suite, machine=begun.machine)
    if found is None:
        return begun
    commands = dict.fromkeys([*found.command.split(" ; "), begun.command])
    return dataclasses.replace(found, command=" ; ".join(commands))


def _measured(
    workloads: Sequence[Workload],
    begun: report.Report,
    thresholds: Sequence[gate.Rule],
    *,
    out: Path,
    logs: Path,
    kept: Path | None,
    end_s: float,
) -> report.Report:
    device = "cuda" if begun.suite == "gpu" else "cpu"
    everyone = contestants(device=device, threads=machine.threads())
    with earlier.scratch(out) as scratch, _progress() as show:
        env = environment(os.environ, device=device, threads=machine.threads(), scratch=scratch)
        with Field(everyone, env=env, scratch=scratch, logs=logs, kept=kept) as field:
            if device == "cuda":
                _require_gpu(field, everyone[0])
            # Before and after: whoever disturbs one of them does not make the limits lower than they are.
            started = found = _with_ceilings(begun, field)
            report.keep(_judged(started, thresholds), out)
            with _advised(out):
                for found in results(field, workloads, started, show, end_s=end_s):
                    report.keep(_judged(found, thresholds), out)
                return _judged(_with_ceilings(found, field), thresholds)


@contextlib.contextmanager
def _advised(out: Path) -> Iterator[None]:
    """Has an interruption say how to go on with the results of this run that are there."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {out / 'results.json'} has what was measured, --resume goes on with it"
        ) from None


def _judged(found: report.Report, thresholds: Sequence[gate.Rule]) -> report.Report:
    return dataclasses.replace(found, verdicts=gate.judge(found.rows, thresholds, found.ceilings))


def _with_ceilings(found: report.Report, field: Field) -> report.Report:
    ceilings = best([found.ceilings, driver.ceilings(field)])
    return dataclasses.replace(found, ceilings=ceilings, versions=_versions(found, field))


def _versions(found: report.Report, field: Field) -> dict[str, dict[str, str]]:
    """Returns the versions of all who have said theirs, and refuses others than those of earlier rows."""
    told = {name: hello["versions"] for name, hello in field.hellos.items()}
    earlier.require_same_versions(found, told)
    return {**found.versions, **told}


def best(looks: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns the highest rates of each contestant."""
    best: dict[str, dict[str, float]] = {}
    for contestant, rates in (item for look in looks for item in look.items()):
        known = best.setdefault(contestant, rates)
        best[contestant] = {**known, **{k: max(v, known.get(k, v)) for k, v in rates.items()}}
    return best


def _fresh_logs(out: Path) -> Path:
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for log in logs.glob("*.log"):
        log.unlink()
    return logs


def _require_gpu(field: Field, ours: Contestant) -> None:
    try:
        device = field.ask(ours, "hello")["device"]
    except WorkerError as error:
        raise BenchError(f"--suite=gpu: {error}") from error
    if device != "gpu":
        raise BenchError(
            f"--suite=gpu: JAX sees no GPU here, only {device!r}; install JAX's CUDA plug-in or take --suite=full"
        )


def results(
    field: Field,
    workloads: Sequence[Workload],
    found: report.Report,
    show: Callable[[int, str], None],
    *,
    end_s: float,
) -> Iterator[report.Report]:
    """Gives `found` with one workload more each time, until all have rows of a quiet machine.

    What would begin after `end_s` of the monotonic clock has rows that say so, or keeps those that it has.
    """
    missing = [w for w in workloads if not earlier.is_measured(found.rows, w, field)]
    total = sum(driver.steps(field, workload) for workload in missing)
    for i, workload in enumerate(missing):
        name, start = workload.name, time.monotonic()
        if start >= end_s:
            if any(row.workload == workload for row in found.rows):
                continue  # from when the machine was busy, which the rows say
            rows = driver.unmeasured(field, workload, "the time given was over (--resume goes on)")
        else:
            rows = driver.measure(
                field, workload, lambda who, name=name: show(total, f"{name}: {who}")
            )
        if all(later.shape != workload.shape for later in missing[i + 1 :]):
            field.release(workload.shape)
        found = dataclasses.replace(
            found,
            rows=_merged(found.rows, rows, SUITES[found.suite]),
            versions=_versions(found, field),
            wall_s={**found.wall_s, name: time.monotonic() - start},
        )
        yield found


def _merged(known: Sequence[Row], new: Sequence[Row], order: Sequence[Workload]) -> list[Row]:
    """Returns the rows of both in the suite's order; of a workload that both have, the new ones."""
    measured = {row.workload.name for row in new}
    places = {workload.name: i for i, workload in enumerate(order)}
    rows = [*(row for row in known if row.workload.name not in measured), *new]
    return sorted(rows, key=lambda row: places.get(row.workload.name, len(places)))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, str], None]]:
    """Gives a function that moves a bar on stderr by one step; silent where stderr is no terminal."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("starting", total=None)

        def show(total: int, doing: str) -> None:
            bar.update(task, total=total, description=doing, advance=1)

        yield show
