"""Attention over a whole sequence by kernels of others, which never hold the scores (Dao et al., arXiv:2205.14135).

cuDNN's on an NVIDIA GPU, in half precision; splash attention on a TPU. Neither drops weights, and neither is used for
sinks: the gradient of the log-sum-exp that they would need is dropped by jax (its cotangent is not passed on).
"""

from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
_WORD = 128  # splash's blocks are multiples of it


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    implementation: str,
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns out_BTNH: each query's mixture of the values up to its own; the last `window` of them if given.

    `interpret` runs splash's kernel as plain operations, for tests.
    """
    if implementation == "splash":
        return _splash(q_BTNH, k_BTKH, v_BTKH, scale, window, interpret)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        is_causal=True,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    scale: float,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """Sequences are padded to whole blocks; nobody sees the padding, for it comes last."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    T, N = q_BTNH.shape[1:3]
    G = N // k_BTKH.shape[2]
    length = -(-T // _WORD) * _WORD
    shape = (length, length)
    mask = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    heads = splash_attention_mask.MultiHeadMask([mask] * N)
    kernel = splash_attention_kernel.make_splash_mha(
        heads, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def laid(x_BTNH: jax.Array, copies: int) -> jax.Array:
        x_BNTH = jnp.repeat(jnp.swapaxes(x_BTNH, 1, 2), copies, axis=1)
        return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, length - T), (0, 0)))

    out_BNTH: Any = jax.vmap(kernel)(laid(q_BTNH * scale, 1), laid(k_BTKH, G), laid(v_BTKH, G))
    return jnp.swapaxes(out_BNTH[:, :, :T], 1, 2)
