import dataclasses
from pathlib import Path

import pytest

from core.errors import ConfigError
from nanogpt_keys import NANOGPT_DEFAULTS
from train.config import TrainConfig


def test_every_nanogpt_key_is_there_with_its_default():
    assert len(NANOGPT_DEFAULTS) == 33
    ours = TrainConfig().to_dict()
    assert {key: ours.get(key) for key in NANOGPT_DEFAULTS} == NANOGPT_DEFAULTS


def test_every_key_is_explained():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = page[page.index("## Configuration") : page.index("## What a run leaves")]
    unexplained = [key for key in TrainConfig().to_dict() if f"`{key}`" not in table]
    assert unexplained == []


def test_a_dict_makes_the_same_config_again():
    config = TrainConfig(n_layer=3, learning_rate=1e-4, eval_only=True)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_whole_numbers_are_taken_where_a_float_is_meant():
    assert TrainConfig.from_dict({"grad_clip": 1}).grad_clip == 1.0
    assert type(TrainConfig.from_dict({"grad_clip": 1}).grad_clip) is float


def test_all_unknown_keys_are_reported_with_the_nearest_known():
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict({"max_iter": 10, "bach_size": 3})
    assert 'unknown config key "max_iter". Did you mean "max_iters"?' in str(error.value)
    assert 'unknown config key "bach_size". Did you mean "batch_size"?' in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_iters": "10"}, "max_iters='10' is str, expected int"),
        ({"max_iters": True}, "max_iters=True is bool, expected int"),
        ({"dropout": "0.1"}, "dropout='0.1' is str, expected float"),
        ({"bias": 1}, "bias=1 is int, expected bool"),
        ({"n_embd": 10, "n_head": 3}, "n_embd=10 is not divisible by n_head=3"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be at least 0"),
        ({"warmup_iters": 10, "lr_decay_iters": 10}, "lr_decay_iters=10 must be greater"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be less than 2\\*\\*63"),
        ({"dataset": ""}, "dataset must not be empty"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_schedule": "step"}, "expected cosine or linear or wsd"),
        ({"dtype": "fp8"}, "expected auto or float32 or bfloat16 or float16"),
        ({"device": "mps"}, "jax has no backend"),
        ({"device": "cuda:x"}, "expected auto, cpu, cuda, cuda:N or tpu"),
        ({"backend": "horovod"}, "expected 'nccl' or 'gloo'"),
        ({"loss_chunk": -1}, "loss_chunk=-1 must be at least 0"),
        ({"n_kv_head": 2}, "n_kv_head=2 has no effect on family=gpt2; leave it out"),
        ({"sliding_window": 64, "init_from": "auto"}, "sliding_window=64 has no effect on"),
        ({"bias": True, "family": "gpt_oss"}, "bias=True has no effect on family=gpt_oss"),
        ({"cooldown_iters": 9}, "cooldown_iters=9 has no effect without lr_schedule=wsd"),
        ({"profile_steps": 2, "max_iters": 9}, "profile_start=10 is beyond max_iters=9: nothing"),
    ],
)
def test_what_cannot_be_honoured_is_refused_not_ignored(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError, match=r"batch_size.*dtype"):
        TrainConfig(batch_size=0, dtype="fp8")


def test_a_config_cannot_change_under_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().max_iters = 3  # type: ignore[misc]
