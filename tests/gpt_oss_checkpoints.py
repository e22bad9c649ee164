"""Tiny GPT-OSS checkpoints as Hugging Face and OpenAI store them, spelled out by hand and not by a table.

Packed experts are made from codes that are drawn first, so that what they stand for is known without a decoder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

# Pairwise different, also in products (NH 48, KH 12, 2F 192) and in blocks of 32 (D 4, F 3).
V, D, N, K, H, F, E, L = 97, 128, 8, 2, 6, 96, 5, 3

CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 96,
    "experts_per_token": 2,
    "head_dim": H,
    "hidden_act": "silu",
    "hidden_size": D,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": F,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": N,
    "num_experts_per_tok": 2,
    "num_hidden_layers": L,
    "num_key_value_heads": K,
    "num_local_experts": E,
    "output_router_logits": False,
    "pad_token_id": 95,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 7,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": V,
}
"""As openai/gpt-oss-20b's, with other sizes and dense experts."""

MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
PACKED_CONFIG = {**CONFIG, "quantization_config": MXFP4}

ORIGINAL_CONFIG: dict[str, Any] = {
    "num_hidden_layers": L,
    "num_experts": E,
    "experts_per_token": 2,
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "swiglu_limit": 7.0,
    "head_dim": H,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "sliding_window": 7,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}
"""As gpt-oss-20b's original/config.json, with other sizes."""

FILES = {"tokenizer.json": b'{"version": "1.0"}', "chat_template.jinja": b"{{ messages }}"}


def packed(seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint as openai/gpt-oss-20b's: bytes for the experts' kernels, bfloat16 for all else."""
    rng = np.random.default_rng(seed)
    weights = {n: _normal(rng, shape, "bfloat16") for n, shape in _plain_shapes().items()}
    for layer in range(L):
        for name, (out, into) in _EXPERTS.items():
            codes, scales = draw(rng, (E, out, into))
            weights[f"{_experts(layer)}.{name}_blocks"] = pack(codes)
            weights[f"{_experts(layer)}.{name}_scales"] = scales
    return weights


def unpacked(seed: int = 0) -> dict[str, np.ndarray]:
    """The same model as `packed`'s with dense experts [expert, in, out], computed from the codes in float64."""
    rng = np.random.default_rng(seed)
    weights = {n: _normal(rng, shape, "bfloat16") for n, shape in _plain_shapes().items()}
    for layer in range(L):
        for name, (out, into) in _EXPERTS.items():
            kernel = value(*draw(rng, (E, out, into))).astype(ml_dtypes.bfloat16)
            weights[f"{_experts(layer)}.{name}"] = np.ascontiguousarray(kernel.swapaxes(1, 2))
    return weights


def dense(dtype: str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint with dense experts and random weights of one type, as transformers saves it."""
    rng = np.random.default_rng(seed)
    shapes = dict(_plain_shapes())
    for layer in range(L):
        for name, (out, into) in _EXPERTS.items():
            shapes[f"{_experts(layer)}.{name}"] = (E, into, out)
    return {name: _normal(rng, shape, dtype) for name, shape in shapes.items()}


def original(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of `packed` under OpenAI's names."""
    w = weights
    renamed = {
        "embedding.weight": w["model.embed_tokens.weight"],
        "norm.scale": w["model.norm.weight"],
        "unembedding.weight": w["lm_head.weight"],
    }
    for i in range(L):
        ours, theirs = f"block.{i}.", f"model.layers.{i}."
        attention, experts = f"{theirs}self_attn.", f"{theirs}mlp.experts."
        renamed[f"{ours}attn.norm.scale"] = w[f"{theirs}input_layernorm.weight"]
        for kind in ("weight", "bias"):
            rows = [w[f"{attention}{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"{ours}attn.qkv.{kind}"] = np.concatenate(rows)
            renamed[f"{ours}attn.out.{kind}"] = w[f"{attention}o_proj.{kind}"]
            renamed[f"{ours}mlp.gate.{kind}"] = w[f"{theirs}mlp.router.{kind}"]
        renamed[f"{ours}attn.sinks"] = w[f"{attention}sinks"]
        renamed[f"{ours}mlp.norm.scale"] = w[f"{theirs}post_attention_layernorm.weight"]
        for number, name in ((1, "gate_up_proj"), (2, "down_proj")):
            renamed[f"{ours}mlp.mlp{number}_weight.blocks"] = w[f"{experts}{name}_blocks"]
            renamed[f"{ours}mlp.mlp{number}_weight.scales"] = w[f"{experts}{name}_scales"]
            renamed[f"{ours}mlp.mlp{number}_bias"] = w[f"{experts}{name}_bias"]
    return renamed


def as_parameters(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names, packed or dense, under our names and in our shapes."""
    w = weights
    params = {
        "wte.embedding": w["model.embed_tokens.weight"],
        "norm_f.scale": w["model.norm.weight"],
        "lm_head.kernel": w["lm_head.weight"],
    }
    for i in range(L):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        attention, experts = f"{theirs}self_attn.", f"{theirs}mlp.experts."
        params[f"{ours}norm_1.scale"] = w[f"{theirs}input_layernorm.weight"]
        for part, heads in (("q", N), ("k", K), ("v", K)):
            kernel, bias = (w[f"{attention}{part}_proj.{kind}"] for kind in ("weight", "bias"))
            params[f"{ours}attn.{part}.kernel"] = kernel.T.reshape(D, heads, H)
            params[f"{ours}attn.{part}.bias"] = bias.reshape(heads, H)
        params[f"{ours}attn.out.kernel"] = w[f"{attention}o_proj.weight"].T.reshape(N, H, D)
        params[f"{ours}attn.out.bias"] = w[f"{attention}o_proj.bias"]
        params[f"{ours}attn.sinks"] = w[f"{attention}sinks"]
        params[f"{ours}norm_2.scale"] = w[f"{theirs}post_attention_layernorm.weight"]
        params[f"{ours}moe.router.kernel"] = w[f"{theirs}mlp.router.weight"].T
        params[f"{ours}moe.router.bias"] = w[f"{theirs}mlp.router.bias"]
        params[f"{ours}moe.gate_up.bias"] = w[f"{experts}gate_up_proj_bias"].reshape(E, F, 2)
        params[f"{ours}moe.down.bias"] = w[f"{experts}down_proj_bias"]
        into = f"{ours}moe."
        if f"{experts}down_proj" in w:
            params[f"{into}gate_up.kernel"] = w[f"{experts}gate_up_proj"].reshape(E, D, F, 2)
            params[f"{into}down.kernel"] = w[f"{experts}down_proj"]
            continue
        gate_up = w[f"{experts}gate_up_proj_blocks"].reshape(E, F, 2, D // 32, 16)
        params[f"{into}gate_up.kernel.blocks"] = gate_up
        scales = w[f"{experts}gate_up_proj_scales"].reshape(E, F, 2, D // 32)
        params[f"{into}gate_up.kernel.scales"] = scales
        params[f"{into}down.kernel.blocks"] = w[f"{experts}down_proj_blocks"]
        params[f"{into}down.kernel.scales"] = w[f"{experts}down_proj_scales"]
    return params


def draw(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Random codes [expert, out, in], and for every 32 of them along `in` a scale byte."""
    codes = rng.integers(0, 16, shape, np.uint8)
    scales = rng.integers(112, 124, (*shape[:-1], shape[-1] // 32), np.uint8)
    return codes, scales


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes [..., in] as blocks [..., in / 32, 16]: of two neighbours the first is the low nibble."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 16, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def value(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What codes [..., in] and scales [..., in / 32] stand for, in float64, by the bits of E2M1 and E8M0."""
    sign, exponent, significand = codes >> 3, codes >> 1 & 3, codes & 1
    magnitude = np.where(
        exponent == 0, significand / 2, (1 + significand / 2) * 2.0 ** (exponent - 1.0)
    )
    powers = 2.0 ** (np.repeat(scales, 32, axis=-1).astype(np.float64) - 127)
    return np.where(sign == 1, -magnitude, magnitude) * powers


def write(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] = FILES,
) -> Path:
    """Writes a folder with one file of weights."""
    _start(folder, config, files)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(
    folder: Path,
    shards: Mapping[str, Mapping[str, np.ndarray]],
    config: Mapping[str, Any],
    *,
    index: bool = True,
) -> Path:
    """Writes a folder with several files of weights, by the names they shall have, and an index if wanted."""
    _start(folder, config, FILES)
    for name, part in shards.items():
        save_file(dict(part), folder / name, metadata={"format": "pt"})
    if index:
        weight_map = {tensor: name for name, part in shards.items() for tensor in part}
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


_EXPERTS = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}  # (out, in)


def _experts(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def _plain_shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (N * H, D),
        "self_attn.q_proj.bias": (N * H,),
        "self_attn.k_proj.weight": (K * H, D),
        "self_attn.k_proj.bias": (K * H,),
        "self_attn.v_proj.weight": (K * H, D),
        "self_attn.v_proj.bias": (K * H,),
        "self_attn.o_proj.weight": (D, N * H),
        "self_attn.o_proj.bias": (D,),
        "self_attn.sinks": (N,),
        "post_attention_layernorm.weight": (D,),
        "mlp.router.weight": (E, D),
        "mlp.router.bias": (E,),
        "mlp.experts.gate_up_proj_bias": (E, 2 * F),
        "mlp.experts.down_proj_bias": (E, D),
    }
    layers = {f"model.layers.{i}.{name}": s for i in range(L) for name, s in block.items()}
    ends = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    return {**layers, **ends, "model.norm.weight": (D,)}


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return (rng.standard_normal(shape) * 0.1).astype(kind)


def _start(folder: Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_bytes(content)
