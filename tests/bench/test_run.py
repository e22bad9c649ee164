"""A run in several parts: what is written after each workload, and what is gone on with."""

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import pytest

from bench import driver, earlier, report, run
from bench.driver import Row, Shared
from bench.peers import ours
from bench.peers.contestants import OURS, Contestant
from bench.peers.protocol import Usage
from bench_commands import started
from bench_contestants import program, sleeper, workload
from core import native
from serve_batch import plan

MACHINE = {"cpu": "A CPU", "threads": 2, "memory_gib": 24.0, "system": "Linux", "python": "3.11"}
BEGUN = report.Report(
    suite="ci",
    command="python -m bench --suite=ci",
    date="2026-11-21T00:00:00Z",
    machine=MACHINE,
    versions={},
    ceilings={},
    rows=(),
    verdicts=(),
)
ONE, TWO, THREE = (
    dataclasses.replace(workload("decode", batch=n), name=f"decode-{n}") for n in (1, 2, 3)
)


def reached(field, found: report.Report, *workloads, end_s: float = math.inf):
    """Returns the reports after each workload, and who was asked for what."""
    asked: list[str] = []
    steps = run.results(field, workloads, found, lambda _, doing: asked.append(doing), end_s=end_s)
    return list(steps), sorted(set(asked))


def test_a_run_that_goes_on_measures_what_is_missing_and_what_a_busy_machine_measured(
    field, tmp_path
):
    everyone = field(sleeper(OURS, 0), sleeper("peer", 0))
    (first, second), _ = reached(everyone, BEGUN, ONE, THREE)
    assert [row.workload.name for row in first.rows] == ["decode-1"] * 2
    busy = [dataclasses.replace(row, neighbours=0.5 * (row.workload == ONE)) for row in second.rows]
    report.keep(dataclasses.replace(second, rows=busy), tmp_path)  # killed now
    found = earlier.read(tmp_path / "results.json", suite="ci", machine=MACHINE)
    assert found is not None
    steps, asked = reached(everyone, found, ONE, TWO, THREE)
    assert asked == [f"decode-{n}: {who}" for n in (1, 2) for who in (OURS, "peer")]
    assert {row.workload.name for row in steps[-1].rows} == {"decode-1", "decode-2", "decode-3"}
    assert all(row.neighbours != 0.5 for row in steps[-1].rows)
    assert [r for r in steps[-1].rows if r.workload == THREE] == busy[2:]
    assert steps[-1].versions == {name: {"sleeper": "1"} for name in (OURS, "peer")}
    assert steps[-1].wall_s.keys() == {"decode-1", "decode-2", "decode-3"}


def test_what_is_not_begun_in_time_says_so_and_busy_rows_stay(field):
    everyone = field(sleeper(OURS, 0))
    busy = Row(workload=ONE, contestant=OURS, status="measured", turns=((1.0,),), neighbours=0.5)
    begun = dataclasses.replace(BEGUN, rows=[busy])
    steps, asked = reached(everyone, begun, ONE, TWO, end_s=time.monotonic())
    assert asked == []
    kept, left = steps[-1].rows
    assert kept == busy
    assert (left.workload, left.status) == (TWO, "not run")
    assert left.reason == "the time given was over (--resume goes on)"
    assert not earlier.is_measured([left], TWO, everyone)


def test_who_failed_or_was_kept_out_is_asked_again_once_nothing_keeps_it_out(field):
    def asked_again(before: Contestant, now: Contestant) -> list[str]:
        steps, _ = reached(field(sleeper(OURS, 0), before), BEGUN, ONE)
        quiet = [dataclasses.replace(row, neighbours=0.0) for row in steps[-1].rows]
        found = dataclasses.replace(steps[-1], rows=quiet)
        return reached(field(sleeper(OURS, 0), now), found, ONE)[1]

    able, missing = sleeper("peer", 0), dataclasses.replace(sleeper("peer", 0), absent="no torch")
    both = [f"decode-1: {who}" for who in (OURS, "peer")]
    assert asked_again(missing, missing) == []
    assert asked_again(missing, able) == both
    assert asked_again(program("peer", "raise SystemExit(3)"), able) == both
    assert asked_again(able, able) == []


def test_rows_are_read_back_as_they_were_written(tmp_path):
    usage = Usage(
        seconds=1.0, command_s=1.5, idle_bytes=5, peak_bytes=None, disk_bytes=0, parts_s={"a": 0.5}
    )
    rows = [
        Row(workload=ONE, contestant=OURS, status="measured", turns=((0.1, 0.2), (0.3,))),
        Row(workload=ONE, contestant="peer", status="wrong", reason="why", facts={"x": 0.5}),
        Row(workload=ONE, contestant="c", status="not run", reason="why", is_kept_out=True),
        Row(
            workload=workload("load"),
            contestant=OURS,
            status="measured",
            turns=((1.0,),),
            usages=(usage,),
            shared=Shared(10, 6),
            neighbours=0.25,
            first_call_s=3.0,
            difference=0.0,
        ),
    ]
    report.keep(dataclasses.replace(BEGUN, rows=rows, wall_s={"decode-1": 2.0}), tmp_path)
    found = earlier.read(tmp_path / "results.json", suite="ci", machine=MACHINE)
    assert found == dataclasses.replace(BEGUN, rows=rows, wall_s={"decode-1": 2.0})


def test_there_may_be_nothing_to_go_on_with(tmp_path):
    assert earlier.read(tmp_path / "results.json", suite="ci", machine=MACHINE) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: [], "holds no results to go on with"),
        (lambda found: {**found, "rows": [{}]}, "holds no results to go on with"),
        (lambda found: {**found, "rows": {"a": 1}}, "holds no results to go on with"),
        (
            lambda found: {**found, "rows": [{**found["rows"][0], "turns": [["fast"]]}]},
            "holds no results to go on with",
        ),
        (lambda found: {**found, "suite": "full"}, "is of another suite: full, this is ci"),
        (lambda found: {**found, "machine": {**MACHINE, "threads": 64}}, "of another machine"),
    ],
)
def test_results_that_cannot_be_gone_on_with_are_refused(tmp_path, change, message):
    rows = [Row(workload=ONE, contestant=OURS, status="measured", turns=((0.1,),))]
    found = dataclasses.replace(BEGUN, rows=rows).to_dict()
    path = tmp_path / "results.json"
    path.write_text(json.dumps(change(json.loads(json.dumps(found)))))
    with pytest.raises(earlier.EarlierError, match=message):
        earlier.read(path, suite="ci", machine=MACHINE)


def interrupted(out: Path, *, resume: bool = False) -> str:
    with pytest.raises(KeyboardInterrupt) as stopped:
        run.run([ONE], suite="ci", command="b", date="today", out=out, resume=resume)
    return str(stopped.value)


def stops(*_: object, **__: object):
    raise KeyboardInterrupt


def test_a_stopped_run_advises_to_go_on_with_its_own_results_only(tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    yesterday = Row(workload=ONE, contestant=OURS, status="measured", turns=((1.0,),))
    report.keep(dataclasses.replace(BEGUN, rows=[yesterday]), tmp_path)
    monkeypatch.setattr(run, "contestants", stops)
    assert interrupted(tmp_path) == ""  # before anything was measured
    assert json.loads(results.read_text())["rows"]
    ours = dataclasses.replace(sleeper(OURS, 0), tells_ceilings=True, refuses=stops)
    monkeypatch.setattr(run, "contestants", lambda **_: (ours,))
    assert interrupted(tmp_path) == (
        f"interrupted; {results} has what was measured, --resume goes on with it"
    )
    found = json.loads(results.read_text())
    assert (found["date"], found["rows"]) == ("today", [])


def test_a_worker_that_starts_again_with_another_version_ends_the_run(field):
    everyone = field(sleeper(OURS, 0), sleeper("peer", 0))
    (first,), _ = reached(everyone, BEGUN, ONE)
    before = dataclasses.replace(first, versions={**first.versions, "peer": {"sleeper": "0"}})
    with pytest.raises(earlier.EarlierError, match=r"peer had .*'0'.* and has .*'1'"):
        reached(everyone, before, TWO)


def test_our_versions_tell_code_states_and_kernels_apart():
    versions = ours.Flaxmill().hello()["versions"]
    assert versions["native kernels"] == native.name()
    for package in ("core", "convert", "serve_batch", "train"):
        assert versions[f"flaxmill-{package}"] == plan.code_version(package)


def test_results_of_other_versions_are_refused():
    run_ = dataclasses.replace(BEGUN, versions={OURS: {"jax": "1"}})
    earlier.require_same_versions(run_, {OURS: {"jax": "1"}, "peer": {"torch": "2"}})
    with pytest.raises(earlier.EarlierError, match="flaxmill had "):
        earlier.require_same_versions(run_, {OURS: {"jax": "2"}})


def test_pictures_of_another_state_do_not_stay_beside_results_of_a_part(tmp_path):
    for name in ("results.md", "results.png", "roofline.png"):
        (tmp_path / name).write_text("of yesterday")
    report.keep(BEGUN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_a_killed_run_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path):
    (tmp_path / "scratch-killed/weights").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    with earlier.scratch(tmp_path) as one:
        (one / "file").touch()
        with earlier.scratch(tmp_path) as other:
            assert {path.name for path in tmp_path.iterdir()} == {
                "checkpoints",
                one.name,
                other.name,
            }
        assert (one / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.slow
def test_a_run_that_is_stopped_says_how_to_go_on_and_goes_on(tmp_path):
    arguments = ("--suite=full", "--only=^(import|forward-3.4M-t10)$", "--out=results")
    results = tmp_path / "results/results.json"
    with started(*arguments, cwd=tmp_path) as process:
        while not (results.exists() and json.loads(results.read_text())["rows"]):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert told == (
        "error: interrupted; results/results.json has what was measured, --resume goes on with it\n"
    )
    assert {path.name for path in results.parent.iterdir()} == {"logs", "results.json"}
    first = json.loads(results.read_text())
    assert {row["workload"]["name"] for row in first["rows"]} == {"import"}
    with started(*arguments, "--resume", cwd=tmp_path) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    second = json.loads(results.read_text())
    assert second["rows"][0]["contestant"] == OURS
    assert second["date"] == first["date"]
    names = [row["workload"]["name"] for row in second["rows"] if row["contestant"] == OURS]
    assert names == ["import", "forward-3.4M-t10"]
    assert (results.parent / "results.md").exists()


SLOW_TO_BEGIN = """
import sys, time
from bench.peers import protocol

class Slow:
    def hello(self):
        return {"versions": {}, "threads": 1, "device": "cpu"}

    def prepare(self, workload, weights):
        time.sleep(float(sys.argv[1]))
        return self

    def call(self):
        self.calls = getattr(self, "calls", 0) + 1
        time.sleep(float(sys.argv[2]) if self.calls > 1 else 0)

    def outputs(self):
        return {"tokens": [[1, 2]]}

protocol.serve(Slow())
"""


def rows_of(field, work) -> dict[str, Row]:
    return {row.contestant: row for row in driver.measure(field, work, lambda who: None)}


def test_who_compiles_for_too_long_is_a_row_that_says_so_and_is_not_asked_a_third_time(field):
    everyone = field(sleeper(OURS, 0), program("slow", SLOW_TO_BEGIN, "9", "0"), first_call_s=0.5)
    rows = [rows_of(everyone, work)["slow"] for work in (ONE, TWO, THREE)]
    assert [row.status for row in rows] == ["not run"] * 3
    assert rows[0].reason == "took more than 0.501 s to load, to compile and for a first call"
    assert rows[2].reason == "its first calls of decode-1 and decode-2 took too long"
    assert rows_of(everyone, workload("forward"))["slow"].reason == rows[0].reason


@pytest.mark.parametrize(("name", "status"), [("slow", "not run"), (OURS, "failed")])
def test_calls_that_take_too_long_are_a_row_that_says_so_and_a_failure_of_ours(field, name, status):
    slow = program(name, SLOW_TO_BEGIN, "0", "9")
    rows = rows_of(field(slow, sleeper("b", 0), call_s=0.4), ONE)
    assert (rows[name].status, rows[name].reason) == (status, "took more than 0.4 s a call")
    assert rows["b"].status == "measured"
