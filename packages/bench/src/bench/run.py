"""One run of the benchmark from the choice of workloads to the files in the output folder."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import driver, gate, machine, report
from bench.driver import Field, Row
from bench.peers.contestants import Contestant, contestants, environment
from bench.peers.process import WorkerError
from bench.workloads import Workload
from core.errors import FlaxmillError

PATIENCE_S = {"ci": 12.0}  # for the turns of one workload, where it is not the driver's


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
) -> tuple[list[str], list[Path]]:
    """Measures, prints the table to stdout and writes the results to `out`.

    With `keep` the checkpoints that are made for it stay in `out`/checkpoints, for the next run that keeps them.

    Returns what must make the command fail, a line each, and the files written.

    Raises:
      BenchError: no GPU for the suite "gpu", or files cannot be written.
      gate.GateError: thresholds that cannot be meant.
    """
    try:
        logs = _fresh_logs(out)
        found = _measured(
            workloads,
            suite=suite,
            command=command,
            date=date,
            out=out,
            logs=logs,
            kept=out / "checkpoints" if keep else None,
        )
        paths = report.write(found, out)
    except OSError as error:
        raise BenchError(f"a file cannot be written: {error}") from error
    report.show(found)
    return found.failures, paths


def _measured(
    workloads: Sequence[Workload],
    *,
    suite: str,
    command: str,
    date: str,
    out: Path,
    logs: Path,
    kept: Path | None,
) -> report.Report:
    device = "cuda" if suite == "gpu" else "cpu"
    thresholds = gate.load() if device == "cpu" else ()
    facts = machine.describe()
    everyone = contestants(device=device, threads=machine.threads())
    # Beside the results, because the system's place for temporary files may be in memory.
    scratch_place = tempfile.TemporaryDirectory(prefix="scratch-", dir=out.absolute())
    with scratch_place as folder, _progress() as show:
        scratch = Path(folder)
        env = environment(os.environ, device=device, threads=machine.threads(), scratch=scratch)
        patience_s = PATIENCE_S.get(suite, driver.PATIENCE_S)
        field_ = Field(
            everyone, env=env, scratch=scratch, logs=logs, kept=kept, patience_s=patience_s
        )
        with field_ as field:
            if device == "cuda":
                _require_gpu(field, everyone[0])
            # Before and after: whoever disturbs one of them does not make the limits lower than they are.
            looks = [driver.ceilings(field)]
            rows, wall_s = _rows(field, workloads, show)
            looks.append(driver.ceilings(field))
    return report.Report(
        suite=suite,
        command=command,
        date=date,
        machine=facts,
        versions={name: hello["versions"] for name, hello in field.hellos.items()},
        ceilings=best(looks),
        rows=rows,
        verdicts=gate.judge(rows, thresholds),
        wall_s=wall_s,
    )


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


def _rows(
    field: Field, workloads: Sequence[Workload], show: Callable[[int, str], None]
) -> tuple[list[Row], dict[str, float]]:
    """Returns the rows, and the seconds that each workload took."""
    total = sum(driver.steps(field, workload) for workload in workloads)
    rows: list[Row] = []
    wall_s: dict[str, float] = {}
    for i, workload in enumerate(workloads):
        name, start = workload.name, time.monotonic()
        rows += driver.measure(
            field, workload, lambda who, name=name: show(total, f"{name}: {who}")
        )
        if all(later.shape != workload.shape for later in workloads[i + 1 :]):
            field.release(workload.shape)
        wall_s[name] = time.monotonic() - start
    return rows, wall_s


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
