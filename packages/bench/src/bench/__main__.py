"""Measures flaxmill beside PyTorch and writes a table, JSON, Markdown and a plot.

python -m bench --suite=ci --out=out/bench
"""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.workloads import Workload

_SUITE = flags.DEFINE_enum(
    "suite",
    "ci",
    ["ci", "full", "gpu"],
    "ci: under six minutes on two cores; full: everything; gpu: full, on a GPU.",
)
_OUT = flags.DEFINE_string(
    "out", "out/bench", "The folder for results.json, results.md and results.png."
)
_ONLY = flags.DEFINE_string(
    "only", "", "Only workloads whose name this regular expression is found in."
)


def main(argv: list[str]) -> int:
    if argv[1:]:
        return _fail(f"unexpected argument {argv[1]!r}; flags are written --flag=value", code=2)
    from bench import workloads

    suite = workloads.SUITES[_SUITE.value]
    try:
        chosen = [w for w in suite if re.search(_ONLY.value, w.name)]
    except re.error as error:
        return _fail(f"--only={_ONLY.value} is no regular expression: {error}", code=2)
    if not chosen:
        names = ", ".join(w.name for w in suite)
        return _fail(f"--only={_ONLY.value} matches none of {names}", code=2)
    return _run(chosen)


def _run(chosen: "Sequence[Workload]") -> int:
    from bench import gate, run

    try:
        failures, paths = run.run(
            chosen,
            suite=_SUITE.value,
            command=_command(),
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            out=Path(_OUT.value),
        )
    except (OSError, run.BenchError, gate.GateError) as error:
        return _fail(str(error), code=1)
    print("written: " + ", ".join(str(path) for path in paths), file=sys.stderr)
    for failure in failures:
        _fail(failure, code=1)
    return 1 if failures else 0


def _command() -> str:
    """Returns the command as one would type it anywhere: the Python's path and the output folder are left out."""
    only = f" --only={_ONLY.value}" if _ONLY.value else ""
    return f"python -m bench --suite={_SUITE.value}{only}"


def _fail(message: str, *, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit as shown:
        raise SystemExit(0) from shown  # absl ends --help with 1
    except flags.Error as error:
        sys.exit(_fail(str(error).replace("\n", " "), code=2))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
