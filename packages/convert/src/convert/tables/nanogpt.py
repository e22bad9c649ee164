"""GPT-2 as nanoGPT stores it: Hugging Face's names, torch's Linear layers, one dropout, and the exact GELU.

A Linear keeps its weight [out, in], the transpose of a kernel. `lm_head.weight` is `wte.weight` once more, in the file
as in the model. A compiled model puts "_orig_mod." in front of every name. The activation is `nn.GELU()`, which is the
exact one, even of a model that began as OpenAI's; the epsilon of the norms is fixed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.mapping import Drop, Rule, Table, Tie
from convert.sources import SourceTensor
from core.config import ConfigError, GPT2Config

TABLE = Table(
    rules=(
        Rule("transformer.wte.weight", "wte.embedding", "VD -> VD"),
        Rule("transformer.wpe.weight", "wpe.embedding", "PD -> PD"),
        Rule("transformer.h.{L}.ln_1.weight", "blocks.{L}.ln_1.scale", "D -> D"),
        Rule("transformer.h.{L}.ln_1.bias", "blocks.{L}.ln_1.bias", "D -> D"),
        Rule(
            "transformer.h.{L}.attn.c_attn.weight", "blocks.{L}.attn.qkv.kernel", "(3NH)D -> D3NH"
        ),
        Rule("transformer.h.{L}.attn.c_attn.bias", "blocks.{L}.attn.qkv.bias", "(3NH) -> 3NH"),
        Rule("transformer.h.{L}.attn.c_proj.weight", "blocks.{L}.attn.out.kernel", "D(NH) -> NHD"),
        Rule("transformer.h.{L}.attn.c_proj.bias", "blocks.{L}.attn.out.bias", "D -> D"),
        Rule("transformer.h.{L}.ln_2.weight", "blocks.{L}.ln_2.scale", "D -> D"),
        Rule("transformer.h.{L}.ln_2.bias", "blocks.{L}.ln_2.bias", "D -> D"),
        Rule("transformer.h.{L}.mlp.c_fc.weight", "blocks.{L}.mlp.up.kernel", "FD -> DF"),
        Rule("transformer.h.{L}.mlp.c_fc.bias", "blocks.{L}.mlp.up.bias", "F -> F"),
        Rule("transformer.h.{L}.mlp.c_proj.weight", "blocks.{L}.mlp.down.kernel", "DF -> FD"),
        Rule("transformer.h.{L}.mlp.c_proj.bias", "blocks.{L}.mlp.down.bias", "D -> D"),
        Rule("transformer.ln_f.weight", "ln_f.scale", "D -> D"),
        Rule("transformer.ln_f.bias", "ln_f.bias", "D -> D"),
        Rule("lm_head.weight", "lm_head.kernel", "VD -> VD"),
    ),
    drops=(Drop("transformer.h.{L}.attn.bias", why="causal mask buffer, not a weight"),),
    tie=Tie("lm_head.weight", to="transformer.wte.weight"),
    may_carry=("_orig_mod.",),
)

GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
END_OF_TEXT = 50256
BPE_SIZE = 50257
PADDED_SIZE = 50304  # to a multiple of 64

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def recognizes(config: Mapping[str, Any], names: object) -> bool:
    """Tells whether a config is nanoGPT's: its checkpoints hold the model's arguments."""
    return "model_args" in config


def read_config(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> GPT2Config:
    """Returns the model of `model_args`; arguments of before `bias` was one had biases.

    Raises:
      ConfigError: naming every argument that is unknown (a fork's), missing or no such value.
    """
    args = config["model_args"]
    if not isinstance(args, Mapping):
        raise ConfigError(f"model_args is a {type(args).__name__}; expected a dict")
    wrong = [f"{key} is missing" for key in _SIZES if key not in args]
    wrong += [
        f"unknown key {str(key)[:60]!r}: nanoGPT itself has none, and a fork's model may be another one"
        for key in args
        if key not in (*_SIZES, "bias", "dropout")
    ]
    dropout = args.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        wrong.append(f"dropout={str(dropout)[:60]!r} is no number")
    if wrong:
        raise ConfigError("model_args cannot be converted: " + "; ".join(wrong))
    vocab_size, dropout = args["vocab_size"], float(dropout)
    end = END_OF_TEXT if vocab_size in (BPE_SIZE, PADDED_SIZE) else None
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=args["block_size"],
        n_embd=args["n_embd"],
        n_layer=args["n_layer"],
        n_head=args["n_head"],
        use_bias=args.get("bias", True),
        activation_function="gelu",
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
    )


def model_args(config: GPT2Config) -> dict[str, Any]:
    """Returns the arguments with which nanoGPT builds the model."""
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "bias": config.use_bias,
        "vocab_size": config.vocab_size,
        "dropout": config.resid_pdrop,
    }


def unrepresentable(config: Any) -> list[str]:
    """Returns everything about a model that nanoGPT's cannot be; the GELUs count as one, they differ by 1e-3."""
    if not isinstance(config, GPT2Config):
        return [f"a model of family {config.family}; nanoGPT is a GPT-2"]
    standard = dataclasses.replace(config, n_inner=None)
    wanted = {
        "n_inner": config.d_ff == standard.d_ff,
        "tie_word_embeddings": config.tie_word_embeddings,
        "layer_norm_epsilon": config.layer_norm_epsilon == 1e-5,
        "activation_function": config.activation_function in GELUS,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": not config.scale_attn_by_inverse_layer_idx,
    }
    return [f"{name}={getattr(config, name)!r}" for name, fits in wanted.items() if not fits]
