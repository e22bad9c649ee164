"""What an earlier run has left in the output folder: its results, to go on with, and its rubbish."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.driver import Field, Row, Shared, entrants
from bench.peers.contestants import OURS
from bench.peers.protocol import Usage
from bench.workloads import Workload
from core.errors import FlaxmillError


class EarlierError(FlaxmillError):
    """There are no results that this run can go on with; the text says why."""


def read(path: Path, *, suite: str, machine: Mapping[str, Any]) -> report.Report | None:
    """Returns the run whose results.json lies at `path`, without its verdicts; None if there is none.

    Raises:
      EarlierError: it cannot be read, or is of another suite or another machine.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        names = ("suite", "command", "date", "machine", "versions", "ceilings", "wall_s")
        rows = [_row(values) for values in found["rows"]]
        run = report.Report(**{name: found[name] for name in names}, rows=rows, verdicts=())
        run.to_dict()  # computes with all of it
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        kind = type(error).__name__
        raise EarlierError(
            f"{path} holds no results to go on with ({kind}: {error}); leave --resume out to begin anew"
        ) from error
    for name, theirs, ours in (("suite", run.suite, suite), ("machine", run.machine, machine)):
        if theirs != ours:
            raise EarlierError(
                f"{path} is of another {name}: {theirs}, this is {ours}; leave --resume out to begin anew"
            )
    return run


def _row(values: Mapping[str, Any]) -> Row:
    plain = ("contestant", "status", "reason", "first_call_s", "difference", "neighbours", "facts")
    return Row(
        **{name: values[name] for name in plain},
        is_kept_out=values.get("is_kept_out", False),
        workload=Workload.from_dict(values["workload"]),
        turns=tuple(tuple(turn) for turn in values["turns"]),
        usages=tuple(Usage(**usage) for usage in values["usages"]),
        shared=Shared(**values["shared"]) if values["shared"] else None,
    )


def is_measured(rows: Sequence[Row], workload: Workload, field: Field) -> bool:
    """Tells whether these have all figures of just this workload, ours from when nobody else used the machine.

    Whoever failed, has no row, or was kept out by what is no obstacle now is to be asked again.
    """
    known = {row.contestant: row for row in rows if row.workload == workload}
    ours = known.get(OURS)
    if ours is None or ours.status != "measured" or (ours.neighbours or 0.0) > machine.BUSY:
        return False
    able = [c.name for c in entrants(field, workload) if not c.obstacle(workload)]
    return all(
        name in known and known[name].status != "failed" and not known[name].is_kept_out
        for name in able
    )


def require_same_versions(run: report.Report, versions: Mapping[str, Mapping[str, str]]) -> None:
    """Returns if each contestant has the versions that it had before in this run, or in the part to go on with.

    Raises:
      EarlierError: one has others.
    """
    for name, found in versions.items():
        known = run.versions.get(name, found)
        if known != found:
            raise EarlierError(
                f"{name} had {dict(known)} before in this run and has {dict(found)} now; "
                "leave --resume out to begin anew"
            )


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Gives a new folder in `out` that is removed in the end, and removes those of runs that were killed.

    Beside the results, because the system's place for temporary files may be in memory.
    """
    for left in out.glob("scratch-*"):
        with contextlib.suppress(OSError), _locked(left):  # BlockingIOError: it is in use
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=out.absolute()) as made:
        folder = Path(made)
        with _locked(folder):
            yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
