"""GPT-2 once more, in float64 NumPy, a sequence and a head at a time: written from the paper, not from `core`.

Slow and plain on purpose. It shares nothing with `core` but the names of parameters and configuration.
"""

import math
from typing import Any

import numpy as np

from core.config import GPT2Config

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}
ACTIVATIONS["gelu_fast"] = ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_new"]


def float64(params: Any) -> Any:
    """The nested dict as float64 NumPy arrays."""
    if isinstance(params, dict):
        return {name: float64(value) for name, value in params.items()}
    return np.asarray(params, np.float64)


def logits(config: Any, params: Any, tokens_BT: Any) -> np.ndarray:
    """The logits_BTV of `tokens_BT`."""
    p = float64(params)
    return np.stack([_sequence(config, p, np.asarray(row)) for row in tokens_BT])


def loss(config: Any, params: Any, inputs_BT: Any, targets_BT: Any) -> float:
    """The mean cross-entropy in nats over the targets that are not -1."""
    log_p = log_softmax(logits(config, params, inputs_BT))
    taken = [
        log_p[b, t, target]
        for b, row in enumerate(np.asarray(targets_BT))
        for t, target in enumerate(row)
        if target != -1
    ]
    return -sum(taken) / len(taken)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def _sequence(config: GPT2Config, p: Any, tokens_T: np.ndarray) -> np.ndarray:
    x = p["wte"]["embedding"][tokens_T] + p["wpe"]["embedding"][: len(tokens_T)]
    for layer in range(config.n_layer):
        block = p["blocks"][str(layer)]
        x = x + _attention(config, block["attn"], _norm(config, block["ln_1"], x), layer)
        x = x + _mlp(config, block["mlp"], _norm(config, block["ln_2"], x))
    head = p["wte"]["embedding"] if config.tie_word_embeddings else p["lm_head"]["kernel"]
    return _norm(config, p["ln_f"], x) @ head.T


def _norm(config: GPT2Config, p: Any, x: np.ndarray) -> np.ndarray:
    deviation = np.sqrt(x.var(axis=1, keepdims=True) + config.layer_norm_epsilon)
    return (x - x.mean(axis=1, keepdims=True)) / deviation * p["scale"] + p.get("bias", 0)


def _attention(config: GPT2Config, p: Any, x: np.ndarray, layer: int) -> np.ndarray:
    width = config.n_embd // config.n_head
    divisor = math.sqrt(width) if config.scale_attn_weights else 1
    if config.scale_attn_by_inverse_layer_idx:
        divisor *= layer + 1
    out = np.zeros_like(x) + p["out"].get("bias", 0)
    for head in range(config.n_head):
        qkv = [x @ p["qkv"]["kernel"][:, i, head] for i in range(3)]
        if config.use_bias:
            qkv = [y + p["qkv"]["bias"][i, head] for i, y in enumerate(qkv)]
        q, k, v = qkv
        for t in range(len(x)):
            weights = softmax(q[t] @ k[: t + 1].T / divisor)
            out[t] += weights @ v[: t + 1] @ p["out"]["kernel"][head]
    return out


def _mlp(config: GPT2Config, p: Any, x: np.ndarray) -> np.ndarray:
    hidden = x @ p["up"]["kernel"] + p["up"].get("bias", 0)
    hidden = ACTIVATIONS[config.activation_function](hidden)
    return hidden @ p["down"]["kernel"] + p["down"].get("bias", 0)
