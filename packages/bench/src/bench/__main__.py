"""Measures flaxmill beside its peers and writes a table, JSON, Markdown and a plot.

python -m bench --suite=ci --out=out/bench
python -m bench --suite=full --minutes=40, and later --resume
python -m bench --compare=before/results.json,after/results.json
"""

import re
import shlex
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from absl import flags

from core import door

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
_KEEP = flags.DEFINE_bool(
    "keep",
    False,
    "Keeps the checkpoints that are made (full: 28 GB) in --out/checkpoints for the next run.",
)
_MINUTES = flags.DEFINE_float(
    "minutes",
    None,
    "Begins no workload after so many minutes; those that are left are told, and --resume measures them.",
    lower_bound=0,
)
_RESUME = flags.DEFINE_bool(
    "resume",
    False,
    "Goes on with the run in --out, killed or not: what it has measured on a quiet machine stays.",
)
_COMPARE = flags.DEFINE_list(
    "compare", [], "Measures nothing, and tells what changed between two results.json."
)


def main() -> None:
    if _COMPARE.value:
        if len(_COMPARE.value) != 2:
            raise door.Usage("--compare takes two files: --compare=before.json,after.json")
        from bench import compare

        compare.run(_COMPARE.value)
        return
    from bench import workloads

    suite = workloads.SUITES[_SUITE.value]
    try:
        chosen = [w for w in suite if re.search(_ONLY.value, w.name)]
    except re.error as error:
        raise door.Usage(f"--only={_ONLY.value} is no regular expression: {error}") from error
    if not chosen:
        names = ", ".join(w.name for w in suite)
        raise door.Usage(f"--only={_ONLY.value} matches none of {names}")

    from bench import run

    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # files and processes are tidied
    failures, paths = run.run(
        chosen,
        suite=_SUITE.value,
        command=_command(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        out=Path(_OUT.value),
        keep=_KEEP.value,
        resume=_RESUME.value,
        minutes=_MINUTES.value,
    )
    print("written: " + ", ".join(str(path) for path in paths), file=sys.stderr)
    if failures:
        raise run.BenchError("; ".join(failures))


def _command() -> str:
    """Returns the command as one would type it anywhere: the Python's path and the output folder are left out."""
    only = f" --only={shlex.quote(_ONLY.value)}" if _ONLY.value else ""
    return f"python -m bench --suite={_SUITE.value}{only}"


if __name__ == "__main__":
    door.run(main)
