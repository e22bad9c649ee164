"""The host that threads share: same slots, own results, and nobody waits for an engine that is dead."""

import itertools
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import core
from core import native
from serve_batch import host as host_lib
from serve_batch import plan
from serve_batch.errors import JobError
from serve_batch.host import WAITING_PER_SLOT, EngineHost, shared

SAMPLED = core.Sampling(max_new_tokens=6, temperature=0.9, seed=3)


def requests(first: int, count: int) -> Iterator[tuple[int, core.Request]]:
    for i in range(first, first + count):
        yield i, core.Request(f"Prompt {i}", SAMPLED, str(i))


@pytest.fixture
def host(model: Path) -> Iterator[EngineHost]:
    host = EngineHost(model, slots=4)
    yield host
    host.close()


def test_threads_share_the_slots_and_get_their_own_results_in_order(host: EngineHost):
    expected = dict(host.complete(requests(0, 60)))
    steps = host._engine.counters.steps
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: list(host.complete(requests(10 * n, 10))), range(6)))
    for n, pairs in enumerate(found):
        assert [key for key, _ in pairs] == list(range(10 * n, 10 * n + 10))
        assert all(result == expected[key] for key, result in pairs)
    # Six callers of ten rows, of six tokens each, four at a time: alone each would leave slots free at its end.
    assert host._engine.counters.steps - steps <= 1.2 * steps


def test_what_is_no_request_and_what_cannot_be_served_come_back_in_their_place(host: EngineHost):
    given: list[tuple[str, Any]] = [
        ("a", "not asked"),
        ("b", core.Request("fine", SAMPLED, "b")),
        ("c", core.Request("", SAMPLED, "c")),
        ("d", core.Request("fine", SAMPLED, "b")),
    ]
    results = dict(host.complete(given))
    assert list(results) == ["a", "b", "c", "d"]
    assert results["a"] == "not asked"
    assert isinstance(results["c"], core.RequestError)
    assert isinstance(results["b"], core.Completion)
    assert results["b"] == results["d"]


def test_a_request_of_no_tokens_is_answered_though_the_engine_has_nothing_to_do(host: EngineHost):
    request = core.Request("Prompt", core.Sampling(max_new_tokens=0))
    with ThreadPoolExecutor(1) as pool:
        ((_, result),) = pool.submit(list, host.complete([(0, request)])).result(timeout=20)
    assert isinstance(result, core.Completion)
    assert result.finish_reason == "length"


def test_requests_are_taken_as_they_are_needed(host: EngineHost):
    taken = itertools.count()

    def endless() -> Iterator[tuple[int, core.Request]]:
        for i in taken:
            yield i, core.Request("Prompt", SAMPLED, str(i))

    results = host.complete(endless())
    for _ in range(50):
        next(results)
    assert next(taken) <= 50 + 4 * WAITING_PER_SLOT + 1
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(list(host.complete(requests(0, 5)))) == 5


def test_lengths_that_differ_much_leave_no_slot_free(host: EngineHost):
    """64 rows a slot, one in eight of them long, and results in order: who waits for the longest is not in the way."""
    lengths = [50 if i * 7 % 8 == 3 else 3 for i in range(64 * 4)]
    given = [
        (i, core.Request(f"Prompt {i}", core.Sampling(max_new_tokens=n, ignore_eos=True)))
        for i, n in enumerate(lengths)
    ]
    before = host._engine.counters.steps
    assert [i for i, _ in host.complete(given)] == list(range(256))
    assert sum(lengths) / 4 / (host._engine.counters.steps - before) >= 0.95


def test_who_called_first_is_served_first_and_others_get_what_is_left(host: EngineHost):
    first, second = host.call(), host.call()
    for call in (second, first):
        for i, request in requests(0, 40):
            call.ask(i, request)
    for _ in range(40):
        first.take()
    # What had a slot or the next one when the first came, and what was let in at his end.
    assert second.results.qsize() <= 20
    assert sorted(i for i, _ in (second.take() for _ in range(40))) == list(range(40))


def test_whoever_asks_again_is_told_again(host: EngineHost):
    call = host.call()
    for i, request in requests(0, 40):
        call.ask(i, request)
    host.close()
    for _ in range(2):
        with pytest.raises(JobError, match="closed"):
            _ = [call.take() for _ in range(41)]


def test_when_the_model_is_closed_all_who_wait_are_told_and_all_who_come(host: EngineHost):
    results = host.complete(requests(0, 400))
    next(results)
    host.close()
    for later in (results, host.complete(requests(0, 1))):
        with ThreadPoolExecutor(1) as pool, pytest.raises(JobError, match="closed"):
            pool.submit(list, later).result(timeout=20)


def test_when_the_engine_dies_all_who_wait_are_told_and_all_who_come(
    host: EngineHost, monkeypatch: pytest.MonkeyPatch
):
    advance, calls = core.Engine._advance, itertools.count()
    everyone_waits = threading.Barrier(4)

    def die(self: core.Engine, steps: int) -> None:
        if next(calls) == 0:
            everyone_waits.wait(10)
        if next(calls) > 8:
            raise MemoryError("out of device memory")
        advance(self, steps)

    monkeypatch.setattr(core.Engine, "_advance", die)

    def ask(n: int) -> BaseException | None:
        results = host.complete(requests(100 * n, 100))
        if n:
            everyone_waits.wait(10)
        try:
            list(results)
        except MemoryError as error:
            return error
        return None

    with ThreadPoolExecutor(4) as pool:
        deaths = list(pool.map(ask, range(4), timeout=60))
    assert all(isinstance(death, MemoryError) for death in deaths)
    with pytest.raises(MemoryError):
        list(host.complete(requests(0, 1)))
    assert isinstance(host.broken, MemoryError)


def test_a_device_is_named_with_what_its_bits_depend_on(monkeypatch):
    assert host_lib.device() == f"cpu {native.name()}"
    monkeypatch.setenv("FLAXMILL_NATIVE", "off")
    assert host_lib.device() == "cpu xla"


def test_a_model_whose_tokenizer_files_or_stop_ids_were_mended_is_loaded_again(model, tmp_path):
    mended = shutil.copytree(model, tmp_path / "mended")
    how: dict[str, Any] = {"slots": 4, "revision": plan.model_revision(mended)}
    last = shared(mended, **how)
    assert shared(mended, **how) is last
    for name in ("chat_template.jinja", "generation_config.json"):
        (mended / name).write_text("{}")
        now = shared(mended, **how)
        assert now is not last
        assert shared(mended, **how) is now
        last = now
    last.close()
