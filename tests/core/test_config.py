import dataclasses
import json
from typing import Any

import pytest

import core
import tiny
from core import config as config_lib
from core.config import ConfigError, GPT2Config

# openai-community/gpt2's config.json, key for key.
HUB_GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def test_the_hub_s_gpt2_is_the_preset():
    assert GPT2Config.from_hf(HUB_GPT2) == core.PRESETS["gpt2"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("distilgpt2", 81_912_576),
    ],
)
def test_presets_have_the_published_number_of_parameters_and_heads_of_64(name, count):
    config = core.PRESETS[name]
    assert config.parameter_count == count
    assert config.axes["H"] == 64


# What the config.json of other people's GPT-2s has beside or instead of HUB_GPT2's.
LEGACY = {"n_special": 0, "predict_special_tokens": True, "output_past": True}
CEREBRAS = {
    "activation_function": "gelu",
    "architectures": ["GPT2Model"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_inner": 3072,
    "n_layer": 10,
    "n_positions": 2048,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "torch_dtype": "float32",
    "transformers_version": "4.20.0.dev0",
    "use_cache": True,
    "vocab_size": 50257,
}
FOUND: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "gpt2-medium": (
        HUB_GPT2 | LEGACY | {"n_embd": 1024, "n_head": 16, "n_layer": 24},
        {"n_embd": 1024, "n_head": 16, "n_layer": 24},
        354_823_168,
    ),
    "gpt2-xl": (
        HUB_GPT2 | LEGACY | {"n_embd": 1600, "n_head": 25, "n_layer": 48},
        {"n_embd": 1600, "n_head": 25, "n_layer": 48},
        1_557_611_200,
    ),
    "distilgpt2": (
        HUB_GPT2
        | {
            "n_layer": 6,
            "_num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        },
        {"n_layer": 6},
        81_912_576,
    ),
    "DialoGPT-large": (
        HUB_GPT2
        | {"n_embd": 1280, "n_head": 20, "n_layer": 36}
        | {"task_specific_params": {"conversational": {"max_length": 1000}}},
        {"n_embd": 1280, "n_head": 20, "n_layer": 36},
        774_030_080,
    ),
    "Cerebras-GPT-111M": (
        CEREBRAS,
        {"activation_function": "gelu", "n_inner": 3072, "n_layer": 10, "n_positions": 2048}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        111_050_496,
    ),
    "stanford-crfm": (
        HUB_GPT2
        | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}
        | {"n_inner": None, "scale_attn_weights": True, "gradient_checkpointing": False},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        124_439_808,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_other_people_s_gpt2s_are_read(name: str):
    config, differs, count = FOUND[name]
    model = GPT2Config.from_hf(config)
    assert model == dataclasses.replace(
        GPT2Config(bos_token_id=50256, eos_token_id=50256), **differs
    )
    assert model.parameter_count == count


def test_several_ends_of_text_are_kept_and_those_outside_the_vocabulary_left_out():
    config = GPT2Config.from_hf(HUB_GPT2 | {"eos_token_id": [50256, 198]})
    assert config.eos_token_id == config.eos_token_ids == (50256, 198)
    assert config.to_hf()["eos_token_id"] == config.to_dict()["eos_token_id"] == [50256, 198]
    assert config_lib.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small = {**HUB_GPT2, "vocab_size": 199}
    assert GPT2Config.from_hf(small | {"eos_token_id": [50256, 198]}).eos_token_id == (198,)
    assert GPT2Config.from_hf(small | {"eos_token_id": [50256]}).eos_token_ids == ()
    assert core.PRESETS["gpt2"].eos_token_ids == (50256,)


def test_parameter_count_follows_the_variants():
    V, P, D, L, F = 97, 61, 24, 2, 96
    tied = V * D + P * D + L * (4 * D * D + 2 * D * F + 9 * D + F) + 2 * D
    assert tiny.config().parameter_count == tied
    assert tiny.config(tie_word_embeddings=False).parameter_count == tied + V * D
    assert tiny.config(n_inner=50).parameter_count == tied - L * (2 * D + 1) * (F - 50)
    assert tiny.config(use_bias=False).parameter_count == tied - L * (7 * D + F) - D


def test_hf_s_other_names_are_understood():
    renamed = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    config = dict(HUB_GPT2)
    for alias, name in renamed.items():
        config[alias] = config.pop(name)
    assert GPT2Config.from_hf(config) == core.PRESETS["gpt2"]
    both = HUB_GPT2 | {"hidden_size": 768}
    assert GPT2Config.from_hf(both) == core.PRESETS["gpt2"]
    with pytest.raises(ConfigError, match="hidden_size=64 contradicts n_embd=768"):
        GPT2Config.from_hf(HUB_GPT2 | {"hidden_size": 64})


def test_everything_that_is_not_understood_is_reported_at_once():
    wrong = {"n_haed": 7, "rotary_dim": 64, "add_cross_attention": True, "pruned_heads": {"0": [1]}}
    with pytest.raises(ConfigError) as caught:
        GPT2Config.from_hf(HUB_GPT2 | wrong)
    message = str(caught.value)
    assert "unknown key 'n_haed' (did you mean 'n_head'?)" in message
    assert "unknown key 'rotary_dim'" in message
    assert "add_cross_attention=True is not implemented" in message
    assert "pruned_heads={'0': [1]} is not implemented" in message
    assert "\n" not in message


@pytest.mark.parametrize("model_type", ["llama", None])
def test_another_model_type_is_refused(model_type):
    with pytest.raises(
        ConfigError, match=rf"model_type {model_type!r}; 'gpt2' is what can be read"
    ):
        GPT2Config.from_hf(HUB_GPT2 | {"model_type": model_type})


def test_absent_keys_take_hf_s_defaults():
    config = GPT2Config.from_hf({"model_type": "gpt2"})
    assert (config.n_inner, config.scale_attn_weights, config.tie_word_embeddings) == (
        None,
        True,
        True,
    )
    assert (config.n_embd, config.vocab_size, config.layer_norm_epsilon) == (768, 50257, 1e-5)
    assert (config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn) == (
        False,
        False,
    )


def test_a_special_token_outside_the_vocabulary_can_never_come_and_is_none():
    """transformers writes GPT-2's 50256 into every small model whose author did not think of it."""
    small = GPT2Config.from_hf(HUB_GPT2 | {"vocab_size": 65, "pad_token_id": -1})
    assert (small.bos_token_id, small.eos_token_id, small.pad_token_id) == (None, None, None)
    edge = GPT2Config.from_hf(HUB_GPT2 | {"vocab_size": 50256, "bos_token_id": 50255})
    assert (edge.bos_token_id, edge.eos_token_id) == (50255, None)


def test_a_whole_number_is_a_fine_float():
    config = GPT2Config.from_hf(HUB_GPT2 | {"attn_pdrop": 0})
    assert config.attn_pdrop == 0
    assert isinstance(config.attn_pdrop, float)


@pytest.mark.parametrize("variant", tiny.VARIANTS.values(), ids=tiny.VARIANTS.keys())
def test_configurations_survive_both_kinds_of_json(variant):
    config = tiny.config(**variant, eos_token_id=3, embd_pdrop=0.0, initializer_range=0.01)
    assert config_lib.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if config.use_bias:  # which Hugging Face's GPT-2 cannot say
        assert GPT2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ({"n_head": 5}, "n_embd=24 does not divide into n_head=5 heads"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"vocab_size": 1.5}, "vocab_size=1.5 is not int"),
        ({"n_head": True}, "n_head=True is not int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not bool"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon='1e-5' is not float"),
        ({"layer_norm_epsilon": 0.0}, "must be positive"),
        ({"n_inner": 0}, "n_inner=0 must be at least 1"),
        ({"n_inner": 2**43}, "n_inner=8796093022208 is more than"),
        ({"activation_function": "swish"}, "activation_function='swish' is not one of gelu_new"),
        ({"attn_pdrop": 1.0}, "attn_pdrop=1.0 is not a probability below 1"),
        ({"eos_token_id": 97}, "eos_token_id=97 is outside the vocabulary of 97"),
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused(variant, says):
    with pytest.raises(ConfigError) as caught:
        tiny.config(**variant)
    assert says in str(caught.value)


def test_several_contradictions_are_reported_together():
    with pytest.raises(ConfigError, match=r"n_head=5 heads; .*'swish'.*; resid_pdrop=2"):
        tiny.config(n_head=5, activation_function="swish", resid_pdrop=2.0)


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"unknown key 'n_heads' \(did you mean 'n_head'\?\)"):
        config_lib.from_dict(tiny.config().to_dict() | {"n_heads": 3})
    with pytest.raises(ConfigError, match="family is None; expected one of gpt2"):
        config_lib.from_dict({"n_head": 3})


def test_a_configuration_is_immutable_and_hashable():
    config = tiny.config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_head = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(tiny.config())
    assert dataclasses.replace(config, n_head=3).head_dim == 8
