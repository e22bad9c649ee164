"""What llama.cpp can compute of each family: its keys, its tensors, and what no key tells it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import gguf

from convert.targets.gguf.weights import Row
from core.config import GPT2Config, GptOssConfig
from core.config.gpt_oss import FULL, SLIDING

_MAX_LAYERS, _MAX_EXPERTS = (
    512,
    512,
)  # llama-hparams.h; arrays of that length, in every recent version


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    `problems` names what it would compute differently, `notes` what it does differently for all models of the family.
    """

    architecture: str
    rows: Callable[[Any], list[Row]]
    describe: Callable[[gguf.GGUFWriter, Any], None]
    problems: Callable[[Any], list[str]]
    notes: Callable[[Any], list[str]]


def _gpt2_rows(config: GPT2Config) -> list[Row]:
    block = [
        Row(("attn_norm.weight",), "ln_1.scale", "D -> D"),
        Row(("attn_norm.bias",), "ln_1.bias", "D -> D"),
        Row(("attn_qkv.weight",), "attn.qkv.kernel", "(3NH)D -> D3NH"),
        Row(("attn_qkv.bias",), "attn.qkv.bias", "(3NH) -> 3NH"),
        Row(("attn_output.weight",), "attn.out.kernel", "D(NH) -> NHD"),
        Row(("attn_output.bias",), "attn.out.bias", "D -> D"),
        Row(("ffn_norm.weight",), "ln_2.scale", "D -> D"),
        Row(("ffn_norm.bias",), "ln_2.bias", "D -> D"),
        Row(("ffn_up.weight",), "mlp.up.kernel", "FD -> DF"),
        Row(("ffn_up.bias",), "mlp.up.bias", "F -> F"),
        Row(("ffn_down.weight",), "mlp.down.kernel", "DF -> FD"),
        Row(("ffn_down.bias",), "mlp.down.bias", "D -> D"),
    ]
    rows = [
        Row(("token_embd.weight",), "wte.embedding", "VD -> VD"),
        Row(("position_embd.weight",), "wpe.embedding", "PD -> PD", plain=True),
        *_in_layers(block, config.n_layer),
        Row(("output_norm.weight",), "ln_f.scale", "D -> D"),
        Row(("output_norm.bias",), "ln_f.bias", "D -> D"),
    ]
    if not config.tie_word_embeddings:
        rows.append(Row(("output.weight",), "lm_head.kernel", "VD -> VD"))
    return rows


def _gpt2_describe(writer: gguf.GGUFWriter, config: GPT2Config) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _gpt2_problems(config: GPT2Config) -> list[str]:
    problems = _too_many(n_layer=config.n_layer)
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"):
        problems.append(
            f"activation_function={config.activation_function}: llama.cpp's GPT-2 has GELU and nothing else"
        )
    if not config.scale_attn_weights:
        problems.append("scale_attn_weights=false: llama.cpp's GPT-2 always scales")
    if config.scale_attn_by_inverse_layer_idx:
        problems.append(
            "scale_attn_by_inverse_layer_idx=true: llama.cpp's GPT-2 scales all layers alike"
        )
    return problems


def _gpt2_notes(config: GPT2Config) -> list[str]:
    notes = []
    if config.activation_function == "gelu":
        notes.append(
            "the model's GELU is the exact one (erf), llama.cpp's GPT-2 computes the tanh form, off by at most 0.0005; "
            "where two tokens are all but level, llama.cpp may choose the other"
        )
    if not config.use_bias:
        notes.append("the model has no biases; the file has zeros, as llama.cpp needs them")
    return notes


def _gpt_oss_rows(config: GptOssConfig) -> list[Row]:
    experts = ("ffn_gate_exps", "ffn_up_exps")
    block = [
        Row(("attn_norm.weight",), "norm_1.scale", "D -> D"),
        Row(("attn_q.weight",), "attn.q.kernel", "(NH)D -> DNH"),
        Row(("attn_q.bias",), "attn.q.bias", "(NH) -> NH"),
        Row(("attn_k.weight",), "attn.k.kernel", "(KH)D -> DKH"),
        Row(("attn_k.bias",), "attn.k.bias", "(KH) -> KH"),
        Row(("attn_v.weight",), "attn.v.kernel", "(KH)D -> DKH"),
        Row(("attn_v.bias",), "attn.v.bias", "(KH) -> KH"),
        Row(("attn_output.weight",), "attn.out.kernel", "D(NH) -> NHD"),
        Row(("attn_output.bias",), "attn.out.bias", "D -> D"),
        Row(("attn_sinks.weight",), "attn.sinks", "N -> N"),
        Row(("post_attention_norm.weight",), "norm_2.scale", "D -> D"),
        Row(("ffn_gate_inp.weight",), "moe.router.kernel", "ED -> DE", plain=True),
        Row(("ffn_gate_inp.bias",), "moe.router.bias", "E -> E"),
        Row(
            tuple(f"{name}.weight" for name in experts),
            "moe.gate_up.kernel",
            "2EFD -> EDF2",
            packed=("2EFQY -> EF2QY", "2EFQ -> EF2Q"),
        ),
        Row(
            tuple(f"{name}.bias" for name in experts),
            "moe.gate_up.bias",
            "2EF -> EF2",
            plain=True,
        ),
        Row(
            ("ffn_down_exps.weight",),
            "moe.down.kernel",
            "EDF -> EFD",
            packed=("EDRY -> EDRY", "EDR -> EDR"),
        ),
        Row(("ffn_down_exps.bias",), "moe.down.bias", "ED -> ED", plain=True),
    ]
    head = "wte.embedding" if config.tie_word_embeddings else "lm_head.kernel"
    return [
        Row(("token_embd.weight",), "wte.embedding", "VD -> VD"),
        *_in_layers(block, config.num_hidden_layers),
        Row(("output_norm.weight",), "norm_f.scale", "D -> D"),
        Row(("output.weight",), head, "VD -> VD"),  # llama.cpp's GPT-OSS wants a head, tied or not
    ]


def _gpt_oss_describe(writer: gguf.GGUFWriter, config: GptOssConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(config.initial_context_length)
    writer.add_rope_scaling_yarn_beta_fast(config.rope_beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(config.rope_beta_slow)


def _gpt_oss_problems(config: GptOssConfig) -> list[str]:
    problems = _too_many(
        num_hidden_layers=config.num_hidden_layers, num_local_experts=config.num_local_experts
    )
    # Newer versions read a pattern, older ones overlook the key: the default is what all of them agree on.
    if any(
        kind != (FULL if layer % 2 else SLIDING)
        for layer, kind in enumerate(config.layer_types or ())
    ):
        problems.append("layer_types do not take turns, sliding first, as llama.cpp's GPT-OSS does")
    if (config.swiglu_alpha, config.swiglu_limit) != (1.702, 7.0):
        problems.append(
            f"swiglu_alpha={config.swiglu_alpha} and swiglu_limit={config.swiglu_limit}: "
            "llama.cpp's GPT-OSS has 1.702 and 7"
        )
    if (config.rope_beta_fast, config.rope_beta_slow) != (32.0, 1.0):  # it overlooks their keys
        problems.append(
            f"rope_beta_fast={config.rope_beta_fast} and rope_beta_slow={config.rope_beta_slow}: "
            "llama.cpp's GPT-OSS has 32 and 1"
        )
    return problems


def _gpt_oss_notes(config: GptOssConfig) -> list[str]:
    low, high = (
        _yarn_dimension(config, beta) for beta in (config.rope_beta_fast, config.rope_beta_slow)
    )
    whole = float(math.floor(low)), float(math.ceil(high))
    if config.rope_truncate or _yarn_ramp(config, low, high) == _yarn_ramp(config, *whole):
        return []
    return [
        f"the model's YaRN blends between dimensions {low:.2f} and {high:.2f}, llama.cpp's between {whole[0]:.0f} "
        f"and {whole[1]:.0f}, because it does not know truncate=false: it computes somewhat different logits, as "
        "from every GGUF of GPT-OSS"
    ]


def _yarn_dimension(config: GptOssConfig, rotations: float) -> float:
    """Returns the dimension that turns so many times within the original context (Peng et al. 2023, section 3.2)."""
    turns = config.initial_context_length / (2 * math.pi * rotations)
    return config.head_dim * math.log(turns) / (2 * math.log(config.rope_theta))


def _yarn_ramp(config: GptOssConfig, low: float, high: float) -> list[float]:
    """Returns how much of each rotation is slowed down, where `low` and `high` bound the blend."""
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = max(high - low, 1e-3)  # as both implementations avoid a division by zero
    return [min(max((i - low) / width, 0), 1) for i in range(config.head_dim // 2)]


def _too_many(**counts: int) -> list[str]:
    limits = {"num_local_experts": _MAX_EXPERTS}
    return [
        f"{name}={count}: llama.cpp takes at most {limits.get(name, _MAX_LAYERS)}"
        for name, count in counts.items()
        if count > limits.get(name, _MAX_LAYERS)
    ]


def _in_layers(block: list[Row], layers: int) -> list[Row]:
    return [
        dataclasses.replace(
            row,
            names=tuple(f"blk.{layer}.{name}" for name in row.names),
            target=f"blocks.{layer}.{row.target}",
        )
        for layer in range(layers)
        for row in block
    ]


FAMILIES = {
    "gpt2": Family("gpt2", _gpt2_rows, _gpt2_describe, _gpt2_problems, _gpt2_notes),
    "gpt_oss": Family(
        "gpt-oss", _gpt_oss_rows, _gpt_oss_describe, _gpt_oss_problems, _gpt_oss_notes
    ),
}
"""By the family of a model folder."""
