"""Conversions and openings in processes of their own: what they take, and that what is wrong with them is told."""

import dataclasses
import shutil
import sys

import pytest

from bench import driver, gate, machine, shapes, weights
from bench.driver import Shared
from bench.gate import MemoryLimit, Threshold
from bench.peers import contestants, jobs, memory
from bench.peers.contestants import ENGINE, OURS, Contestant
from bench_contestants import (
    BURDENED,
    COPIER,
    KINDS,
    TINY,
    TINY_GPT_OSS,
    program,
    sleeper,
    workload,
)


def ours() -> Contestant:
    return contestants.contestants(device="cpu", threads=2)[0]


def copiers() -> list[Contestant]:
    return [c for c in contestants.contestants(device="cpu", threads=2) if c.name.startswith("cp ")]


def measured(field, work) -> dict[str, driver.Row]:
    return {row.contestant: row for row in driver.measure(field, work, lambda who: None)}


def test_our_conversion_is_measured_beside_copying_and_leaves_nothing(field, tmp_path):
    rows = measured(field(ours(), *copiers()), workload("convert"))
    assert [(row.status, row.reason) for row in rows.values()] == [("measured", "")] * 4
    assert {row.difference for row in rows.values()} == {0.0}
    assert all(len(row.samples) == len(row.usages) == 3 for row in rows.values())
    for usage in rows[OURS].usages:
        assert 0 < usage.seconds < usage.command_s
    assert not list(tmp_path.rglob("converted"))


@pytest.mark.parametrize("experts", ["keep", "bfloat16"])
def test_our_conversion_of_gpt_oss_is_measured(field, experts):
    work = workload("convert", rounds=1, shape=TINY_GPT_OSS, experts=experts)
    rows = measured(field(ours(), *copiers()[:1]), work)
    assert (rows[OURS].status, rows[OURS].reason) == ("measured", "")
    if experts == "keep":
        assert rows["cp + sha256sum"].difference == 0
    else:
        assert rows["cp + sha256sum"].status == "not run"
        assert "copies 0.0 GB where" in rows["cp + sha256sum"].reason


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_converter_that_became_slower_or_greedier_is_caught(field):
    slow = program(OURS, BURDENED, "time.sleep(1); hog = b'x' * 300_000_000")
    honest = Contestant(name="before", kinds=KINDS, command=ours().command)
    rows = driver.measure(field(slow, honest), workload("convert", rounds=2), lambda who: None)
    assert [(row.status, row.reason) for row in rows] == [("measured", "")] * 2
    rules = [Threshold("convert-tiny", "before", 0.9), MemoryLimit("convert-tiny", 200)]
    assert [verdict.outcome for verdict in gate.judge(rows, rules)] == ["failed", "failed"]
    fair = [row for row in rows if row.contestant == "before"]
    assert fair[0].memory_bytes is not None
    assert 1e6 < fair[0].memory_bytes < 200e6


def test_whoever_writes_another_tensor_is_wrong(field):
    spoils = (
        "path = out / 'model.safetensors'; raw = bytearray(path.read_bytes()); "
        "raw[-104:-96] = b'spoiled!'; path.write_bytes(raw)"
    )
    both = field(program("honest", COPIER, "pass"), program("spoils", COPIER, spoils))
    rows = measured(both, workload("convert"))
    assert rows["honest"].status == "measured"
    assert rows["spoils"].status == "wrong"
    assert rows["spoils"].reason.startswith("values[")


def test_whoever_writes_nothing_fails_with_the_reason(field):
    removes = program("removes", COPIER, "(out / 'model.safetensors').unlink()")
    (row,) = driver.measure(field(removes), workload("convert"), lambda who: None)
    assert row.status == "failed"
    assert "neither wte.embedding nor wte.weight" in row.reason


def test_a_command_that_fails_is_told_with_its_last_words():
    with pytest.raises(RuntimeError, match=r"^sh ended with 3: no room$"):
        jobs.run(["sh", "-c", "echo trying >&2; echo no room >&2; exit 3"])


def test_commands_are_added_up():
    one = jobs.run(["sleep", "0.05"])
    two = jobs.run(["sleep", "0.05"], ["sleep", "0.05"])
    assert one.seconds >= 0.05
    assert two.seconds >= 0.1
    assert two.command_s >= two.seconds


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_before_the_mark_is_the_idle_process_and_after_it_is_the_work():
    code = (
        "import os, sys, time; before = b'z' * 200_000_000; time.sleep(0.05); del before; "
        "idle = b'x' * 50_000_000; "
        "os.write(int(sys.argv[1]), b'%d' % time.monotonic_ns()); time.sleep(0.1); "
        "work = b'y' * 90_000_000; time.sleep(0.1)"
    )
    usage = jobs.run([sys.executable, "-c", code, "MARK"])
    assert usage.idle_bytes is not None
    assert usage.memory_bytes is not None
    assert 50e6 < usage.idle_bytes < 90e6
    assert 90e6 < usage.memory_bytes < 95e6
    assert usage.seconds >= 0.2


# An earlier test of the same worker may have started jax, which warns of forks; these do nothing of jax's.
forks = pytest.mark.filterwarnings("ignore:os.fork\\(\\) was called:RuntimeWarning")


@forks
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_memory_of_a_fork_is_what_it_adds():
    usage = jobs.fork(lambda: bytes(80_000_000).count(1), before_s=7.0)
    assert usage.memory_bytes is not None
    assert usage.command_s > 7 > usage.seconds


@forks
def test_a_fork_that_fails_tells_why():
    with pytest.raises(RuntimeError, match=r"^the process ended with 1: ZeroDivisionError"):
        jobs.fork(lambda: 1 // 0, before_s=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_openings_are_measured_and_two_of_them_tell_what_they_share(field):
    # 32 MB, so that what two interpreters do meanwhile weighs little beside it.
    shape = shapes.Shape(
        name="tall", n_layer=1, n_head=2, n_embd=64, n_positions=40, vocab_size=125_000
    )
    (row,) = driver.measure(
        field(ours()), workload("load", rounds=1, shape=shape), lambda who: None
    )
    assert (row.status, row.reason) == ("measured", "")
    assert row.memory_bytes is not None
    assert row.memory_bytes < 16e6
    assert row.shared is not None
    assert row.shared.alone_bytes > 32e6
    assert row.shared.share < 0.7


def test_a_command_tells_its_tokens_and_its_own_seconds(tmp_path):
    code = (
        'print(\'loading\'); print(\'{"tokens": [[7]], "seconds": 9.5, "parts_s": {"open": 2}}\')'
    )
    task = jobs.Command([sys.executable, "-c", code])
    usage = task.call()
    assert (usage.seconds, usage.parts_s) == (9.5, {"open": 2})
    assert usage.command_s < 9
    assert task.outputs() == {"tokens": [[7]]}


def test_a_command_without_a_word_is_timed_as_a_whole(tmp_path):
    fresh = tmp_path / "cache"
    fresh.mkdir()
    task = jobs.Command(
        ["sh", "-c", 'test "$CACHE" = here && test ! -e "$0" && sleep 0.05', str(fresh)],
        env={"CACHE": "here"},
        fresh=fresh,
    )
    usage = task.call()
    assert usage.seconds == usage.command_s >= 0.05
    assert task.outputs() == {"counts": [0]}


@pytest.mark.slow
def test_commands_of_ours_are_measured_from_their_start(field):
    start = workload("start", rounds=1)
    compiled = workload("compile", rounds=1, is_cached=True)
    imported = workload("import", rounds=1)
    giant = workload("giant", rounds=1, shape=TINY_GPT_OSS, precision="bfloat16")
    alone = field(ours())
    rows = [measured(alone, work)[OURS] for work in (start, compiled, imported, giant)]
    assert [(row.status, row.reason) for row in rows] == [("measured", "")] * 4
    cold_s, cached_s = rows[1].first_call_s, rows[1].samples[0]
    assert cold_s is not None
    assert cached_s < cold_s
    assert rows[3].usages[0].parts_s.keys() == {"open", "prompt"}


def test_a_process_that_has_ended_has_no_memory():
    assert memory.anonymous(2**22 + 1) is None
    assert memory.proportional(2**22 + 1) is None


def test_too_little_room_on_the_disk_is_a_row_with_its_reason(field, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    rows = measured(field(ours()), workload("convert", shape=shapes.GPT2_XL))
    assert (rows[OURS].status, rows[OURS].turns) == ("not run", ())
    assert rows[OURS].reason == "needs 13.9 GB of the disk, 3.0 GB free"


def test_the_giant_needs_memory_for_its_pages_and_disk_for_two_copies(field, monkeypatch):
    work = workload("giant", shape=shapes.GPT_OSS_20B)
    usage = shutil.disk_usage("/")._replace(free=40 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert field(ours()).obstacle(work) == "needs 42.3 GB of the disk, 40.0 GB free"
    usage = usage._replace(free=50 * 10**9)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 16 * 10**9)
    assert field(ours()).obstacle(work) == "needs 16.8 GB of memory, 16.0 GB free"


def test_what_everyone_computes_with_has_to_fit_into_memory_together(field, monkeypatch):
    work = workload("forward", shape=shapes.GPT2_XL)
    usage = shutil.disk_usage("/")._replace(free=60 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 12 * 10**9)
    assert field(ours(), sleeper("a", 0)).obstacle(work) == "needs 12.4 GB of memory, 12.0 GB free"
    assert field(ours()).obstacle(work) == ""
    train = dataclasses.replace(work, kind="train")
    assert field(ours()).obstacle(train) == "needs 24.9 GB of memory, 12.0 GB free"


@pytest.mark.slow
def test_a_job_is_measured_beside_its_engine_and_tells_how_full_its_slots_were(field):
    alone = Contestant(name=ENGINE, kinds=KINDS, command=(*ours().command[:-1], "engine"))
    rows = measured(field(ours(), alone), workload("batch", requests=9, rounds=1))
    assert [(row.status, row.reason) for row in rows.values()] == [("measured", "")] * 2
    assert rows[ENGINE].difference == 0
    assert not rows[ENGINE].facts.get("rows_that_differ")
    for row in rows.values():
        assert 0.5 < row.facts["slot_utilisation"] <= 1


def test_a_model_that_does_not_fit_in_memory_is_a_reason(monkeypatch):
    (peer,) = (
        c for c in contestants.contestants(device="cpu", threads=2) if c.name == "transformers"
    )
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 9 * 10**9)
    assert peer.refuses(workload("convert", shape=shapes.GPT2_XL)) == (
        "needs 9.6 GB of memory, 9.0 GB free"
    )
    assert peer.refuses(workload("convert")) == ""
    assert "MXFP4" in peer.refuses(workload("convert", shape=TINY_GPT_OSS))


def test_a_missing_tool_is_a_reason(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "sync" else tool)
    absent = {c.name: c.absent for c in copiers()}
    assert absent["cp + sha256sum"] == ""
    assert absent["cp + sync + openssl"] == "there is no sync here"


def test_checkpoints_stay_only_where_they_are_kept(field, tmp_path):
    shape = workload("convert").shape
    for kept in (None, tmp_path / "kept"):
        some = field(kept=kept)
        made = some.weights(shape)
        (made.parent / "flaxmill").mkdir()
        some.release(shape)
        assert not (made.parent / "flaxmill").exists()
        assert made.exists() == (kept is not None)
    first = (made / "config.json").stat().st_mtime_ns
    assert field(kept=tmp_path / "kept").weights(shape) == made
    assert (made / "config.json").stat().st_mtime_ns == first


def test_the_share_of_one_copy_is_a_half():
    assert Shared(alone_bytes=200, together_bytes=100).share == 0.5


def test_samples_find_a_tensor_by_our_name_or_by_theirs(tmp_path):
    folder = weights.write(tmp_path / "model", TINY)
    values = jobs.samples(folder, TINY.probes)
    assert len(values) == 3 * 32 + TINY.n_embd
    assert values == jobs.samples(folder, dict.fromkeys(TINY.probes.values(), "absent"))


@pytest.mark.parity
def test_transformers_opens_and_converts_what_we_do(field):
    pytest.importorskip("torch")
    everyone = [
        c
        for c in contestants.contestants(device="cpu", threads=2)
        if c.name in (OURS, "transformers")
    ]
    both = field(*everyone)
    dense = workload("convert", rounds=1, shape=TINY_GPT_OSS, experts="bfloat16")
    for work in (workload("load", rounds=1), workload("convert", rounds=1), dense):
        rows = measured(both, work)
        assert {(row.status, row.reason) for row in rows.values()} == {("measured", "")}
        assert rows["transformers"].difference == 0
        assert rows["transformers"].usages[0].command_s > rows["transformers"].usages[0].seconds
