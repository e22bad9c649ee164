"""What a row may ask for: several samples, log-probabilities, and a prompt that does not fit."""

from typing import Any

import pytest

import core
import tiny
from core import checkpoint
from serve_batch import host, records

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
CONTEXT = tiny.SIZES["n_positions"]


@pytest.fixture(scope="session")
def engine(model):
    return core.Engine(*core.load(model), slots=4)


def tokens_of(engine: core.Engine, prompt: str | list[int], id_: str, **sampling: Any) -> list[int]:
    request = core.Request(prompt, core.Sampling(**sampling), id=id_)
    (completion,) = engine.complete([request])
    assert isinstance(completion, core.Completion)
    return list(completion.tokens)


SAMPLED: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 40, "seed": 3}


def test_samples_of_a_row_are_what_the_engine_draws_for_each_and_the_first_is_the_row_s_own(
    run, engine, write_jsonl, read_parts, tmp_path
):
    rows = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two", "n": 7}, {"prompt": ""}]
    write_jsonl([*rows, {"id": "c", "prompt": "", "n": 3}, {"id": "d", "prompt": "three", "n": 1}])
    manifest = run()
    _, several, _, failed, last = found = read_parts(tmp_path / "out")
    assert [r["samples"] is None for r in found] == [True, False, True, True, True]
    expected = [tokens_of(engine, "two", "b" if i == 0 else f"b#{i}", **SAMPLED) for i in range(7)]
    assert [s["token_ids"] for s in several["samples"]] == expected
    assert several["token_ids"] == expected[0]
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert several["completion_tokens"] == sum(map(len, expected))
    assert (failed["error"]["code"], failed["samples"]) == ("prompt_empty", None)
    assert last["token_ids"] == tokens_of(engine, "three", "d", **SAMPLED)
    assert manifest["completion_tokens"] == sum(r["completion_tokens"] or 0 for r in found)
    assert manifest["rows_done"] == 5


def test_several_samples_of_a_prompt_feed_it_once(model):
    serving = host.EngineHost(model, slots=4)
    sampling = core.Sampling(**SAMPLED)
    asked = [(i, core.Request("a prompt for four", sampling, id=f"x#{i}")) for i in range(4)]
    results = dict(serving.complete(asked))
    serving.close()
    assert len({result.tokens for result in results.values()}) == 4  # pyright: ignore
    assert serving._engine.counters.prompt_tokens == len("a prompt for four")


def test_log_probabilities_are_the_engine_s_and_rows_may_ask_for_fewer(
    run, engine, write_jsonl, read_parts, tmp_path
):
    write_jsonl(
        [
            {"id": "a", "prompt": "one", "logprobs": 1},
            {"id": "b", "prompt": "two", "n": 2},
            {"id": "c", "prompt": "three", "logprobs": 4},
            {"id": "d", "prompt": "four", "logprobs": 0},
        ]
    )
    run(sampling=core.Sampling(**SAMPLED, logprobs=3))
    fewer, several, more, none = read_parts(tmp_path / "out")
    sampling = core.Sampling(**SAMPLED, logprobs=1)
    (completion,) = engine.complete([core.Request("one", sampling, id="a")])
    assert isinstance(completion, core.Completion)
    assert fewer["logprobs"] == [
        {
            "token": score.token,
            "logprob": score.logprob,
            "top": [{"token": id_, "logprob": value} for id_, value in score.top],
        }
        for score in completion.logprobs or ()
    ]
    assert [len(s["top"]) for s in several["samples"][1]["logprobs"]] == [3] * 6
    assert [s["token"] for s in none["logprobs"]] == none["token_ids"]
    assert {len(s["top"]) for s in none["logprobs"]} == {0}
    assert more["error"]["code"] == "bad_parameter"
    assert (
        "the 3 likeliest tokens that this job gives: run it with a larger --logprobs"
        in (more["error"]["message"])
    )


def test_log_probabilities_change_no_token_and_are_null_unasked(
    run, write_jsonl, read_parts, tmp_path
):
    write_jsonl([{"id": i, "prompt": f"Prompt {i}"} for i in range(9)])
    run()
    run(output=tmp_path / "scored", sampling=core.Sampling(**SAMPLED, logprobs=3))
    plain, scored = read_parts(tmp_path / "out"), read_parts(tmp_path / "scored")
    assert [r["token_ids"] for r in plain] == [r["token_ids"] for r in scored]
    assert {r["logprobs"] is None for r in plain} == {True}


LONG = "The flax mill stood where the river bends, and nobody knew who had built it so long ago."
ROWS = [
    {
        "id": "fits",
        "prompt": LONG[: CONTEXT - 5],
    },  # with 6 new tokens, of which the last is not fed
    {"id": "room", "prompt": LONG[: CONTEXT - 4]},
    {"id": "context", "prompt": LONG[:CONTEXT]},
    {"id": "beyond", "prompt": LONG},
    {"id": "ids", "token_ids": [t % 97 for t in range(80)]},
    {"id": "short", "prompt": "short"},
    {"id": "none", "prompt": LONG, "max_new_tokens": 0},
    {"id": "all", "prompt": LONG, "max_new_tokens": CONTEXT},
    {"id": "too many", "prompt": "short", "max_new_tokens": CONTEXT + 1},
    {"id": "empty", "prompt": ""},
]


@pytest.fixture
def lengthened(run, write_jsonl, read_parts, tmp_path):
    def call(policy: str) -> dict[str, dict[str, Any]]:
        write_jsonl(ROWS)
        arguments = {"sampling": core.Sampling(**GREEDY), "long_prompts": policy}
        manifest = run(output=tmp_path / policy, **arguments)
        found = {r["id"]: r for r in read_parts(tmp_path / policy)}
        assert manifest["truncated"] == sum(
            (r["truncated_tokens"] or 0) > 0 for r in found.values()
        )
        return found

    return call


def test_by_default_a_prompt_beyond_the_context_is_an_error_and_one_that_fills_it_ends_there(
    lengthened,
):
    found = lengthened("error")
    errors = {id_: r["error"]["code"] for id_, r in found.items() if r["error"]}
    long = dict.fromkeys(["beyond", "ids", "none", "all"], "prompt_too_long")
    assert errors == long | {"empty": "prompt_empty"}
    lengths = {id_: r["completion_tokens"] for id_, r in found.items() if not r["error"]}
    assert lengths == {"fits": 6, "room": 5, "context": 1, "short": 6, "too many": CONTEXT - 4}
    assert {r["truncated_tokens"] for r in found.values()} == {0, None}


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
def test_truncation_leaves_room_for_every_new_token_and_neighbours_as_they_are(
    lengthened, engine, policy
):
    found, untouched = lengthened(policy), lengthened("error")
    lost = {id_: r["truncated_tokens"] for id_, r in found.items()}
    most = CONTEXT - 5
    expected = {"fits": 0, "room": 1, "context": 5, "beyond": len(LONG) - most, "ids": 80 - most}
    rest = {"short": 0, "none": len(LONG) - CONTEXT, "all": len(LONG) - 1}
    assert lost == expected | rest | {"too many": None, "empty": None}
    for id_, prompt in (("room", LONG[: CONTEXT - 4]), ("beyond", LONG), ("all", LONG)):
        kept = len(prompt) - lost[id_]
        fed = prompt[-kept:] if policy == "truncate_left" else prompt[:kept]
        new = CONTEXT if id_ == "all" else 6
        assert found[id_]["token_ids"] == tokens_of(
            engine, fed, id_, temperature=0, max_new_tokens=new
        )
        assert found[id_]["prompt_tokens"] == kept
    assert (found["none"]["completion_tokens"], found["none"]["prompt_tokens"]) == (0, CONTEXT)
    assert found["too many"]["error"]["code"] == "prompt_too_long"
    assert "leaves no room for a prompt" in found["too many"]["error"]["message"]
    assert found["empty"] == untouched["empty"]
    assert {id_: found[id_] for id_ in ("fits", "short")} == {
        id_: untouched[id_] for id_ in ("fits", "short")
    }


def test_text_without_a_tokenizer_is_left_for_the_engine_to_refuse_and_ids_are_cut(model, tmp_path):
    loaded, params, _ = core.load(model)
    checkpoint.save(tmp_path / "mute", loaded.config, params)
    serving = host.EngineHost(tmp_path / "mute", slots=4)
    assert serving.cut("text", new_tokens=6, policy="truncate_left") == ("text", 0)
    assert serving.cut([1] * 99, new_tokens=6, policy="truncate_left") == ([1] * (CONTEXT - 5), 43)


def test_what_is_done_with_long_prompts_is_part_of_the_job(run, write_jsonl):
    write_jsonl([{"prompt": "a"}])
    run()
    with pytest.raises(core.FlaxmillError, match="long_prompts was 'error', is 'truncate_left'"):
        run(long_prompts="truncate_left")
    assert records.LONG_PROMPTS[0] == "error"


@pytest.mark.slow
def test_a_system_prompt_that_all_rows_have_is_fed_once(run, tmp_path, write_jsonl):
    tokenizer = core.Tokenizer.utf8()
    config = tiny.config(vocab_size=tokenizer.vocab_size, n_positions=293)
    checkpoint.save(tmp_path / "m", config, tiny.params(core.build(config)), tokenizer=tokenizer)
    system = "You answer in one word. " * 11  # two chunks of 128 tokens, and 8 more
    write_jsonl([{"prompt": f"{system}{i:03d}"} for i in range(40)])
    run(model=tmp_path / "m")
    assert host._current is not None
    counters = host._current[1]._engine.counters
    # The first row feeds it, and the second shows that it is wanted again; so do those in slots beside them.
    rest = 40 * (len(system) + 3 - 256)
    assert counters.reused_tokens >= 256 * (40 - 2 * 4)
    assert counters.prompt_tokens <= 256 * 2 * 4 + rest
    assert counters.prompt_tokens + counters.reused_tokens == 40 * (len(system) + 3)
