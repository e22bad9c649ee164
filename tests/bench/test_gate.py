import dataclasses
import re
from collections import Counter

import pytest

from bench import gate
from bench.driver import Row, Shared, Status
from bench.gate import MemoryLimit, ShareLimit, Threshold
from bench.peers.contestants import OURS
from bench.peers.protocol import Usage
from bench.workloads import CI, FULL

WORKLOAD = CI[0]


def row(contestant: str, *seconds: float, status: Status = "measured", reason: str = "") -> Row:
    turns = tuple((s,) for s in seconds)
    return Row(workload=WORKLOAD, contestant=contestant, status=status, reason=reason, turns=turns)


def verdict(*rows: Row, at_least: float = 0.9) -> gate.Verdict:
    (found,) = gate.judge(rows, [Threshold(WORKLOAD.name, "peer", at_least)])
    return found


def test_level_with_the_peer_passes():
    assert verdict(row(OURS, 1, 1, 1), row("peer", 1, 1, 1)).outcome == "passed"


def test_a_slowdown_beyond_the_noise_fails():
    found = verdict(row(OURS, 2.0, 2.1, 2.2), row("peer", 1.0, 1.1, 1.0))
    assert found.outcome == "failed"
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(1.0 / 2.0)  # of 1.0/2.0, 1.1/2.1 and 1.0/2.2


def test_a_median_below_the_threshold_is_unclear_while_any_pair_lies_above():
    assert verdict(row(OURS, 2.0, 2.0, 1.0), row("peer", 1, 1, 1)).outcome == "unclear"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row(OURS, 1)], "peer does not take part"),
        ([row(OURS, 1), row("peer", status="not run", reason="absent")], "peer: not run"),
        ([row(OURS, status="failed"), row("peer", 1)], f"{OURS}: failed"),
    ],
)
def test_what_was_not_measured_is_not_judged_and_says_so(rows, reason):
    found = verdict(*rows)
    assert (found.outcome, found.reason) == ("not judged", reason)


def test_a_peer_that_the_suite_leaves_out_is_not_missed():
    workload = dataclasses.replace(WORKLOAD, without=("peer",))
    ours = dataclasses.replace(row(OURS, 1), workload=workload)
    assert gate.judge([ours], [Threshold(WORKLOAD.name, "peer", 1)]) == []


def used(*peaks_mb: float | None) -> tuple[Usage, ...]:
    return tuple(
        Usage(
            seconds=1.0,
            command_s=1.5,
            idle_bytes=50_000_000,
            peak_bytes=None if peak is None else int(1e6 * peak),
            disk_bytes=0,
        )
        for peak in peaks_mb
    )


@pytest.mark.parametrize(
    ("peaks_mb", "outcome", "found"),
    [
        ((120.0, 250.0), "passed", "200 MB of memory"),
        ((120.0, 251.0, 100.0), "failed", "201 MB of memory"),
        ((None, None), "not judged", ""),
    ],
)
def test_the_highest_peak_above_the_idle_process_is_what_a_memory_limit_judges(
    peaks_mb, outcome, found
):
    ours = dataclasses.replace(row(OURS, 1), usages=used(*peaks_mb))
    (verdict,) = gate.judge([ours], [MemoryLimit(WORKLOAD.name, 200)])
    assert (verdict.outcome, verdict.found) == (outcome, found)


@pytest.mark.parametrize(("together", "outcome"), [(510, "passed"), (990, "failed")])
def test_a_copy_for_each_process_is_caught(together, outcome):
    ours = dataclasses.replace(row(OURS, 1), shared=Shared(1000, together))
    (verdict,) = gate.judge([ours], [ShareLimit(WORKLOAD.name, 0.6)])
    assert verdict.outcome == outcome


PRODUCTS = "gemm_float32_flops_per_s"


@pytest.mark.parametrize(
    ("ours", "torch", "outcome", "asked"),
    [
        (200.0, 100.0, "failed", 1.8),  # 1.4x where products are twice as fast
        (180.0, 100.0, "unclear", 1.62),  # but the lead may be 1.5 only, which asks for 1.35x
        (120.0, 100.0, "passed", 1.08),
        (100.0, 100.0, "passed", 1.0),  # which is more than 0.9x
        (100.0, None, "passed", 1.0),
    ],
)
def test_more_is_asked_for_where_our_products_lead(ours, torch, outcome, asked):
    rule = Threshold(WORKLOAD.name, "peer", 1.0, of_lead=0.9)
    rates = {OURS: {PRODUCTS: ours}, "torch eager": {PRODUCTS: torch} if torch else {}}
    (found,) = gate.judge([row(OURS, 1, 1), row("peer", 1.4, 1.4)], [rule], rates)
    assert found.outcome == outcome
    assert found.threshold.asked == f"at least {asked:.3g}x of peer"


def test_a_disturbed_peak_of_pytorchs_fails_nobody():
    rule = Threshold(WORKLOAD.name, "peer", 1.0, of_lead=0.75)
    rates = {OURS: {PRODUCTS: 470.0}, "torch eager": {PRODUCTS: 110.0}}  # half of what it reaches
    (found,) = gate.judge([row(OURS, 1, 1), row("peer", 1.66, 1.66)], [rule], rates)
    assert (found.outcome, found.threshold.asked) == ("passed", "at least 1.65x of peer")


def test_no_workload_has_two_rules_for_the_same_thing():
    names = {w.name for w in (*CI, *FULL)}
    matched = [
        (name, type(rule), getattr(rule, "against", ""))
        for rule in gate.load()
        for name in names
        if re.fullmatch(rule.workload, name)
    ]
    assert [found for found, count in Counter(matched).items() if count > 1] == []


def test_what_is_asked_of_a_level_machine_is_what_the_file_says():
    rules = [rule for rule in gate.load() if isinstance(rule, Threshold)]
    assert [rule for rule in rules if rule.of_lead > rule.at_least] == []


def test_workloads_without_a_threshold_get_no_verdict():
    assert gate.judge([row(OURS, 1), row("peer", 9)], [Threshold("decode-.*", "peer", 1)]) == []


def test_every_ci_workload_is_guarded_and_no_threshold_is_idle():
    thresholds = gate.load()
    unguarded = [
        w.name
        for w in (*CI, *FULL)
        if not any(re.fullmatch(t.workload, w.name) for t in thresholds)
    ]
    assert unguarded in ([], ["open-3.4M"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[threshold]]\nworkload = "decod-.*"\nagainst = "x"\nat_least = 1', "'decod-.*'"),
        ('[[threshold]]\nworkload = "decode-.*"\nat_least = 1', "against"),
        ('[[memory]]\nworkload = "convert-124M"\nat_most_gb = 1', "at_most_gb"),
        ('[[limit]]\nworkload = "convert-124M"', "limit"),
        ("[[threshold", "toml"),
    ],
)
def test_thresholds_that_guard_nothing_are_an_error(tmp_path, text, message):
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(gate.GateError, match=message):
        gate.load(path)
