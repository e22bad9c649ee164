"""Causal attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2), over a sequence or over a cache.

Scores and softmax are float32 whatever the activations are, because bfloat16 loses the tail. Visibility is by
position: a query at position p sees the keys at positions 0..p, and nothing else about the batch matters.
"""

import jax
import jax.numpy as jnp

from core.layers import dropout

# Finite, so that a fully masked row gives a number; any value this low gives the same bits as minus infinity otherwise.
MASKED = -1e30


def attend(
    q_BTNH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    *,
    positions_BT: jax.Array,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns out_BTNH: each query's mixture of the values at positions up to its own.

    Args:
      q_BTNH: queries.
      k_BNSH: keys; index s along S is position s.
      v_BNSH: values, likewise.
      positions_BT: the position of each query.
      scale: what the scores are multiplied by, H**-0.5 in the paper.
      dropout_rate: share of the attention weights to drop, with `dropout_key`.
      dropout_key: none means no dropout.
    """
    scores_BNTS = jnp.einsum(
        "BTNH,BNSH->BNTS", q_BTNH, k_BNSH.astype(q_BTNH.dtype), preferred_element_type=jnp.float32
    )
    key_positions_S = jnp.arange(k_BNSH.shape[2])
    visible_BTS = key_positions_S[None, None, :] <= positions_BT[:, :, None]
    scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS * scale, MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    weights_BNTS = dropout(weights_BNTS, dropout_rate, dropout_key)
    return jnp.einsum("BNTS,BNSH->BTNH", weights_BNTS, v_BNSH.astype(q_BTNH.dtype))
