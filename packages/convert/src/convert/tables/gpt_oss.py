"""GPT-OSS as Hugging Face stores it (packed or dense) and as OpenAI does (the folder `original/` of the same weights).

Hugging Face keeps torch's [out, in] for attention and router, and [expert, in, out] for dense experts. Packed experts
are [expert, out, in], in both; gate and up alternate along out everywhere. OpenAI's queries, keys and values are one
tensor, q's rows first.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from convert.mapping import Rule, Table, Tie
from convert.sources import SourceTensor
from core.config import Config, ConfigError, GptOssConfig, base

Tensors = Mapping[str, SourceTensor]

_STORED = "model.layers.{L}.mlp.experts"
_HF_RULES = (
    Rule("model.embed_tokens.weight", "wte.embedding", "VD -> VD"),
    Rule("model.layers.{L}.input_layernorm.weight", "blocks.{L}.norm_1.scale", "D -> D"),
    Rule("model.layers.{L}.self_attn.q_proj.weight", "blocks.{L}.attn.q.kernel", "(NH)D -> DNH"),
    Rule("model.layers.{L}.self_attn.q_proj.bias", "blocks.{L}.attn.q.bias", "(NH) -> NH"),
    Rule("model.layers.{L}.self_attn.k_proj.weight", "blocks.{L}.attn.k.kernel", "(KH)D -> DKH"),
    Rule("model.layers.{L}.self_attn.k_proj.bias", "blocks.{L}.attn.k.bias", "(KH) -> KH"),
    Rule("model.layers.{L}.self_attn.v_proj.weight", "blocks.{L}.attn.v.kernel", "(KH)D -> DKH"),
    Rule("model.layers.{L}.self_attn.v_proj.bias", "blocks.{L}.attn.v.bias", "(KH) -> KH"),
    Rule("model.layers.{L}.self_attn.o_proj.weight", "blocks.{L}.attn.out.kernel", "D(NH) -> NHD"),
    Rule("model.layers.{L}.self_attn.o_proj.bias", "blocks.{L}.attn.out.bias", "D -> D"),
    Rule("model.layers.{L}.self_attn.sinks", "blocks.{L}.attn.sinks", "N -> N"),
    Rule("model.layers.{L}.post_attention_layernorm.weight", "blocks.{L}.norm_2.scale", "D -> D"),
    Rule("model.layers.{L}.mlp.router.weight", "blocks.{L}.moe.router.kernel", "ED -> DE"),
    Rule("model.layers.{L}.mlp.router.bias", "blocks.{L}.moe.router.bias", "E -> E"),
    Rule(f"{_STORED}.gate_up_proj_bias", "blocks.{L}.moe.gate_up.bias", "E(F2) -> EF2"),
    Rule(f"{_STORED}.down_proj_bias", "blocks.{L}.moe.down.bias", "ED -> ED"),
    Rule("model.norm.weight", "norm_f.scale", "D -> D"),
    Rule("lm_head.weight", "lm_head.kernel", "VD -> VD"),
)


def _packed(gate_up: str, down: str, blocks: str, scales: str) -> tuple[Rule, ...]:
    into = "blocks.{L}.moe"
    return (
        Rule(f"{gate_up}{blocks}", f"{into}.gate_up.kernel.blocks", "E(F2)QY -> EF2QY"),
        Rule(f"{gate_up}{scales}", f"{into}.gate_up.kernel.scales", "E(F2)Q -> EF2Q"),
        Rule(f"{down}{blocks}", f"{into}.down.kernel.blocks", "EDRY -> EDRY"),
        Rule(f"{down}{scales}", f"{into}.down.kernel.scales", "EDR -> EDR"),
    )


def _hf_table(*experts: Rule) -> Table:
    return Table(
        rules=(*_HF_RULES, *experts),
        tie=Tie("lm_head.weight", to="model.embed_tokens.weight"),
        may_lack=("model.",),
        may_carry=("module.",),
    )


def _dense(suffix: str) -> Table:
    return _hf_table(
        Rule(f"{_STORED}.gate_up_proj{suffix}", "blocks.{L}.moe.gate_up.kernel", "ED(F2) -> EDF2"),
        Rule(f"{_STORED}.down_proj{suffix}", "blocks.{L}.moe.down.kernel", "EFD -> EFD"),
    )


HF_DENSE = _dense("")
HF_MXFP4 = _hf_table(
    *_packed(f"{_STORED}.gate_up_proj", f"{_STORED}.down_proj", "_blocks", "_scales")
)
HF_RESAVED = _dense("_blocks")
"""What transformers' `save_pretrained` writes of packed weights that it has unpacked: dense, by the packed name."""

ORIGINAL = Table(
    rules=(
        Rule("embedding.weight", "wte.embedding", "VD -> VD"),
        Rule("block.{L}.attn.norm.scale", "blocks.{L}.norm_1.scale", "D -> D"),
        Rule(
            "block.{L}.attn.qkv.weight",
            tuple(f"blocks.{{L}}.attn.{part}.kernel" for part in "qkv"),
            ("(NH)D -> DNH", "(KH)D -> DKH", "(KH)D -> DKH"),
        ),
        Rule(
            "block.{L}.attn.qkv.bias",
            tuple(f"blocks.{{L}}.attn.{part}.bias" for part in "qkv"),
            ("(NH) -> NH", "(KH) -> KH", "(KH) -> KH"),
        ),
        Rule("block.{L}.attn.out.weight", "blocks.{L}.attn.out.kernel", "D(NH) -> NHD"),
        Rule("block.{L}.attn.out.bias", "blocks.{L}.attn.out.bias", "D -> D"),
        Rule("block.{L}.attn.sinks", "blocks.{L}.attn.sinks", "N -> N"),
        Rule("block.{L}.mlp.norm.scale", "blocks.{L}.norm_2.scale", "D -> D"),
        Rule("block.{L}.mlp.gate.weight", "blocks.{L}.moe.router.kernel", "ED -> DE"),
        Rule("block.{L}.mlp.gate.bias", "blocks.{L}.moe.router.bias", "E -> E"),
        *_packed("block.{L}.mlp.mlp1_weight", "block.{L}.mlp.mlp2_weight", ".blocks", ".scales"),
        Rule("block.{L}.mlp.mlp1_bias", "blocks.{L}.moe.gate_up.bias", "E(F2) -> EF2"),
        Rule("block.{L}.mlp.mlp2_bias", "blocks.{L}.moe.down.bias", "ED -> ED"),
        Rule("norm.scale", "norm_f.scale", "D -> D"),
        Rule("unembedding.weight", "lm_head.kernel", "VD -> VD"),
    ),
)

_SAME = """
    num_hidden_layers vocab_size hidden_size intermediate_size swiglu_limit head_dim num_attention_heads
    num_key_value_heads sliding_window initial_context_length rope_theta
"""
ORIGINAL_CONFIG = {
    **{name: name for name in _SAME.split()},
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "rope_scaling_factor": "rope_factor",
    "rope_ntk_alpha": "rope_beta_slow",
    "rope_ntk_beta": "rope_beta_fast",
}
"""OpenAI's names (gpt_oss.torch.model.ModelConfig), and ours."""

VOCAB_SIZE, END_OF_TEXT, RETURN = 201088, 199999, 200002  # of o200k_harmony, their one tokenizer


def hf_table(config: Config) -> Table:
    """Returns how Hugging Face stores a GPT-OSS, packed or dense."""
    assert isinstance(config, GptOssConfig)
    return HF_MXFP4 if config.quantization == "mxfp4" else HF_DENSE


def as_stored(model: Config, tensors: Tensors) -> Config:
    """Returns `model` with its experts packed or dense as `tensors` have them, where any are there.

    Raises:
      ConfigError: packed experts that cannot be unpacked.
    """
    stored = [name for name in tensors if _is_experts(name)]
    if not isinstance(model, GptOssConfig) or not stored:
        return model
    _check_pairs(tensors)
    packed = any(name.endswith("_blocks") for name in stored)
    return dataclasses.replace(model, quantization="mxfp4" if packed else None)


def is_resaved(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Tells whether experts have the names of packed ones and none has scales: see `HF_RESAVED`."""
    return (
        config.get("model_type") == "gpt_oss"
        and any(name.endswith("_proj_blocks") for name in names)
        and not any(name.endswith("_proj_scales") for name in names)
    )


def read_resaved_config(config: Mapping[str, Any], tensors: Tensors) -> Config:
    """Returns the dense model of a folder that `is_resaved`.

    Raises:
      ConfigError: the experts are bytes, so that their scales are lost.
    """
    bare = [t for n, t in tensors.items() if n.endswith("_proj_blocks") and t.dtype == "uint8"]
    if bare:
        raise ConfigError(
            f"{bare[0].name} is packed (uint8{list(bare[0].shape)}) and "
            f"{_scales_of(bare[0].name)} is missing, as are {len(bare) - 1} more; "
            "without their scales the experts are lost: copy or download the checkpoint again"
        )
    return dataclasses.replace(GptOssConfig.from_hf(config), quantization=None)


def notes(config: Mapping[str, Any], tensors: Tensors) -> tuple[str, ...]:
    """Returns what is odd about a Hugging Face GPT-OSS that can be read all the same."""
    if config.get("model_type") != "gpt_oss":
        return ()
    found = list(GptOssConfig.notes_on_hf(config))
    if is_resaved(config, tensors):
        found.append(
            "the experts are dense but named _blocks, as transformers' save_pretrained writes weights that it has "
            "unpacked; they are read as they are meant (transformers itself would draw them at random)"
        )
    elif config.get("quantization_config") and any(
        name.endswith("_proj") for name in tensors if _is_experts(name)
    ):
        found.append("config.json says mxfp4, but the experts are stored dense; they stay dense")
    return tuple(found)


def recognizes_original(config: Mapping[str, Any]) -> bool:
    """Tells whether `config` has the names of OpenAI's own ModelConfig."""
    return "model_type" not in config and {"num_experts", "initial_context_length"} <= config.keys()


def read_original_config(config: Mapping[str, Any], tensors: Tensors) -> Config:
    """Returns the model that OpenAI's own config.json describes; what it does not say was the same in both sizes.

    Raises:
      ConfigError: with every key that is unknown; or packed experts that cannot be unpacked.
    """
    known = ORIGINAL_CONFIG
    if wrong := [
        f"unknown key {key!r}{base.nearest(key, known)}" for key in config if key not in known
    ]:
        raise ConfigError("config.json cannot be converted: " + "; ".join(wrong))
    _check_pairs(tensors)
    settings = {known[key]: value for key, value in config.items()}
    if settings.get("vocab_size", VOCAB_SIZE) == VOCAB_SIZE:
        settings |= {"eos_token_id": RETURN, "pad_token_id": END_OF_TEXT}
    model = GptOssConfig(**base.from_json(GptOssConfig, settings), quantization="mxfp4")
    context = int(model.initial_context_length * model.rope_factor)
    return dataclasses.replace(model, max_position_embeddings=context)


def _check_pairs(tensors: Tensors) -> None:
    """Refuses blocks without scales of their shape; the other mismatches are the table's to find."""
    wrong = []
    for name, blocks in tensors.items():
        if not name.endswith(("_proj_blocks", "_weight.blocks")):
            continue
        scales = tensors.get(_scales_of(name))
        if scales is None:
            wrong.append(f"{name} has no {_scales_of(name)}")
        elif blocks.dtype != "uint8" or len(blocks.shape) != 4 or blocks.shape[-1] != 16:
            found = f"{blocks.dtype}{list(blocks.shape)}"
            wrong.append(f"{name} is {found}; expected uint8 of rank 4 that ends in 16")
        elif scales.shape != blocks.shape[:-1]:
            shapes = f"{list(scales.shape)}, its blocks {list(blocks.shape)}"
            wrong.append(f"{scales.name} has shape {shapes}")
    if wrong:
        raise ConfigError("the experts cannot be unpacked: " + "; ".join(wrong))


def _scales_of(name: str) -> str:
    return name.removesuffix("blocks") + "scales"


def _is_experts(name: str) -> bool:
    return ".mlp.experts." in name and not name.endswith("_bias")
