"""What is published: the table in the README says what docs/bench holds, and nothing is lost on the way."""

import json
import shutil
from pathlib import Path

import pytest

from bench import plot, publish

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path):
    """A checkout with a README and the published run as a new one."""
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "docs/bench", tmp_path / "out", ignore=shutil.ignore_patterns("history"))
    page = f"# it\n\n{publish.BEGIN}\nold\n{publish.END}\nafter\n"
    (tmp_path / "README.md").write_text(page)
    return tmp_path


def test_the_readme_shows_the_published_run():
    page = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "docs/bench/results.json").read_text())
    assert publish.placed(page, publish.summary(results)) == page, (
        "run python -m bench.publish --results=docs/bench/results.json"
    )


def test_the_published_run_is_in_the_history():
    results = json.loads((ROOT / "docs/bench/results.json").read_text())
    newest = publish.runs(ROOT / "docs/bench/history")[-1]
    assert newest == publish.record(results)


def test_publishing_copies_the_run_keeps_its_record_and_writes_the_table(place):
    paths = publish.publish(
        place / "out/results.json", docs=place / "docs", readme=place / "README.md"
    )
    assert all(path.exists() for path in paths)
    page = (place / "README.md").read_text()
    assert page.startswith(f"# it\n\n{publish.BEGIN}\n`python -m bench")
    assert page.endswith(f"|\n{publish.END}\nafter\n")
    (run,) = publish.runs(place / "docs/history")
    assert run["machine"] == json.loads((place / "docs/results.json").read_text())["machine"]
    assert (place / "docs/history.png").read_bytes().startswith(b"\x89PNG")
    # Again, from where it is published: nothing changes.
    before = page
    publish.publish(place / "docs/results.json", docs=place / "docs", readme=place / "README.md")
    assert (place / "README.md").read_text() == before


def test_a_page_without_a_place_for_the_table_stays_as_it_is(place):
    (place / "README.md").write_text("# it\n")
    with pytest.raises(publish.PublishError, match="no <!-- bench"):
        publish.publish(place / "out/results.json", docs=place / "docs", readme=place / "README.md")
    assert not list((place / "docs").iterdir())


def test_the_table_says_what_was_lost_and_what_failed():
    facts = {"cpu": "A CPU", "threads": 2}

    def row(contestant, status="measured", **values):
        workload = {"name": "decode-124M-b1-n64", "kind": "decode"}
        empty = {"figure": None, "speedup": None, "share_of_limit": None, "unit": "tokens/s"}
        return {"workload": workload, "contestant": contestant, "status": status, **empty, **values}

    rows = [
        row("flaxmill", figure={"value": 62.81}, share_of_limit=0.64),
        row("slow", speedup={"value": 2.0}),
        row("quick", speedup={"value": 0.5}),
        row("broken", "failed"),
        row("absent", "not run"),
    ]
    found = publish.summary(
        {"command": "bench", "date": "2026-01-02T03", "machine": facts, "rows": rows}
    )
    assert found.endswith(
        "| decode-124M-b1-n64 | 62.8 tokens/s | 64% | slow 2.00x, quick 0.50x, broken failed |\n"
    )
    assert "`bench`, 2026-01-02, A CPU, 2 threads" in found


def test_a_history_of_runs_that_measured_different_things_can_be_drawn():
    def run(day, **ratios):
        rows = {
            name: {"kind": name[:3], "against": {"a": [ratio, ratio, ratio], "b": [9, 9, 9]}}
            for name, ratio in ratios.items()
        }
        return {"date": day, "suite": "ci", "rows": rows | {"alone": {"kind": "open"}}}

    picture = plot.history([run("2026-01-01", dec1=0.5, dec2=3), run("2026-01-02", dec1=2, fwd=1)])
    assert picture.startswith(b"\x89PNG")
    assert plot.history([]).startswith(b"\x89PNG")
