"""Tiny GPT-OSSs: sizes pairwise different, weights large enough for a mistake to show, and the model in float64 NumPy.

The reference is written from the model card and OpenAI's code, a token, a head and an expert at a time. It shares
nothing with `core` but the names of parameters and configuration.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from core import axes
from core.config import GptOssConfig

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 7,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 4096,
    "sliding_window": 17,
    "initial_context_length": 512,  # with this base YaRN's ramp goes over four pairs of five
    "rope_theta": 100.0,
    "swiglu_limit": 0.5,  # so that the clamp acts
}

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "truncate": {"rope_truncate": True},
    "no yarn": {"rope_factor": 1.0},
    "all full": {"layer_types": ("full_attention",) * 3},
    "full first": {"layer_types": ("full_attention", "sliding_attention", "full_attention")},
    "wide limit": {"swiglu_limit": 7.0},
    "tied": {"tie_word_embeddings": True},
}

CODES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def config(**variant: Any) -> GptOssConfig:
    """V 101, D 24, F 20, L 3, N 6, K 2, H 10, E 7 of which 3 are chosen, and what `variant` says."""
    return GptOssConfig(**(SIZES | variant))


def packed_config(**variant: Any) -> GptOssConfig:
    """The same with experts in MXFP4: D 64 and F 96, which are whole blocks."""
    return config(hidden_size=64, intermediate_size=96, quantization="mxfp4", **variant)


def weights(config: GptOssConfig, amplify: float = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters by name: as they start, or amplified, and then no norm, bias or sink is trivial."""
    rng = np.random.default_rng(seed)
    flat = {}
    for name, word in config.tensors().items():
        shape = axes.shape(word, config.axes)
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith(".blocks"):
            flat[name] = rng.integers(0, 256, shape, np.uint8)
        elif name.endswith(".scales"):
            flat[name] = rng.integers(122, 126, shape, np.uint8)
        elif name.endswith((".kernel", ".embedding")):
            flat[name] = noise * config.initializer_range * amplify
        elif amplify == 1:
            flat[name] = noise * (0.02 if "sinks" in name else 0) + name.endswith(".scale")
        else:
            flat[name] = noise * (1.0 if "sinks" in name else 0.3) + name.endswith(".scale")
    return flat


def params(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """The nested dict of JAX arrays."""
    return traverse_util.unflatten_dict({n: jnp.asarray(x) for n, x in flat.items()}, sep=".")


def unpacked(config: GptOssConfig, flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of `config.dense`, decoded number by number as the MXFP4 standard says."""
    dense = {n: x for n, x in flat.items() if not n.endswith((".blocks", ".scales"))}
    for name in flat:
        if name.endswith(".blocks"):
            kernel = name.removesuffix(".blocks")
            values = decode(flat[name], flat[f"{kernel}.scales"])
            dense[kernel] = np.moveaxis(values, -1, 1).astype(np.float32)
    return dense


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 in float64: low half first, the sign in bit 3, and a scale of 2 ** (s - 127) for every 32."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = np.array([*CODES, *(-np.array(CODES))])[codes]
    return (values * 2.0 ** (scales[..., None].astype(float) - 127)).reshape(*scales.shape[:-1], -1)


def logits(config: GptOssConfig, flat: dict[str, np.ndarray], tokens_BT: Any, **wrong: Any):
    """The logits_BTV in float64; `wrong` names a mistake to make (see the places that look at it)."""
    p = {name: np.asarray(x, np.float64) for name, x in flat.items()}
    return np.stack([_sequence(config, p, np.asarray(row), wrong) for row in tokens_BT])


def inverse_frequencies(config: GptOssConfig, wrong: dict[str, Any]) -> tuple[np.ndarray, float]:
    """YaRN's angle per position of every pair, and its factor on cos and sin."""
    half, base = config.head_dim // 2, config.rope_theta
    angles = np.array([base ** (-2 * i / config.head_dim) for i in range(half)])
    ends = [
        half * math.log(config.initial_context_length / (2 * math.pi * turns)) / math.log(base)
        for turns in (config.rope_beta_fast, config.rope_beta_slow)
    ]
    if config.rope_truncate or "truncate" in wrong:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], config.head_dim - 1)
    for i in range(half):
        share = min(max((i - low) / (high - low), 0), 1)
        angles[i] *= (1 - share) + share / config.rope_factor
    return angles, 0.1 * math.log(config.rope_factor) + 1


def _sequence(config: GptOssConfig, p: Any, tokens_T: np.ndarray, wrong: dict[str, Any]):
    x = p["wte.embedding"][tokens_T]
    for layer in range(config.num_hidden_layers):
        block = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in p.items()
            if name.startswith(f"blocks.{layer}.")
        }
        x = x + _attention(config, block, _norm(config, x, block["norm_1.scale"]), layer, wrong)
        y = _norm(config, x, block["norm_2.scale"])
        x = x + np.stack([_experts(config, block, row, wrong) for row in y])
    head = p["wte.embedding"] if config.tie_word_embeddings else p["lm_head.kernel"]
    return _norm(config, x, p["norm_f.scale"]) @ head.T


def _norm(config: GptOssConfig, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + config.rms_norm_eps) * scale


def _turn(config: GptOssConfig, x: np.ndarray, position: int, wrong: dict[str, Any]) -> np.ndarray:
    angles, factor = inverse_frequencies(config, wrong)
    factor = 1 if "concentration" in wrong else factor
    half = len(angles)
    pairs = [(2 * i, 2 * i + 1) if "interleaved" in wrong else (i, i + half) for i in range(half)]
    turned = np.zeros_like(x)
    for (a, b), angle in zip(pairs, position * angles, strict=True):
        turned[a] = (x[a] * math.cos(angle) - x[b] * math.sin(angle)) * factor
        turned[b] = (x[b] * math.cos(angle) + x[a] * math.sin(angle)) * factor
    return turned


def _attention(config: GptOssConfig, p: Any, x: np.ndarray, layer: int, wrong: dict[str, Any]):
    group = config.num_attention_heads // config.num_key_value_heads
    sliding = (config.layer_types or ())[layer] == "sliding_attention"
    window = config.sliding_window + wrong.get("window", 0)
    if "odd layers slide" in wrong:
        sliding = not sliding
    out = np.zeros_like(x) + p["attn.out.bias"]
    for head in range(config.num_attention_heads):
        key = head % config.num_key_value_heads if "heads" in wrong else head // group
        q, k, v = (
            x @ p[f"attn.{name}.kernel"][:, h] + p[f"attn.{name}.bias"][h]
            for name, h in (("q", head), ("k", key), ("v", key))
        )
        q, k = (np.stack([_turn(config, y[t], t, wrong) for t in range(len(x))]) for y in (q, k))
        sink = p["attn.sinks"][head] * (config.head_dim**-0.5 if "scaled sinks" in wrong else 1)
        for t in range(len(x)):
            first = max(0, t - window + 1) if sliding else 0
            scores = k[first : t + 1] @ q[t] / math.sqrt(config.head_dim)
            shares = np.exp(scores)
            total = shares.sum() + (0 if "no sinks" in wrong else math.exp(sink))
            out[t] += shares / total @ v[first : t + 1] @ p["attn.out.kernel"][head]
    return out


def _experts(config: GptOssConfig, p: Any, row: np.ndarray, wrong: dict[str, Any]) -> np.ndarray:
    scores = row @ p["moe.router.kernel"] + p["moe.router.bias"]
    chosen = np.argsort(-scores)[: config.num_experts_per_tok]
    among = scores if "softmax before top-k" in wrong else scores[chosen]
    shares = np.exp(scores[chosen]) / np.exp(among).sum()
    limit = math.inf if "no clamp" in wrong else config.swiglu_limit
    alpha = 1 if "alpha" in wrong else config.swiglu_alpha
    out = np.zeros_like(row)
    for share, e in zip(shares, chosen, strict=True):
        both = np.einsum("d,dfc->fc", row, p["moe.gate_up.kernel"][e]) + p["moe.gate_up.bias"][e]
        gate, up = both.T.reshape(2, -1)
        if "halves" in wrong:
            gate, up = both.reshape(2, -1)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        if "gate from below" in wrong:
            gate = np.maximum(gate, -limit)
        hidden = (up + (0 if "no one" in wrong else 1)) * gate / (1 + np.exp(-alpha * gate))
        bias = p["moe.down.bias"][e] * (0 if "no bias" in wrong else 1)
        out += share * (hidden @ p["moe.down.kernel"][e] + bias)
    return out
