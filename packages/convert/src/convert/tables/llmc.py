"""GPT-2 as llm.c keeps it: torch's [out, in] weights under the short names of its ParameterTensors."""

from collections.abc import Mapping
from typing import Any

from convert.mapping import Rule, Table
from convert.tables import openai_tf
from core.config import GPT2Config

TABLE = Table(
    rules=(
        Rule("wte", "wte.embedding", "VD -> VD"),
        Rule("wpe", "wpe.embedding", "PD -> PD"),
        Rule("ln1w.{L}", "blocks.{L}.ln_1.scale", "D -> D"),
        Rule("ln1b.{L}", "blocks.{L}.ln_1.bias", "D -> D"),
        Rule("qkvw.{L}", "blocks.{L}.attn.qkv.kernel", "(3NH)D -> D3NH"),
        Rule("qkvb.{L}", "blocks.{L}.attn.qkv.bias", "(3NH) -> 3NH"),
        Rule("attprojw.{L}", "blocks.{L}.attn.out.kernel", "D(NH) -> NHD"),
        Rule("attprojb.{L}", "blocks.{L}.attn.out.bias", "D -> D"),
        Rule("ln2w.{L}", "blocks.{L}.ln_2.scale", "D -> D"),
        Rule("ln2b.{L}", "blocks.{L}.ln_2.bias", "D -> D"),
        Rule("fcw.{L}", "blocks.{L}.mlp.up.kernel", "FD -> DF"),
        Rule("fcb.{L}", "blocks.{L}.mlp.up.bias", "F -> F"),
        Rule("fcprojw.{L}", "blocks.{L}.mlp.down.kernel", "DF -> FD"),
        Rule("fcprojb.{L}", "blocks.{L}.mlp.down.bias", "D -> D"),
        Rule("lnfw", "ln_f.scale", "D -> D"),
        Rule("lnfb", "ln_f.bias", "D -> D"),
    ),
)


def recognizes(config: Mapping[str, Any]) -> bool:
    """Tells whether `config` has the sizes of an llm.c file, by the names of its GPT2Config."""
    return "padded_vocab_size" in config and "channels" in config


def read_config(config: Mapping[str, Any]) -> GPT2Config:
    """Returns the model of an llm.c file: its GELU is the tanh form, its head tied, its texts end as GPT-2's do."""
    return GPT2Config(
        vocab_size=config["vocab_size"],
        n_positions=config["max_seq_len"],
        n_embd=config["channels"],
        n_layer=config["num_layers"],
        n_head=config["num_heads"],
        **openai_tf.end_of_text(config["vocab_size"]),
    )
