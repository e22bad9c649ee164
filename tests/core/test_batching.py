"""Requests that come, wait, share and go: whatever happens around one, its continuation is the one it has alone."""

import contextlib
import dataclasses
import itertools
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import tiny_gpt_oss
from core import build, decode, memory, native
from core.config import PRESETS, GPT2Config
from core.engine import Completion, Engine, Event, Request
from core.errors import EngineError, RequestError
from core.kv_cache import KVCache
from core.sampling import Sampling

CHUNK = 16


def tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, 256, count).tolist()


def menu() -> list[Request]:
    """Requests of every kind, some of the same prompt, some that begin with the same two chunks."""
    rng = np.random.default_rng(3)
    common = tokens(rng, 2 * CHUNK)
    prompts = [
        tokens(rng, 1),
        tokens(rng, 40),
        *(common + tokens(rng, n) for n in (1, 5, 5)),
        common,
    ]
    prompts += [prompts[1], prompts[3], [9, 8, 7] * 6]
    samplings = [
        Sampling(temperature=0, max_new_tokens=9, logprobs=2, ignore_eos=True),
        Sampling(max_new_tokens=7, seed=5, logprobs=0),
        Sampling(temperature=0.7, top_k=7, repetition_penalty=1.3, max_new_tokens=21),
        Sampling(temperature=0, frequency_penalty=1.5, min_new_tokens=3, max_new_tokens=12),
        Sampling(top_p=0.8, logit_bias={65: 4.0, 66: 4.0}, bad_ids=(67,), max_new_tokens=5),
    ]
    return [
        Request(prompt, samplings[i % len(samplings)], id=str(i))
        for i, prompt in enumerate(prompts)
    ]


MENU = menu()


def three_slots(engine: Engine) -> Engine:
    """Prompts by chunks of 16, room for a few beginnings."""
    return Engine(
        engine.model, engine.params, engine.tokenizer, slots=3, chunk=CHUNK, prefix_cache=200_000
    )


@pytest.fixture
def small(engine: Engine) -> Engine:
    return three_slots(engine)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Completion]:
    """Each by itself, in an engine that has served nobody before and keeps nothing."""
    results = []
    for request in MENU:
        lone = Engine(engine.model, engine.params, engine.tokenizer, slots=3, chunk=CHUNK)
        results += lone.complete([request])
    assert len({result.tokens for result in results}) == len(results)
    return results


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=25)
def test_arrivals_lengths_and_cancellations_change_no_bit(engine: Engine, alone, data):
    """Requests come at any time, in any order, and some are cancelled."""
    small = three_slots(engine)
    waiting = data.draw(st.lists(st.sampled_from(range(len(MENU))), max_size=12), "requests")
    open_: dict[int, int] = {}
    events: dict[int, list[Event]] = {}
    for _ in range(10_000):
        while waiting and (not small.busy or data.draw(st.booleans(), "arrives")):
            place = waiting.pop()
            ticket = small.submit(MENU[place])
            open_[ticket], events[ticket] = place, []
        if open_ and data.draw(st.integers(0, 9), "cancels") == 0:
            ticket = data.draw(st.sampled_from(sorted(open_)))
            cancelled = small.cancel(ticket)
            whole = alone[open_.pop(ticket)]
            if cancelled is not None:
                assert cancelled.finish_reason == "cancelled"
                assert cancelled.tokens == whole.tokens[: len(cancelled.tokens)]
            del events[ticket]
        for event in small.step(data.draw(st.sampled_from([1, 2, 32]), "steps")):
            events[event.request].append(event)
            if event.result is not None:
                assert event.result == alone[open_.pop(event.request)]
        if not (waiting or open_ or small.busy):
            break
    assert not open_
    for given_ in events.values():
        result = given_[-1].result
        assert isinstance(result, Completion)
        assert tuple(event.token for event in given_) == result.tokens
        assert "".join(event.text for event in given_) == result.text


def test_what_prompts_have_in_common_is_fed_once(small: Engine, engine: Engine, alone):
    """A chunk is kept when it comes a second time, so the third request and the fourth skip two chunks each."""
    fresh = Engine(
        engine.model, engine.params, engine.tokenizer, slots=3, chunk=CHUNK, prefix_cache=10**6
    )
    shared = [2, 3, 4, 5]
    found = [fresh.complete([MENU[i]])[0] for i in shared]
    assert found == [alone[i] for i in shared]
    # The last prompt is the two chunks themselves; its second one is fed, because its last token must be.
    fed = [len(MENU[i].prompt) for i in shared]
    assert fresh.counters.reused_tokens == 2 * CHUNK + CHUNK
    assert fresh.counters.prompt_tokens == sum(fed) - fresh.counters.reused_tokens


def test_no_more_beginnings_are_kept_than_fit(engine: Engine, alone):
    chunk = jax.eval_shape(lambda: KVCache.zeros(engine.model.config, 1, CHUNK))
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(chunk))
    tight = Engine(
        engine.model, engine.params, engine.tokenizer, slots=3, chunk=CHUNK, prefix_cache=one
    )
    for _ in range(3):
        found = [tight.complete([MENU[i]])[0] for i in (1, 2, 3)]
        assert found == [alone[i] for i in (1, 2, 3)]
        assert tight._prefixes.nbytes <= one
    assert tight._prefixes.nbytes == one


def test_a_cache_that_holds_no_chunk_is_none(
    engine: Engine, alone, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is read out of a slot that nobody could keep."""
    chunk = jax.eval_shape(lambda: KVCache.zeros(engine.model.config, 1, CHUNK))
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(chunk))
    given = engine.model, engine.params, engine.tokenizer
    none, less = (Engine(*given, slots=3, chunk=CHUNK, prefix_cache=n) for n in (0, one - 1))
    monkeypatch.setattr(decode, "read_chunk", None)
    for _ in range(3):
        assert less.complete([MENU[2]]) == [alone[2]]
    assert less.counters.reused_tokens == 0
    assert less.nbytes == none.nbytes


def test_what_an_engine_takes_holds_what_it_may_keep_and_tell(engine: Engine):
    """Caches, logits, counts and bias; 33 tokens a dispatch with their scores; beginnings."""
    config = engine.model.config
    assert isinstance(config, GPT2Config)
    each = 64 * 2 * config.n_layer * config.n_embd * 4 + 3 * 4 * config.vocab_size
    told = 4 + 33 * (4 + 4 + 8 * 7)
    found = Engine(
        engine.model, engine.params, slots=3, chunk=16, top_logprobs=7, prefix_cache=10**6
    )
    assert found.nbytes == 3 * (each + told) + 4 + 10**6


def test_equal_prompts_that_come_together_share_a_prefill(small: Engine, engine: Engine, alone):
    fresh = Engine(engine.model, engine.params, engine.tokenizer, slots=3, chunk=CHUNK)
    prompt = MENU[1].prompt
    requests = [Request(prompt, MENU[i].sampling, MENU[i].id) for i in (1, 6, 2)]
    together = fresh.complete(requests)
    assert fresh.counters.prompt_tokens == len(prompt)
    assert fresh.counters.reused_tokens == 2 * len(prompt)
    assert together[:2] == [alone[1], alone[6]]
    assert together[2] == fresh.complete(requests[2:])[0]


def test_a_free_slot_is_refilled_at_once(engine: Engine):
    """Lengths of 3 to 60: while anyone waits no slot stands still, so the steps are those of the longest pile."""
    rng = np.random.default_rng(1)
    lengths = rng.permutation([50, 40] + [3, 4, 5, 6, 9, 12] * 5).tolist()
    fresh = Engine(engine.model, engine.params, engine.tokenizer, slots=5)
    requests = [
        Request([i], Sampling(temperature=0, max_new_tokens=n, ignore_eos=True))
        for i, n in enumerate(lengths)
    ]
    results = fresh.complete(requests)
    assert [len(c.tokens) for c in results if isinstance(c, Completion)] == lengths
    # The first token of each comes from its prompt.
    assert fresh.counters.tokens == sum(lengths)
    steps = sum(lengths) - len(lengths)
    assert fresh.counters.steps <= steps / 5 + 50


def test_leaving_a_stream_cancels_what_is_not_done(small: Engine, alone):
    stream = small.stream(itertools.cycle(MENU))
    for _ in range(5):
        next(stream)
    assert small.busy
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not small.busy
    assert small.complete(MENU) == alone


def test_streams_side_by_side_have_their_own_events(small: Engine, alone):
    one, two = small.stream(MENU[:3]), small.stream(MENU[3:6])
    results: dict[int, Any] = {}
    for events, first in itertools.cycle([(one, 0), (two, 3)]):
        event = next(events, None)
        if event is None and len(results) == 6:
            break
        if event is not None and event.result is not None:
            results[first + event.request] = event.result
    assert [results[i] for i in range(6)] == alone[:6]


def test_requests_are_taken_as_slots_become_free(small: Engine):
    """A source that never ends costs no more than what the slots hold."""
    taken = itertools.count()

    def endless():
        for i in taken:
            yield Request([i % 256], Sampling(temperature=0, max_new_tokens=3))

    stream = small.stream(endless())
    for _ in range(200):
        next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(taken) < 200 / 3 + 3 * small.slots + 3


def test_an_engine_that_failed_forgets_what_ran_and_serves_the_next(engine: Engine, alone):
    """Ctrl-C in the middle of a dispatch."""
    calls = itertools.count()
    broken = Engine(engine.model, engine.params, engine.tokenizer, slots=3, chunk=CHUNK)
    deliver = broken._deliver

    def interrupted(out: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        deliver(out)

    broken._deliver = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.complete(MENU)
    assert not broken.busy
    assert broken.complete(MENU[:3]) == alone[:3]


def test_a_stream_that_another_caller_s_failure_lost_says_so(engine: Engine):
    shared = Engine(engine.model, engine.params, engine.tokenizer, slots=3, chunk=CHUNK)
    stream = shared.stream(MENU[:3])
    next(stream)
    shared._deliver = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        shared.complete(MENU[3:4])
    del shared._deliver
    with pytest.raises(EngineError, match="failed for another caller"):
        list(stream)


def test_a_ticket_is_cancelled_once_and_gives_what_there_is(small: Engine, alone):
    a, b, c, d = sorted(range(len(MENU)), key=lambda i: len(alone[i].tokens))[-4:]
    tickets = {i: small.submit(MENU[i]) for i in (a, b, c, d)}
    events = small.step(1)
    assert {event.request for event in events} == {tickets[i] for i in (a, b, c)}
    waiting = small.cancel(tickets[d])
    assert waiting is not None
    assert (waiting.tokens, waiting.text, waiting.finish_reason) == ((), "", "cancelled")
    begun = small.cancel(tickets[b])
    assert begun is not None
    assert 1 <= len(begun.tokens) < len(alone[b].tokens)
    assert begun.tokens == alone[b].tokens[: len(begun.tokens)]
    assert small.cancel(tickets[b]) is None
    assert small.cancel(10**6) is None
    while small.busy:
        events += small.step()
    ended = {event.request: event.result for event in events if event.result is not None}
    assert ended == {tickets[a]: alone[a], tickets[c]: alone[c]}


def test_a_request_of_no_tokens_keeps_the_engine_busy_until_its_event_is_given(small: Engine):
    request = Request("a", Sampling(max_new_tokens=0))
    ticket = small.submit(request)
    assert small.busy
    (event,) = small.step()
    assert (event.request, event.finish_reason) == (ticket, "length")
    assert not small.busy
    ended = small.cancel(small.submit(request))
    assert ended is not None
    assert ended.finish_reason == "length"
    assert not small.busy
    assert small.step() == []


def test_more_memory_than_there_is_is_refused_with_the_arithmetic():
    """16 full contexts of the 20B; nothing has been allocated then, not even the parameters."""
    model = build(PRESETS["gpt-oss-120b"])
    params = {"wte": {"embedding": np.zeros((1, 1), np.float32)}}
    with pytest.raises(EngineError) as caught:
        Engine(model, params, slots=4096)
    message = str(caught.value)
    assert "4096 slots of 131072 positions take 4096 x 9.68 GB = 3.96e+04 GB;" in message
    assert "are free: give fewer slots (at most " in message
    assert "shorter length" in message


def test_beginnings_for_which_there_is_no_memory_are_in_the_arithmetic(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "free", lambda device: 10**6)
    given = engine.model, engine.params
    assert Engine(*given, slots=3).nbytes < 10**6
    with pytest.raises(EngineError) as caught:
        Engine(*given, slots=3, prefix_cache=990_000)
    message = str(caught.value)
    assert "kB, and prefix_cache 990 kB; 1 MB are free: give fewer slots (at most 0)," in message
    assert message.endswith("a shorter length or less prefix_cache")


def test_tokens_that_were_drawn_after_a_stop_string_count_as_nothing(engine: Engine):
    greedy = Sampling(temperature=0, max_new_tokens=12, ignore_eos=True)
    (whole,) = engine.complete([Request([5, 6], greedy)])
    assert isinstance(whole, Completion)
    fresh = Engine(engine.model, engine.params, engine.tokenizer, slots=3)
    stopped = dataclasses.replace(greedy, stop=(whole.text[2],))
    results = fresh.complete([Request([5, 6], stopped), Request([7], greedy)])
    lengths = [len(c.tokens) for c in results if isinstance(c, Completion)]
    assert lengths[0] < 8 < lengths[1] == 12
    assert fresh.counters.tokens == sum(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4])
def test_speculation_changes_nothing_but_the_number_of_steps(engine: Engine, k: int):
    """Greedy and drawn, with penalties that see every token; one text repeats itself."""
    plain = Engine(engine.model, engine.params, engine.tokenizer, slots=2)
    quick = Engine(engine.model, engine.params, engine.tokenizer, slots=2, speculation=k)
    loop = Request(
        [9, 8, 7] * 6,
        Sampling(temperature=0, allowed_ids=(8, 9), max_new_tokens=40),
        id="loop",
    )
    requests = [*MENU, loop]
    expected, found = plain.complete(requests), quick.complete(requests)
    for one, other in zip(expected, found, strict=True):
        assert isinstance(one, Completion)
        assert isinstance(other, Completion)
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        if one.logprobs is not None:
            assert other.logprobs is not None
            pairs = zip(one.logprobs, other.logprobs, strict=True)
            assert all(a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in pairs)
    before = quick.counters.steps
    quick.complete([loop])
    assert quick.counters.steps - before <= 40 / (k + 1) + 5


@pytest.mark.slow
def test_speculation_in_rings_takes_back_what_did_not_come_true():
    """GPT-OSS with windows of 4: guesses that are wrong must not push out what the next token sees."""
    config = tiny_gpt_oss.config(sliding_window=4, num_hidden_layers=2)
    model = build(config)
    params = tiny_gpt_oss.params(tiny_gpt_oss.weights(config, 10))
    greedy = Sampling(temperature=0, max_new_tokens=30, ignore_eos=True)
    prompts = [[1, 2, 3, 1, 2, 4, 1, 2], [5, 6] * 8, [7, 8, 9, 7, 8]]
    requests = [Request(prompt, greedy) for prompt in prompts]
    plain = Engine(model, params, slots=2).complete(requests)
    quick = Engine(model, params, slots=2, speculation=3).complete(requests)
    assert quick == plain


@pytest.mark.parametrize(
    ("kernels", "kind"),
    [
        ("native", "gpt2"),
        pytest.param("xla", "rings", marks=pytest.mark.slow),
        pytest.param("native", "rings", marks=pytest.mark.slow),
        pytest.param("xla", "gpt2", marks=pytest.mark.slow),
    ],
)
def test_a_row_of_no_numbers_is_that_request_s_error_and_leaves_nothing_in_its_slot(
    engine: Engine, kind: str, kernels: str, monkeypatch: pytest.MonkeyPatch
):
    """A token whose embedding is damaged, in the prompt of one request and drawn by another; then the slot's next."""
    if kernels == "xla":
        monkeypatch.setattr(native, "serving", contextlib.nullcontext)
    if kind == "gpt2":
        model, params, damaged = engine.model, dict(engine.params), 98
    else:
        config = tiny_gpt_oss.config(sliding_window=4, num_hidden_layers=2)
        model, params = build(config), dict(tiny_gpt_oss.params(tiny_gpt_oss.weights(config, 10)))
        damaged = 9
    table = np.array(params["wte"]["embedding"])
    table[damaged] = np.nan
    if kind == "gpt2":  # whose head is the same table: the id's own logit is no number either
        model = build(dataclasses.replace(model.config, tie_word_embeddings=False))
        params["lm_head"] = {"kernel": engine.params["wte"]["embedding"]}
    params["wte"] = {"embedding": table}
    greedy = Sampling(temperature=0, max_new_tokens=9, bad_ids=(damaged,), ignore_eos=True)
    fine = [Request([1, 2, 3, 4, 5, 6, 7], greedy), Request([5] * 20, greedy)]
    expected = Engine(model, params, slots=2, chunk=CHUNK).complete(fine)
    prompts = [[1, damaged], [damaged] * 20, [3] * 17 + [damaged]]
    draws = dataclasses.replace(greedy, bad_ids=(), allowed_ids=(damaged,))
    bad = [*(Request(prompt, greedy) for prompt in prompts), Request([7, 7], draws)]
    used = Engine(model, params, slots=2, chunk=CHUNK)
    for request in bad:
        first, error, second = used.complete([fine[0], request, fine[1]])
        assert [first, second] == expected
        assert isinstance(error, RequestError)
        assert error.code == "not_a_number"


@pytest.mark.slow
def test_ten_thousand_requests_through_sixteen_slots_take_no_more_memory(engine: Engine):
    import psutil

    wide = Engine(engine.model, engine.params, engine.tokenizer, slots=16, prefix_cache=200_000)
    rng = np.random.default_rng(0)

    def requests(count: int):
        for i in range(count):
            prompt = tokens(rng, int(rng.integers(1, 40)))
            yield Request(prompt, Sampling(max_new_tokens=int(rng.integers(1, 9)), seed=i))

    def serve(count: int) -> int:
        for _ in wide.stream(requests(count)):
            pass
        return psutil.Process().memory_info().rss

    first = serve(1_000)
    assert serve(9_000) - first < 8e6
    assert wide.counters.tokens > 30_000
