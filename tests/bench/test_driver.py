"""The driver with real processes: our own worker on tiny models, and contestants that misbehave."""

import psutil
import pytest

from bench import driver, gate
from bench.gate import Threshold
from bench.peers import contestants
from bench.peers.contestants import OURS, Contestant
from bench.workloads import ONNX
from bench_contestants import KINDS, SLEEPER, SLOWED, program, sleeper, workload
from train import pages


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


@pytest.mark.slow
def test_our_worker_tells_the_ceilings_of_the_machine(field):
    everyone = field(ours())
    (rates,) = driver.ceilings(everyone).values()
    for precision in ("float32", "bfloat16", "int8"):
        assert rates[f"gemm_{precision}_flops_per_s"] > 1e9
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


def test_a_long_call_is_made_once_a_turn_and_once_before_them(field, tmp_path):
    counts = SLEEPER.replace("time.sleep(", "open('calls', 'a').write('.'); time.sleep(")
    measured(field(program("long", counts, "0.03", '{"tokens": [[1, 2]]}')), workload("decode"))
    assert (tmp_path / "long/calls").read_text() == 4 * "."


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


OTHERS = '{"tokens": [[1, 3]]}'


@pytest.mark.parametrize(
    ("shortfall", "precision", "status"),
    [
        ("0.005", "float32", "measured"),  # two tokens that are level in float32
        ("0.1", "float32", "wrong"),
        ("0.01", "bfloat16", "measured"),
        ("1.5", "bfloat16", "wrong"),
        ("1.5", "int8", "measured"),
        ("nan", "int8", "wrong"),
    ],
)
def test_other_tokens_are_right_where_the_model_finds_them_as_good(
    field, shortfall, precision, status
):
    both = field(sleeper("a", 0, '{"tokens": [[1, 2]]}', shortfall), sleeper("b", 0, OTHERS))
    row = measured(both, workload("decode", rounds=1, precision=precision))["b"]
    assert row.status == status
    assert row.facts == {"rows_that_differ": 1}
    if status == "wrong":
        assert (
            row.reason == f"a token lies {float(shortfall):.2g} deviations below the likeliest one"
        )


def test_rounded_tokens_of_the_first_contestant_are_judged_too(field):
    (row,) = driver.measure(
        field(sleeper("a", 0, OTHERS, "3")),
        workload("decode", precision="int8"),
        lambda who: None,
    )
    assert (row.status, row.difference) == ("wrong", None)


def test_a_row_of_another_length_is_wrong_whoever_judges(field):
    both = field(sleeper("a", 0, '{"tokens": [[1, 2]]}', "0"), sleeper("b", 0, '{"tokens": [[1]]}'))
    rows = measured(both, workload("decode", rounds=1))
    assert (rows["b"].status, rows["b"].reason) == ("wrong", "tokens: 1 values instead of 2")


def test_what_a_contestant_has_not_got_is_not_run_and_no_failure(field):
    lacks = SLEEPER.replace("os.system(", "raise protocol.Unable('has no such type'); (")
    (row,) = driver.measure(
        field(program("a", lacks, "0", "{}")), workload("decode"), lambda who: None
    )
    assert (row.status, row.reason) == ("not run", "has no such type")


def test_who_is_left_out_of_a_workload_has_no_row(field):
    both = field(sleeper("a", 0), sleeper("b", 0))
    assert set(measured(both, workload("decode", rounds=1, without=("a",)))) == {"b"}


def test_facts_are_told_and_not_compared(field):
    one, two = (
        sleeper(name, 0, f'{{"tokens": [[1, 2]], "facts": {{"slot_utilisation": {share}}}}}')
        for name, share in (("a", 0.9), ("b", 0.5))
    )
    rows = measured(field(one, two), workload("decode", rounds=1))
    assert (rows["b"].status, rows["b"].facts) == ("measured", {"slot_utilisation": 0.5})


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


HUGE = "os.environ.get('GLIBC_TUNABLES', '')"
TOLD = SLEEPER.replace(
    "return json.loads(sys.argv[2])",
    f"return {{'tokens': [[1, 2]], 'facts': {{'huge': 'hugetlb=1' in {HUGE}, 'pid': os.getpid()}}}}",
)


def test_training_runs_in_a_process_of_its_own_with_large_pages_where_there_are_some(field):
    both = field(program("a", TOLD, "0"))
    kinds = ("forward", "train", "train", "decode")
    found = [measured(both, workload(kind, rounds=1))["a"].facts for kind in kinds]
    has_some = pages.tunables({}) is not None
    assert [facts["huge"] for facts in found] == [False, has_some, has_some, False]
    assert found[1]["pid"] == found[2]["pid"]
    assert psutil.pid_exists(int(found[0]["pid"])) != has_some


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
    assert len(absent) == len(ours_and_tools) + 8
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
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_every_peer_continues_as_we_do(field, precision):
    pytest.importorskip("torch")
    everyone = [
        c for c in contestants.contestants(device="cpu", threads=2) if c.name != "HF compiled"
    ]
    rows = measured(field(*everyone), workload("decode", rounds=1, precision=precision))
    unable = {"float32": set(), "bfloat16": {"CTranslate2"}, "int8": {"HF generate"}}[precision]
    for name, row in rows.items():
        if row.reason.startswith("has no llama_cpp"):
            continue
        expected = "not run" if name in unable else "measured"
        # Whether CTranslate2 has bfloat16 is a matter of the processor.
        assert row.status == expected or name == "CTranslate2", row.reason


@pytest.mark.parity
def test_peers_serve_requests_of_all_lengths_as_we_do(field):
    pytest.importorskip("torch")
    everyone = contestants.contestants(device="cpu", threads=2)
    rows = measured(field(*everyone), workload("serve", rounds=1))
    assert {row.status for row in rows.values() if "llama_cpp" not in row.reason} == {"measured"}
    assert 0.5 < rows[OURS].facts["slot_utilisation"] < 1
    # Five requests through two slots: the last one is alone.
    assert rows["flaxmill, equal lengths"].facts["slot_utilisation"] == 5 / 6


@pytest.mark.parity
def test_pytorch_agrees_with_us_on_every_kind(field):
    pytest.importorskip("torch")
    names = (OURS, "torch eager", "HF generate")
    everyone = [c for c in contestants.contestants(device="cpu", threads=2) if c.name in names]
    assert not any(c.absent for c in everyone)
    three = field(*everyone)
    for kind in ("forward", "prefill", "decode", "train", "open"):
        rows = driver.measure(three, workload(kind), lambda who: None)
        assert [(row.status, row.reason) for row in rows] == [("measured", "")] * 2
        assert all(row.difference is not None and row.difference < 1e-4 for row in rows)


@pytest.mark.parity
def test_onnx_runtime_agrees_with_us_on_pytorch_s_own_graph(field):
    pytest.importorskip("onnxruntime")
    (peer,) = (c for c in contestants.contestants(device="cpu", threads=2) if c.name == ONNX)
    assert peer.absent == ""
    for length in (11, 4):
        rows = measured(field(ours(), peer), workload("forward", rounds=1, length=length))
        assert [(row.status, row.reason) for row in rows.values()] == [("measured", "")] * 2
        assert (rows[ONNX].difference or 0) < 1e-4
    narrow = workload("forward", precision="bfloat16")
    assert peer.obstacle(narrow) == "has no bfloat16 for this graph on a CPU"


@pytest.mark.parity
@pytest.mark.slow
def test_compiled_pytorch_agrees_with_us(field):
    pytest.importorskip("torch")
    names = ("torch.compile", "HF compiled")
    everyone = [c for c in contestants.contestants(device="cpu", threads=2) if c.name in names]
    two = field(ours(), *everyone)
    for kind in ("forward", "decode", "train"):
        rows = driver.measure(two, workload(kind), lambda who: None)
        assert [(row.status, row.reason) for row in rows] == [("measured", "")] * 2
