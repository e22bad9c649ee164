"""Makes a run the published one: its files in docs/bench, a record in the history, the table in the README.

python -m bench.publish --results=out/bench/results.json
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bench.peers.contestants import OURS
from core import door
from core.errors import FlaxmillError

_RESULTS = flags.DEFINE_string("results", "out/bench/results.json", "The results of the run.")
_DOCS = flags.DEFINE_string("docs", "docs/bench", "The folder that it is published in.")
_README = flags.DEFINE_string("readme", "README.md", "The page with the table.")

BEGIN, END = "<!-- bench.publish: begin -->", "<!-- bench.publish: end -->"
# What a reader asks first; everything else is in results.md.
HEADLINES = (
    r"decode-124M-.*|decode-gpt-oss-tiny-b1-.*|prefill-124M-t512.*|forward-124M-t(64|512).*|serve-.*|train-.*"
    r"|start-124M|load-(124M|XL)|convert-(124M|XL|20B-cut|20B)|giant-.*"
)


class PublishError(FlaxmillError):
    """Nothing has been published; the text says why."""


def summary(results: Mapping[str, Any]) -> str:
    """Returns the README's table: our figure, its share of the machine's limit, and how we stand to each peer."""
    facts = results["machine"]
    day = results["date"].partition("T")[0]
    lines = [
        f"`{results['command']}`, {day}, {facts['cpu']}, {facts['threads']} threads for everyone. *2.00x* is twice as",
        "fast as that peer, *0.50x* half as fast; the limit is what this machine can do at the most "
        "([how it is measured](docs/bench/README.md),",
        "[every row](docs/bench/results.md)).",
        "",
        "| workload | flaxmill | of the limit | beside |",
        "|---|---:|---:|---|",
    ]
    for name, rows in _headlines(results).items():
        ours = rows[OURS]
        share = ours["share_of_limit"]
        beside = [_beside(who, row) for who, row in rows.items() if who != OURS]
        lines.append(
            f"| {name} | {_figure(ours)} | {f'{share:.0%}' if share else ''} | {', '.join(filter(None, beside))} |"
        )
    return "\n".join(lines) + "\n"


def _headlines(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the rows of the workloads that the README shows, by contestant."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        if re.fullmatch(HEADLINES, row["workload"]["name"]):
            found.setdefault(row["workload"]["name"], {})[row["contestant"]] = row
    return {name: rows for name, rows in found.items() if OURS in rows}


def _figure(row: Mapping[str, Any]) -> str:
    if not row["figure"]:
        return row["status"]
    value = row["figure"]["value"]
    return f"{value:,.0f} {row['unit']}" if value >= 100 else f"{value:.3g} {row['unit']}"


def _beside(who: str, row: Mapping[str, Any]) -> str:
    if row["status"] == "not run":
        return ""  # results.md has the reason
    return f"{who} {row['speedup']['value']:.2f}x" if row["speedup"] else f"{who} {row['status']}"


def placed(page: str, table: str) -> str:
    """Returns `page` with `table` between the markers.

    Raises:
      PublishError: there are none.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise PublishError(f"the page has no {BEGIN} and {END} to put the table between")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def record(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the history keeps of a run."""
    rows: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        kept = rows.setdefault(row["workload"]["name"], {"kind": row["workload"]["kind"]})
        if row["contestant"] == OURS and row["figure"]:
            share = row["share_of_limit"]
            kept |= {"figure": _short(row["figure"]["value"]), "unit": row["unit"]}
            kept["share_of_limit"] = share and _short(share)
        elif row["speedup"]:
            ratio = [_short(row["speedup"][name]) for name in ("value", "low", "high")]
            kept.setdefault("against", {})[row["contestant"]] = ratio
    versions = {name: v for found in results["versions"].values() for name, v in found.items()}
    names = ("date", "suite", "command", "machine", "ceilings")
    return {"schema": 1, **{n: results[n] for n in names}, "versions": versions, "rows": rows}


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def runs(history: Path) -> list[dict[str, Any]]:
    """Returns the records of a history, the oldest first."""
    found = [json.loads(path.read_text()) for path in history.glob("*.json")]
    return sorted(found, key=lambda run: run["date"])


def publish(results: Path, *, docs: Path, readme: Path) -> list[Path]:
    """Copies the run's files, keeps its record, draws the history anew and rewrites the table; returns what it wrote.

    Raises:
      PublishError: the README has no place for the table.
      bench.compare.CompareError: `results` are none.
    """
    from bench import compare, plot

    found = compare.read(results)
    page = placed(readme.read_text(), summary(found))
    history = docs / "history"
    history.mkdir(parents=True, exist_ok=True)
    kept = history / f"{found['date'].replace(':', '-')}-{found['suite']}.json"
    kept.write_text(json.dumps(record(found), indent=1) + "\n")
    (docs / "history.png").write_bytes(plot.history(runs(history)))
    readme.write_text(page)
    return [*_copied(results.parent, docs), kept, docs / "history.png", readme]


def _copied(source: Path, docs: Path) -> Sequence[Path]:
    optional = [name for name in ("roofline.png", "latency.png") if (source / name).exists()]
    names = ["results.json", "results.md", "results.png", *optional]
    if source.resolve() != docs.resolve():
        for name in ("roofline.png", "latency.png"):
            (docs / name).unlink(missing_ok=True)  # of another run
        for name in names:
            shutil.copyfile(source / name, docs / name)
    return [docs / name for name in names]


def main() -> None:
    paths = publish(Path(_RESULTS.value), docs=Path(_DOCS.value), readme=Path(_README.value))
    sys.stderr.write("written: " + ", ".join(map(str, paths)) + "\n")


if __name__ == "__main__":
    door.run(main)
