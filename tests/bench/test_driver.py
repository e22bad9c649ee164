"""The driver with real processes: our own worker on tiny models, and contestants that misbehave."""

import pytest

from bench import driver, gate
from bench.gate import Threshold
from bench.peers import contestants
from bench.peers.contestants import OURS, Contestant
from bench_contestants import KINDS, SLEEPER, SLOWED, program, sleeper, workload


def ours() -> Contestant:
    return contestants.contestants(device="cpu", threads=2)[0]


def measured(field, work) -> dict[str, driver.Row]:
    return {row.contestant: row for row in driver.measure(field, work, lambda who: None)}


@pytest.mark.slow
def test_our_worker_measures_every_kind_of_workload(field):
    alone = field(ours())
    for kind in KINDS:
        (row,) = driver.measure(alone, workload(kind), lambda who: None)
        assert (row.status, row.reason, len(row.samples)) == ("measured", "", 3)
        assert row.first_call_s is not None
        assert row.first_call_s > 0


@pytest.mark.slow
def test_a_slowed_build_of_our_worker_is_caught(field):
    honest = Contestant(name="before", kinds=KINDS, command=ours().command)
    rows = driver.measure(
        field(program(OURS, SLOWED), honest), workload("forward"), lambda who: None
    )
    assert [(row.status, row.difference) for row in rows] == [("measured", 0.0)] * 2
    (verdict,) = gate.judge(rows, [Threshold("forward-tiny", "before", 0.9)])
    assert verdict.outcome == "failed"


def test_our_worker_tells_the_ceilings_of_the_machine(field):
    everyone = field(ours())
    (rates,) = driver.ceilings(everyone).values()
    assert rates["gemm_float32_flops_per_s"] > 1e9
    assert rates["read_bytes_per_s"] > 1e8
    assert everyone.hellos[OURS]["threads"] >= 1


def test_turns_are_taken_in_reversed_order_every_other_round(field):
    both = field(sleeper("a", 0.001), sleeper("b", 0.001))
    order = []
    work = workload("decode", rounds=3)
    driver.measure(both, work, order.append)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert len(order) == driver.steps(both, work)


def test_short_calls_are_repeated_until_the_turn_is_long_enough_and_long_ones_are_not(field):
    rows = measured(field(sleeper("short", 0.001), sleeper("long", 0.03)), workload("decode"))
    assert all(len(turn) > 1 for turn in rows["short"].turns)  # a turn is 20 ms
    assert all(len(turn) == 1 for turn in rows["long"].turns)


@pytest.mark.parametrize(("patience_s", "turns"), [(0, 3), (60, 5)])
def test_rounds_end_when_patience_does_but_never_before_the_third(field, patience_s, turns):
    both = field(sleeper("a", 0), sleeper("b", 0), patience_s=patience_s)
    rows = measured(both, workload("decode", rounds=5))
    assert len(rows["a"].samples) == len(rows["b"].samples) == turns


def test_whoever_computes_something_else_is_wrong_and_has_no_speed(field):
    rows = measured(
        field(sleeper("a", 0), sleeper("cheat", 0, '{"tokens": [[1, 3]]}'), sleeper("c", 0)),
        workload("decode"),
    )
    assert (rows["cheat"].status, rows["cheat"].turns) == ("wrong", ())
    assert rows["cheat"].reason == "tokens[1] is 3 instead of 2"
    assert rows["a"].status == rows["c"].status == "measured"


def test_a_contestant_that_breaks_does_not_stop_the_others_nor_its_next_workload(field):
    breaks = SLEEPER.replace(
        "time.sleep(",
        "os.path.exists('broken') or (open('broken', 'w'), os._exit(3))\n        time.sleep(",
    )
    both = field(sleeper("a", 0), program("breaks", breaks, "0", '{"tokens": [[1, 2]]}'))
    first, second = (measured(both, workload("decode", batch=b)) for b in (1, 2))
    assert (first["breaks"].status, first["a"].status) == ("failed", "measured")
    assert first["breaks"].reason.startswith("exited with 3")
    assert second["breaks"].status == "measured"


def test_a_contestant_that_hangs_half_way_loses_its_turns(field):
    hangs = SLEEPER.replace(
        "time.sleep(",
        "self.calls = getattr(self, 'calls', 0) + 1\n        time.sleep(60 if self.calls > 3 else ",
    )
    both = field(
        sleeper("a", 0.03), program("hangs", hangs, "0.03", '{"tokens": [[1, 2]]}'), timeout_s=5
    )
    rows = measured(both, workload("decode"))
    assert (rows["hangs"].status, rows["hangs"].turns) == ("failed", ())
    assert rows["hangs"].reason == "no answer to 'run' within 5 s; stopped"
    assert len(rows["a"].samples) == 3


def test_a_broken_reference_leaves_the_others_measured(field):
    rows = measured(field(program("a", "raise SystemExit(1)"), sleeper("b", 0)), workload("decode"))
    assert (rows["a"].status, rows["b"].status) == ("failed", "measured")


def test_missing_torch_is_a_row_with_its_reason(field, monkeypatch, tmp_path):
    monkeypatch.setenv(contestants.PEERS_PYTHON, str(tmp_path / "python"))
    everyone = contestants.contestants(device="cpu", threads=2)
    reason = (
        f"FLAXMILL_PEERS_PYTHON={tmp_path / 'python'} is not a working Python (FileNotFoundError)"
    )
    absent = {c.name: c.absent for c in everyone}
    ours_and_tools = [name for name in absent if name.startswith((OURS, "cp "))]
    assert len(absent) == len(ours_and_tools) + 7
    for name, found in absent.items():
        assert found == ("" if name in ours_and_tools else reason)
    rows = measured(field(sleeper(OURS, 0), *everyone[1:]), workload("train"))
    assert rows["torch eager"].status == rows["torch.compile"].status == "not run"
    assert rows["torch eager"].reason == reason


def test_a_python_without_torch_says_what_it_lacks(monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho torch transformers\n")
    bare.chmod(0o755)
    monkeypatch.setenv(contestants.PEERS_PYTHON, str(bare))
    assert contestants.peers_python() == (
        None,
        f"FLAXMILL_PEERS_PYTHON={bare} has no torch and no transformers",
    )


@pytest.mark.parity
def test_pytorch_agrees_with_us_on_every_kind(field):
    pytest.importorskip("torch")
    everyone = [
        c for c in contestants.contestants(device="cpu", threads=2) if "compile" not in c.name
    ]
    assert not any(c.absent for c in everyone)
    three = field(*everyone)
    for kind in ("forward", "prefill", "decode", "train", "open"):
        rows = driver.measure(three, workload(kind), lambda who: None)
        assert [(row.status, row.reason) for row in rows] == [("measured", "")] * 2
        assert all(row.difference is not None and row.difference < 1e-4 for row in rows)


@pytest.mark.parity
@pytest.mark.slow
def test_compiled_pytorch_agrees_with_us(field):
    pytest.importorskip("torch")
    everyone = [c for c in contestants.contestants(device="cpu", threads=2) if "compile" in c.name]
    two = field(ours(), *everyone)
    for kind in ("forward", "train"):
        rows = driver.measure(two, workload(kind), lambda who: None)
        assert [(row.status, row.reason) for row in rows] == [("measured", "")] * 2
