"""GPT-2 as OpenAI's own code names it (github.com/openai/gpt-2, src/model.py), with its hparams.json as the config.

A `w` is the kernel of a convolution of width one: [1, in, out]. A checkpoint of somebody's training may hold Adam's
running means beside the weights.
"""

from collections.abc import Mapping
from typing import Any

from convert.mapping import Drop, Rule, Table
from core.config import ConfigError, GPT2Config

HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
"""OpenAI's names of the sizes, and ours."""

END_OF_TEXT = 50256

_RULES = (
    Rule("model/wte", "wte.embedding", "VD -> VD"),
    Rule("model/wpe", "wpe.embedding", "PD -> PD"),
    Rule("model/h{L}/ln_1/g", "blocks.{L}.ln_1.scale", "D -> D"),
    Rule("model/h{L}/ln_1/b", "blocks.{L}.ln_1.bias", "D -> D"),
    Rule("model/h{L}/attn/c_attn/w", "blocks.{L}.attn.qkv.kernel", "1D(3NH) -> (1D)3NH"),
    Rule("model/h{L}/attn/c_attn/b", "blocks.{L}.attn.qkv.bias", "(3NH) -> 3NH"),
    Rule("model/h{L}/attn/c_proj/w", "blocks.{L}.attn.out.kernel", "1(NH)D -> (1N)HD"),
    Rule("model/h{L}/attn/c_proj/b", "blocks.{L}.attn.out.bias", "D -> D"),
    Rule("model/h{L}/ln_2/g", "blocks.{L}.ln_2.scale", "D -> D"),
    Rule("model/h{L}/ln_2/b", "blocks.{L}.ln_2.bias", "D -> D"),
    Rule("model/h{L}/mlp/c_fc/w", "blocks.{L}.mlp.up.kernel", "1DF -> (1D)F"),
    Rule("model/h{L}/mlp/c_fc/b", "blocks.{L}.mlp.up.bias", "F -> F"),
    Rule("model/h{L}/mlp/c_proj/w", "blocks.{L}.mlp.down.kernel", "1FD -> (1F)D"),
    Rule("model/h{L}/mlp/c_proj/b", "blocks.{L}.mlp.down.bias", "D -> D"),
    Rule("model/ln_f/g", "ln_f.scale", "D -> D"),
    Rule("model/ln_f/b", "ln_f.bias", "D -> D"),
)

TABLE = Table(
    rules=_RULES,
    drops=(
        *(
            Drop(f"{rule.source}/{slot}", why="Adam's running mean, not a weight")
            for rule in _RULES
            for slot in ("Adam", "Adam_1")
        ),
        *(
            Drop(name, why="the optimizer's step, not a weight")
            for name in ("beta1_power", "beta2_power", "global_step")
        ),
    ),
)


def recognizes(config: Mapping[str, Any]) -> bool:
    """Tells whether `config` is an hparams.json of OpenAI's GPT-2."""
    return "n_vocab" in config and "n_ctx" in config


def read_config(config: Mapping[str, Any]) -> GPT2Config:
    """Returns the model that hparams.json describes; whatever it does not say was the same in all of OpenAI's.

    Raises:
      ConfigError: with every key that is unknown or missing.
    """
    wrong = [f"unknown key {key!r}" for key in config if key not in HPARAMS]
    wrong += [f"{key!r} is missing" for key in HPARAMS if key not in config]
    if wrong:
        raise ConfigError("hparams.json cannot be converted: " + "; ".join(wrong))
    sizes = {ours: config[theirs] for theirs, ours in HPARAMS.items()}
    return GPT2Config(**sizes, **end_of_text(sizes["vocab_size"]))


def end_of_text(vocab_size: Any) -> dict[str, Any]:
    """Returns the ids that begin and end a text in GPT-2's vocabulary, where a vocabulary is large enough for it."""
    if not isinstance(vocab_size, int) or vocab_size <= END_OF_TEXT:
        return {}
    return {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
