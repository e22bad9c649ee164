import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import reference
import tiny
from core import decode, memory
from core.engine import Completion, Engine, Event, Request, RequestError
from core.errors import EngineError
from core.models import build
from core.sampling import Sampling
from core.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPTS = ["a", "hello", "flax mill", "zwölf", "0123456789abc", "the quick", "brown fox", "jumps"]


def complete(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    results = engine.complete(requests)
    assert all(isinstance(result, Completion) for result in results), results
    return [result for result in results if isinstance(result, Completion)]


def varied_requests() -> list[Request]:
    """Greedy and drawn, filtered and not, short and long, with log-probabilities, all of one prefill bucket."""
    samplings = [
        Sampling(temperature=0, max_new_tokens=20, logprobs=3),
        Sampling(max_new_tokens=30, seed=1, logprobs=3),
        Sampling(temperature=0.8, top_k=9, top_p=0.9, max_new_tokens=9, logprobs=3),
        Sampling(temperature=1.5, min_p=0.01, repetition_penalty=1.5, seed=7, logprobs=3),
    ]
    return [
        Request(prompt, samplings[i % len(samplings)], id=f"row {i}")
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def varied(engine: Engine) -> dict[Any, Completion]:
    requests = varied_requests()
    return {r.id: c for r, c in zip(requests, complete(engine, requests), strict=True)}


def test_greedy_tokens_are_the_argmax_of_the_uncached_logits(engine):
    completions = complete(engine, [Request(prompt, GREEDY) for prompt in PROMPTS])
    assert len({token for completion in completions for token in completion.tokens}) > 20
    for completion in completions:
        tokens = [*completion.prompt_tokens, *completion.tokens]
        logits_TV = reference.logits(engine.model.config, engine.params, [tokens[:-1]])[0]
        readable_TV = logits_TV[len(completion.prompt_tokens) - 1 :, : engine.tokenizer.vocab_size]
        assert list(completion.tokens) == readable_TV.argmax(-1).tolist()
        ended = completion.tokens[-1] == engine.tokenizer.eos_id
        assert completion.finish_reason == ("eos" if ended else "length")
        assert len(completion.tokens) == 12 or ended
        assert completion.text == engine.tokenizer.decode(
            completion.tokens[: -1 if ended else None]
        )


def test_log_probabilities_are_the_reference_s(engine, varied):
    for completion in varied.values():
        tokens = [*completion.prompt_tokens, *completion.tokens]
        logits_TV = reference.logits(engine.model.config, engine.params, [tokens[:-1]])[0]
        expected_TV = reference.log_softmax(logits_TV)[len(completion.prompt_tokens) - 1 :]
        assert len(completion.logprobs) == len(completion.tokens) == len(expected_TV)
        for score, token, expected_V in zip(
            completion.logprobs, completion.tokens, expected_TV, strict=True
        ):
            assert score.token == token
            assert score.logprob == pytest.approx(expected_V[token], abs=2e-5)
            ids, values = zip(*score.top, strict=True)
            assert list(ids) == np.argsort(-expected_V)[:3].tolist()
            np.testing.assert_allclose(values, expected_V[list(ids)], atol=2e-5)


@pytest.mark.parametrize("order", ["alone", "reversed", "every other", "twice"])
def test_a_row_has_the_same_bits_whatever_its_neighbours_and_place(engine, varied, order):
    requests = varied_requests()
    batches = {
        "alone": [[request] for request in requests],
        "reversed": [requests[::-1]],
        "every other": [requests[::2], requests[1::2]],
        "twice": [requests + requests],
    }[order]
    for batch in batches:
        for request, completion in zip(batch, complete(engine, batch), strict=True):
            assert completion == varied[request.id]  # tokens, text and every log-probability


def test_a_bad_request_is_a_value_and_disturbs_nobody(engine, varied):
    requests = varied_requests()
    results = engine.complete(
        [Request(""), requests[0], Request([999]), *requests[1:], Request("x" * 62)]
    )
    codes = [r.code if isinstance(r, RequestError) else None for r in results]
    assert codes == ["prompt_empty", None, "token_out_of_range", *[None] * 7, "prompt_too_long"]
    assert [r for r in results if isinstance(r, Completion)] == list(varied.values())


def test_draws_depend_on_seed_and_id(engine):
    def tokens(seed: int, id: str | None) -> tuple[int, ...]:
        request = Request("flax", Sampling(seed=seed, max_new_tokens=12, logprobs=3), id=id)
        return complete(engine, [request])[0].tokens

    assert tokens(0, "a") == tokens(0, "a")
    assert len({tokens(0, "a"), tokens(1, "a"), tokens(2**32, "a"), tokens(0, "b")}) == 4
    assert tokens(3, None) == tokens(3, "0")  # without an id, the place in the call


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=0.9, top_k=20, seed=5, max_new_tokens=13)], ids=str
)
def test_a_stream_is_the_completion_in_pieces(engine, sampling):
    for id, prompt in enumerate(PROMPTS[:4]):
        request = Request(prompt, sampling, id=str(id))
        (whole,) = complete(engine, [request])
        events = list(engine.stream([request]))
        assert tuple(event.token for event in events) == whole.tokens
        assert "".join(event.text for event in events) == whole.text
        reasons = [event.finish_reason for event in events]
        assert reasons == [None] * (len(events) - 1) + [whole.finish_reason]


def test_a_stream_of_no_tokens_ends_at_once(engine):
    request = Request("flax", Sampling(max_new_tokens=0))
    (completion,) = complete(engine, [request])
    assert list(engine.stream([request])) == [Event(0, None, "", completion)]
    assert (completion.tokens, completion.text, completion.finish_reason) == ((), "", "length")


@pytest.mark.parametrize("length", [50, 60, 61])
def test_a_continuation_ends_with_the_context(engine, length):
    """The last token is produced from a full context, so a prompt that fills it still gets one."""
    positions = engine.model.config.n_positions
    prompt = np.asarray(tiny.tokens(engine.model.config, length) % 256).tolist()
    (whole,) = complete(engine, [Request(prompt, Sampling(temperature=0, max_new_tokens=99))])
    assert whole.finish_reason == "length"
    assert len(whole.tokens) == positions - length + 1
    tokens = [*whole.prompt_tokens, *whole.tokens]
    logits_TV = reference.logits(engine.model.config, engine.params, [tokens[:-1]])[0]
    assert (
        tokens[length:]
        == logits_TV[length - 1 :, : engine.tokenizer.vocab_size].argmax(-1).tolist()
    )


def scripted(script: str, tokenizer: Tokenizer, eos_after: int | None = None) -> Any:
    """A sampler that writes `script` whatever the model says: its place is how many tokens the row has produced."""
    ids: list[Any] = tokenizer.encode(script)
    if eos_after is not None:
        ids[eos_after:] = [tokenizer.eos_id] * (len(ids) - eos_after)
    script_T = jnp.asarray(ids, jnp.int32)
    letters = len(set(ids))
    assert letters == len(ids) or eos_after is not None, "each token must be new"

    def sampler(logits_BV, keys_B, settings, counts_BV, bias_BV, produced_B, stop_ids):
        del logits_BV, keys_B, settings, counts_BV, bias_BV, stop_ids
        return script_T[jnp.minimum(produced_B, len(ids) - 1)]

    return sampler


def test_a_custom_sampler_draws_the_tokens_and_sees_the_rows_settings(engine):
    def kth_best(logits_BV, keys_B, settings, *others):
        del keys_B, others
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        return jnp.take_along_axis(order_BV, settings.top_k_B[:, None], axis=-1)[:, 0]

    custom = Engine(engine.model, engine.params, engine.tokenizer, slots=5, sampler=kth_best)
    requests = [Request("flax", Sampling(top_k=k, max_new_tokens=1)) for k in (0, 1, 2)]
    found = [c.tokens[0] for c in complete(custom, requests)]
    logits_V = reference.logits(
        engine.model.config, engine.params, [engine.tokenizer.encode("flax")]
    )
    assert found == np.argsort(-logits_V[0, -1, : engine.tokenizer.vocab_size])[:3].tolist()


@pytest.fixture(scope="module")
def alphabet(engine) -> Engine:
    """Continues any one-letter prompt with bcdé...; the letters are all different, so a row's place is known."""
    sampler = scripted("bcdefgéhijklmn", engine.tokenizer)
    return Engine(engine.model, engine.params, engine.tokenizer, slots=2, sampler=sampler)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("g",), "bcdef"),
        (("efg",), "bcd"),
        (("zz", "fgé", "de"), "bc"),
        (("éh",), "bcdefg"),
        (("b",), ""),
        (("never", "bcdx", "klm?"), "bcdefgéhijkl"),
        (("ij", "hijk"), "bcdefgéh"),
        (("fg", "efg"), "bcd"),  # one token completes both
        (("efgéh", "gz"), "bcd"),  # "efg" may begin either; the longer beginning is held back
    ],
    ids=str,
)
def test_text_ends_before_the_first_stop_string(alphabet, stop, text):
    sampling = Sampling(stop=stop, max_new_tokens=13)
    (whole,) = complete(alphabet, [Request("a", sampling)])
    assert whole.text == text
    assert whole.finish_reason == ("length" if text.endswith("l") else "stop")
    events = list(alphabet.stream([Request("a", sampling)]))
    pieces = [event.text for event in events]
    assert "".join(pieces) == text
    assert tuple(event.token for event in events) == whole.tokens
    assert events[-1].finish_reason == whole.finish_reason
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_stop_string_stops_its_own_row_only(alphabet):
    requests = [
        Request("a", Sampling(stop=("d",), max_new_tokens=13)),
        Request("a", Sampling(stop=("k",), max_new_tokens=13)),
        Request("a", Sampling(max_new_tokens=13)),
    ]
    texts = [c.text for c in complete(alphabet, requests)]
    assert texts == ["bc", "bcdefgéhij", "bcdefgéhijkl"]


def test_eos_ends_the_text_and_is_a_token_but_no_text(engine):
    sampler = scripted("bcdefghi", engine.tokenizer, eos_after=3)
    scripts = Engine(engine.model, engine.params, engine.tokenizer, slots=2, sampler=sampler)
    eos = engine.tokenizer.eos_id
    through = Sampling(ignore_eos=True, max_new_tokens=5)
    ended, ignored = complete(scripts, [Request("a"), Request("a", through)])
    assert ended.finish_reason == "eos"
    assert ended.tokens == (*engine.tokenizer.encode("bcd"), eos)
    assert ended.text == "bcd"
    assert ignored.finish_reason == "length"
    assert ignored.tokens == (*engine.tokenizer.encode("bcd"), eos, eos)
    assert ignored.text == "bcd<|endoftext|><|endoftext|>"


def test_any_of_several_ends_of_text_ends_it(engine):
    letters = engine.tokenizer.encode("bcdefghi")
    config = dataclasses.replace(engine.model.config, eos_token_id=(letters[5], letters[3]))
    sampler = scripted("bcdefghi", engine.tokenizer)
    scripts = Engine(build(config), engine.params, engine.tokenizer, slots=2, sampler=sampler)
    (ended,) = complete(scripts, [Request("a")])
    assert (ended.finish_reason, ended.tokens) == ("eos", tuple(letters[:4]))


def test_rows_of_a_padded_vocabulary_are_never_drawn(engine):
    hot = Sampling(temperature=50, max_new_tokens=40, ignore_eos=True)
    completions = complete(engine, [Request("a", hot, id=str(i)) for i in range(10)])
    drawn = {token for completion in completions for token in completion.tokens}
    assert len(drawn) > 150
    assert max(drawn) < engine.tokenizer.vocab_size < engine.model.config.vocab_size


def test_score_is_the_reference_s_log_probability(engine):
    tokens = engine.tokenizer.encode("flax mill")
    first, *scores = engine.score(tokens, top=4)
    assert (first.token, first.logprob, first.top) == (tokens[0], None, ())
    logits_TV = reference.logits(engine.model.config, engine.params, [tokens])[0]
    expected_TV = reference.log_softmax(logits_TV)
    for t, score in enumerate(scores):
        assert score.token == tokens[t + 1]
        assert score.logprob == pytest.approx(expected_TV[t, tokens[t + 1]], abs=2e-5)
        assert [id for id, _ in score.top] == np.argsort(-expected_TV[t])[:4].tolist()


@pytest.fixture(scope="module")
def long_engine() -> Engine:
    """A context of more positions than have their logits at once, and a vocabulary that outweighs the rest."""
    model = build(tiny.config(vocab_size=4001, n_positions=700, n_layer=1))
    return Engine(model, tiny.params(model, amplify=25), slots=1, length=16)


def test_a_long_text_is_scored_by_pieces_of_the_same_numbers(long_engine: Engine):
    model, params = long_engine.model, long_engine.params
    tokens_1T = tiny.tokens(model.config, 1, 700)
    logits_TV = reference.logits(model.config, params, tokens_1T)[0]
    chosen_T, ids_TK, values_TK = decode.score(long_engine._statics, 3, params, tokens_1T)
    expected_TV = reference.log_softmax(logits_TV[:-1])
    places_T = np.arange(699)
    np.testing.assert_allclose(chosen_T, expected_TV[places_T, tokens_1T[0, 1:]], atol=5e-5)
    np.testing.assert_array_equal(ids_TK, np.argsort(-expected_TV)[:, :3])
    expected_TK = np.take_along_axis(expected_TV, np.asarray(ids_TK), axis=1)
    np.testing.assert_allclose(values_TK, expected_TK, atol=5e-5)


def test_a_long_text_s_logits_are_never_all_there(long_engine: Engine):
    model = build(tiny.config(vocab_size=20_001, n_positions=640, n_layer=1))
    statics = dataclasses.replace(long_engine._statics, model=model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = jax.ShapeDtypeStruct((1, 640), jnp.int32)
    memory = decode.score.lower(statics, 3, params, shape).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 640 * 20_001


def test_scores_for_which_there_is_no_memory_are_refused_with_the_arithmetic(
    long_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "free", lambda device: 1_500_000)
    with pytest.raises(
        EngineError, match=r"scores of 16 tokens with the 4001 likeliest take 1\.79 MB"
    ):
        long_engine.score([1, 2], top=4001)
    assert long_engine.score([1, 2], top=1)


@pytest.mark.parametrize("id_", [7, np.int64(7)])
def test_a_number_is_the_id_of_its_digits(engine: Engine, id_: Any):
    named, numbered, other = (
        Request([1, 2], Sampling(max_new_tokens=9), id=i) for i in ("7", id_, 8)
    )
    found = complete(engine, [named, numbered, other])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("id_", [1.5, True, b"7", ["7"]])
def test_an_id_that_is_none_is_the_request_s_error(engine: Engine, id_: Any):
    (result,) = engine.complete([Request([1, 2], id=id_)])
    assert isinstance(result, RequestError)
    assert result.code == "bad_id"
    assert f"the id is {id_!r}; expected a string or a whole number" in str(result)


@pytest.mark.parametrize(
    ("prompt", "code", "says"),
    [
        ("", "prompt_empty", "at least one token"),
        ([], "prompt_empty", "at least one token"),
        ("x" * 62, "prompt_too_long", "62 tokens; the model's context is 61"),
        ([3, 263], "token_out_of_range", "263 is outside the model's vocabulary of 263"),
        ([-1], "token_out_of_range", "-1 is outside"),
        ("\ud800", "bad_prompt", "not valid Unicode"),
        ([1.5], "bad_prompt", "neither text nor a list of token ids"),
        ([True], "bad_prompt", "neither text nor a list of token ids"),
        (["a", "b"], "bad_prompt", "neither text nor a list of token ids"),
        (None, "bad_prompt", "neither text nor a list of token ids"),
        (7, "bad_prompt", "neither text nor a list of token ids"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_request_that_cannot_be_served_has_a_stable_code(engine, prompt, code, says):
    (result,) = engine.complete([Request(prompt)])
    assert isinstance(result, RequestError)
    assert (result.code, says in str(result), "\n" in str(result)) == (code, True, False)
    with pytest.raises(RequestError) as caught:
        engine.generate(["fine", prompt])
    assert caught.value.code == code
    (event,) = engine.stream([Request(prompt)])
    assert isinstance(event.result, RequestError)
    assert (event.token, event.result.code, event.finish_reason) == (None, code, None)


def test_text_needs_a_tokenizer_and_ids_do_not(engine):
    bare = Engine(engine.model, engine.params, slots=5)
    text, ids = bare.complete([Request("flax"), Request([5, 6, 7], GREEDY)])
    assert isinstance(text, RequestError)
    assert text.code == "tokenizer_missing"
    assert isinstance(ids, Completion)
    assert ids.text == ""
    assert len(ids.tokens) == 12


def test_more_alternatives_than_the_vocabulary_are_all_of_it(engine):
    wide = Engine(engine.model, engine.params, slots=1, top_logprobs=9999)
    sampling = Sampling(max_new_tokens=1, logprobs=9999)
    (result,) = complete(wide, [Request([1], sampling)])
    assert result.logprobs is not None
    assert len(result.logprobs[0].top) == engine.model.config.vocab_size
    assert len(engine.score([1, 2], top=9999)[1].top) == engine.model.config.vocab_size


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        (Sampling(logprobs=21), "logprobs is 21; this engine gives at most 20"),
        (Sampling(logit_bias={262: 1.0}), "262"),  # a row of the padding
        (Sampling(bad_ids=(300,)), "300"),
        (Sampling(allowed_ids=(400,)), "400"),
        (Sampling(allowed_ids=(256,), min_new_tokens=2), "leave"),  # the end of the text alone
    ],
    ids=str,
)
def test_settings_that_this_model_cannot_follow_are_the_request_s_error(engine, sampling, says):
    bad, fine = engine.complete([Request("a", sampling), Request("a", GREEDY)])
    assert isinstance(bad, RequestError)
    assert (bad.code, says in str(bad)) == ("bad_sampling", True)
    assert isinstance(fine, Completion)


def test_an_engine_compiles_once_a_chunk_size_and_once_more(engine, caplog):
    """Whatever the prompts' lengths, the settings and the number of requests."""
    fresh = Engine(engine.model, engine.params, engine.tokenizer, slots=3, top_logprobs=4)
    for rows in (1, 4, 11):
        samplings = [
            GREEDY,
            Sampling(max_new_tokens=rows, seed=rows, top_k=5, logprobs=3),
            Sampling(max_new_tokens=3, stop=("a",), allowed_ids=(1, 2, 97), presence_penalty=1.0),
        ]
        requests = [Request("z" * (5 * i + 1), samplings[i % 3]) for i in range(rows)]
        with jax.log_compiles():
            complete(fresh, requests)
            list(fresh.stream(requests))
    assert fresh._chunks == (16, 32, 64)
    compiled = [record.args[0] for record in caplog.records if "Compiling" in record.msg]
    assert sum("prefill" in name for name in compiled) == 3, compiled
    assert sum("decode" in name for name in compiled) == 1, compiled


def test_a_long_prompt_goes_in_by_chunks(engine):
    """50 tokens as 16, 16, 16 and 2, while another request is decoding in the next slot."""
    narrow = Engine(engine.model, engine.params, engine.tokenizer, slots=2, chunk=16)
    prompt = "the long prompt that no chunk of sixteen can hold."
    short, long = complete(narrow, [Request("a", GREEDY), Request(prompt, GREEDY)])
    assert len(long.prompt_tokens) == 50
    assert [short.tokens, long.tokens] == [
        c.tokens for c in complete(engine, [Request("a", GREEDY), Request(prompt, GREEDY)])
    ]


@pytest.mark.parametrize(
    ("length", "sizes"),
    [(9, [16]), (17, [32]), (24, [32]), (40, [32, 16]), (48, [32, 16]), (49, [64])],
)
def test_no_more_than_a_quarter_of_a_chunk_is_padding_but_of_the_smallest(
    engine, monkeypatch, length, sizes
):
    fed, prefill = [], decode.prefill

    def watched(statics, params, state, tokens_1T, *rest):
        fed.append(tokens_1T.shape[1])
        return prefill(statics, params, state, tokens_1T, *rest)

    monkeypatch.setattr(decode, "prefill", watched)
    complete(engine, [Request("z" * length, GREEDY)])
    assert fed == sizes


def test_logits_are_computed_after_a_prompt_s_last_chunk_alone(engine, monkeypatch):
    computed, prefill = [], decode.prefill

    def watched(statics, params, state, tokens_1T, start, length, slot, *rest):
        state = prefill(statics, params, state, tokens_1T, start, length, slot, *rest)
        computed.append(bool(state.logits_BV[slot].any()))
        return state

    monkeypatch.setattr(decode, "prefill", watched)
    complete(engine, [Request("z" * 40, GREEDY)])
    assert computed == [False, True]


def test_log_probabilities_come_without_alternatives_too(engine):
    (completion,) = complete(engine, [Request("a", Sampling(max_new_tokens=2, logprobs=0))])
    assert completion.logprobs is not None
    assert [score.top for score in completion.logprobs] == [(), ()]
    first, second = engine.score([5, 6])
    assert (first.top, second.top) == ((), ())
    assert second.logprob is not None
    assert engine.score([5]) == [first]


def test_scoring_nothing_is_a_request_error(engine):
    with pytest.raises(RequestError) as caught:
        engine.score([])
    assert caught.value.code == "prompt_empty"


def test_generate_gives_the_texts_in_order(engine):
    expected = [c.text for c in complete(engine, [Request(p, GREEDY) for p in PROMPTS])]
    assert engine.generate(PROMPTS, GREEDY) == expected


def test_bfloat16_parameters_generate(model):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(model))
    half = Engine(model, params, slots=2)
    (completion,) = complete(half, [Request([1, 2, 3], GREEDY)])
    assert len(completion.tokens) == 12
    logits_BV = jax.jit(functools.partial(model.apply, dtype=jnp.bfloat16))(
        params, jnp.array([[1, 2, 3]])
    )[0, -1]
    assert logits_BV[completion.tokens[0]] >= np.sort(logits_BV)[-2]  # a tie in bfloat16 may break


def test_ids_that_stand_for_nothing_are_never_drawn(engine):
    """A vocabulary with gaps, as checkpoints with deleted tokens have."""
    vocabulary = {f"t{i}": i for i in range(engine.model.config.vocab_size) if i % 3 != 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    backend.decoder = tokenizers.decoders.Fuse()
    gapped = Engine(engine.model, engine.params, Tokenizer(backend), slots=engine.slots)
    (result,) = complete(gapped, [Request([5, 6], Sampling(temperature=5.0, max_new_tokens=40))])
    assert len(result.tokens) == 40
    assert all(token % 3 != 1 for token in result.tokens)
