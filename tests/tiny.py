"""Tiny GPT-2s for every package's tests: sizes pairwise different, weights large enough for a mistake to show."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from core import axes
from core.config import Config, GPT2Config
from core.models import Model

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "n_positions": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gelu_new": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "quick_gelu": {"activation_function": "quick_gelu"},
    "inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "n_inner": {"n_inner": 50},
    "untied": {"tie_word_embeddings": False},
    "reorder_and_upcast": {"reorder_and_upcast_attn": True},
    "epsilon": {"layer_norm_epsilon": 1e-3},
    "no_bias": {"use_bias": False},
}
"""Every way in which a GPT-2's mathematics varies."""


def config(**variant: Any) -> GPT2Config:
    """V 97, P 61, D 24, L 2, N 4, H 6, F 96, and what `variant` says."""
    return GPT2Config(**(SIZES | variant))


def params(model: Model, amplify: float = 5, seed: int = 0) -> dict[str, Any]:
    """Random parameters: at 1 as GPT-2 starts; above, weights that many times larger, and no norm or bias trivial.

    At its initialisation a GPT-2 is nearly linear and its norms do nothing, so that most mistakes hide.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for name, word in model.config.tensors().items():
        shape = axes.shape(word, model.config.axes)
        noise = rng.standard_normal(shape)
        if name.endswith((".kernel", ".embedding")):
            value = noise * model.config.initializer_range * amplify
        else:
            value = noise * (0 if amplify == 1 else 0.3) + name.endswith(".scale")
        flat[name] = jnp.asarray(value, jnp.float32)
    return traverse_util.unflatten_dict(flat, sep=".")


def tokens(config: Config, *shape: int, seed: int = 0) -> jax.Array:
    """Random ids."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, shape)
    return jnp.asarray(ids, jnp.int32)
