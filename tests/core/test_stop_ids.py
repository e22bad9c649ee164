"""Which tokens end a text: config.json's, the tokenizer's, and generation_config.json's, which has most of them."""

import dataclasses
import json

import pytest

import core
import tiny
import tiny_gpt_oss
from core import checkpoint

GREEDY = core.Sampling(temperature=0, max_new_tokens=20)
PROMPT = [1, 2, 3]


def save(folder, config, generation=None):
    checkpoint.save(folder, config, tiny.params(core.build(config)))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def open_engine(folder):
    return core.Engine(*core.load(folder), slots=1)


@pytest.mark.parametrize(
    "make",
    [tiny.config, pytest.param(tiny_gpt_oss.config, marks=pytest.mark.slow)],
    ids=["gpt2", "gpt_oss"],
)
def test_a_text_ends_at_any_token_that_the_generation_config_names(make, tmp_path):
    config = make(initializer_range=0.1, eos_token_id=None)
    ends = list(range(0, config.vocab_size, 3))
    engine = open_engine(save(tmp_path / "m", config, {"eos_token_id": ends}))
    ways = [dataclasses.replace(GREEDY, ignore_eos=ignore) for ignore in (True, False)]
    whole, ended = engine.complete([core.Request(PROMPT, way) for way in ways])
    assert isinstance(whole, core.Completion)
    assert isinstance(ended, core.Completion)
    first = next(at for at, token in enumerate(whole.tokens) if token in ends)
    assert (len(whole.tokens), first < 19) == (20, True)
    assert whole.tokens[first] != ends[0]
    assert (ended.tokens, ended.finish_reason) == (whole.tokens[: first + 1], "eos")


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (5, None, (5,)),
        (5, {"eos_token_id": [7, 5, 9, 7]}, (5, 7, 9)),
        (5, {"eos_token_id": 7}, (5, 7)),
        (5, {"eos_token_id": None}, (5,)),
        (5, {"do_sample": True}, (5,)),
        (None, {"eos_token_id": [7]}, (7,)),
        ((5, 6), {"eos_token_id": 6}, (5, 6)),
        (None, None, ()),
    ],
)
def test_the_ids_of_both_files_end_a_text_and_the_folder_keeps_its_own(
    own, generation, expected, tmp_path
):
    folder = save(tmp_path / "m", tiny.config(eos_token_id=own), generation)
    model, _, _ = core.load(folder)
    assert model.config.eos_token_ids == expected
    assert checkpoint.open(folder).config.eos_token_id == own


@pytest.mark.parametrize("ids", [[97], -1, "7", [True], {"a": 1}, [[1]], 1.5])
def test_an_id_that_is_no_tokens_is_told(ids, tmp_path):
    folder = save(tmp_path / "m", tiny.config(), {"eos_token_id": ids})
    with pytest.raises(
        core.CheckpointError, match=r"generation_config.json: eos_token_id .* is no id"
    ):
        core.load(folder)


def test_a_generation_config_that_is_none_is_told(tmp_path):
    folder = save(tmp_path / "m", tiny.config())
    for content in ("{", "[]"):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(core.CheckpointError, match=r"generation_config\.json"):
            core.load(folder)
