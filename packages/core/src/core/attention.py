"""Causal attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2), over a sequence or over a cache.

Scores and softmax are float32 whatever the activations are, because bfloat16 loses the tail. Visibility is by
position: a query at position p sees the keys at positions 0..p, or the last `window` of them, and nothing else about
the batch matters. G query heads share each key head (Ainslie et al. 2023, arXiv:2305.13245); query head n has key head
n // G.
"""

import jax
import jax.numpy as jnp

from core.layers import dropout

# Finite, so that a fully masked row gives a number; any value this low gives the same bits as minus infinity otherwise.
MASKED = -1e30


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    positions_BT: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns out_BTNH: each query's mixture of the values at positions up to its own.

    Args:
      q_BTNH: queries.
      k_BKSH: keys; index s along S is position s.
      v_BKSH: values, likewise.
      positions_BT: the position of each query.
      scale: what the scores are multiplied by, H**-0.5 in the paper.
      window: how many keys a query sees, its own included; None is all before it.
      sinks_N: a score a head that takes its share of the softmax and gives nothing (Xiao et al. 2023, arXiv:2309.17453;
        learned, as GPT-OSS has it). It is neither scaled nor masked.
      dropout_rate: share of the attention weights to drop, with `dropout_key`.
      dropout_key: none means no dropout.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    rows = N // K * T  # the queries that share a key head, as rows of one product
    q_BKRH = jnp.swapaxes(q_BTNH, 1, 2).reshape(B, K, rows, H)
    scores_BKRS = jnp.einsum(
        "BKRH,BKSH->BKRS", q_BKRH, k_BKSH.astype(q_BTNH.dtype), preferred_element_type=jnp.float32
    )
    scores_BNTS = scores_BKRS.reshape(B, N, T, S) * scale
    visible_BTS = _visible(positions_BT, S, window)
    weights_BNTS = _softmax(jnp.where(visible_BTS[:, None], scores_BNTS, MASKED), sinks_N)
    weights_BNTS = dropout(weights_BNTS.astype(q_BTNH.dtype), dropout_rate, dropout_key)
    out_BKRH = jnp.einsum(
        "BKRS,BKSH->BKRH", weights_BNTS.reshape(B, K, rows, S), v_BKSH.astype(q_BTNH.dtype)
    )
    return jnp.swapaxes(out_BKRH.reshape(B, N, T, H), 1, 2)


def _visible(positions_BT: jax.Array, S: int, window: int | None) -> jax.Array:
    queries_BT1, keys_11S = positions_BT[:, :, None], jnp.arange(S)[None, None]
    visible_BTS = keys_11S <= queries_BT1
    return visible_BTS if window is None else visible_BTS & (keys_11S > queries_BT1 - window)


def _softmax(scores_BNTS: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
    """Returns the softmax over S, with the sink as one score more whose weight is given to nobody."""
    if sinks_N is None:
        return jax.nn.softmax(scores_BNTS, axis=-1)
    sinks_1N11 = sinks_N.astype(jnp.float32)[None, :, None, None]
    highest_BNT1 = jnp.maximum(scores_BNTS.max(-1, keepdims=True), sinks_1N11)
    highest_BNT1 = jax.lax.stop_gradient(highest_BNT1)
    exp_BNTS = jnp.exp(scores_BNTS - highest_BNT1)
    return exp_BNTS / (exp_BNTS.sum(-1, keepdims=True) + jnp.exp(sinks_1N11 - highest_BNT1))
