"""Causal attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2), over a sequence or over a cache.

Scores and softmax are float32 whatever the activations are, because bfloat16 loses the tail. Visibility is by
position: a query at position p sees the keys at positions 0..p, or the last `window` of them, and nothing else about
the batch matters. G query heads share each key head (Ainslie et al. 2023, arXiv:2305.13245); query head n has key head
n // G.

Long sequences go through in blocks of queries, so that the scores take a bounded number of bytes whatever the length;
where there is a window, a block meets only the keys that its window reaches.
"""

import functools

import jax
import jax.numpy as jnp

from core.layers import dropout

# Finite, so that a fully masked row gives a number; any value this low gives the same bits as minus infinity otherwise.
MASKED = -1e30

# Scores held at a time for a row of the batch: 134 MB. All published GPT-2s stay below it at their full context, and
# so in one block.
_SCORES = 2**25
_LARGEST_BLOCK = 512


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    key_positions_BS: jax.Array | None = None,
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
      k_BKSH: keys.
      v_BKSH: values.
      key_positions_BS: the position of each key, negative if it is none; None: index s along S is position s. With a
        window and several queries they run on by one and end with the queries' own.
      positions_BT: the position of each query.
      scale: what the scores are multiplied by, H**-0.5 in the paper.
      window: how many keys a query sees, its own included; None is all before it.
      sinks_N: a score a head that takes its share of the softmax and gives nothing (Xiao et al. 2023, arXiv:2309.17453;
        learned, as GPT-OSS has it). It is neither scaled nor masked.
      dropout_rate: share of the attention weights to drop, with `dropout_key`.
      dropout_key: none means no dropout.
    """
    T, N, S = q_BTNH.shape[1], q_BTNH.shape[2], k_BKSH.shape[2]
    if key_positions_BS is None:
        key_positions_BS = jnp.arange(S)[None]
    run = functools.partial(_attend, scale=scale, window=window, sinks_N=sinks_N, rate=dropout_rate)
    if N * T * S <= _SCORES:
        return run(q_BTNH, k_BKSH, v_BKSH, key_positions_BS, positions_BT, dropout_key)

    size, reach = _block(N, T, S, window)
    count = -(-T // size)

    def block(arguments) -> jax.Array:
        index, q_BtNH, positions_Bt, key = arguments
        first = 0 if window is None else jnp.clip(S - T + index * size - window, 0, S - reach)
        return run(
            q_BtNH,
            jax.lax.dynamic_slice_in_dim(k_BKSH, first, reach, axis=2),
            jax.lax.dynamic_slice_in_dim(v_BKSH, first, reach, axis=2),
            jax.lax.dynamic_slice_in_dim(key_positions_BS, first, reach, axis=1),
            positions_Bt,
            key,
        )

    keys = None if dropout_key is None else jax.random.split(dropout_key, count)
    blocks = _cut(q_BTNH, count, size), _cut(positions_BT, count, size)
    out_CBtNH = jax.lax.map(block, (jnp.arange(count), *blocks, keys))
    out_BTNH = jnp.moveaxis(out_CBtNH, 0, 1).reshape(len(q_BTNH), -1, *q_BTNH.shape[2:])
    return out_BTNH[:, :T]


def _block(N: int, T: int, S: int, window: int | None) -> tuple[int, int]:
    """Returns how many queries attend at a time, and over how many keys."""
    size = min(T, _LARGEST_BLOCK, window or T)
    while size > 1 and N * size * (S if window is None else size + window) > _SCORES:
        size //= 2
    return size, S if window is None else min(S, size + window)


def _cut(x_BT: jax.Array, count: int, size: int) -> jax.Array:
    """Returns T in `count` blocks of `size`, the blocks first; the last one is padded."""
    room = [(0, count * size - x_BT.shape[1]) if axis == 1 else (0, 0) for axis in range(x_BT.ndim)]
    blocks = jnp.pad(x_BT, room).reshape(x_BT.shape[0], count, size, *x_BT.shape[2:])
    return jnp.moveaxis(blocks, 1, 0)


def _attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    key_positions_BS: jax.Array,
    positions_BT: jax.Array,
    dropout_key: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    sinks_N: jax.Array | None,
    rate: float,
) -> jax.Array:
    """Returns out_BTNH with all scores at once."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    rows = N // K * T  # the queries that share a key head, as rows of one product
    q_BKRH = jnp.swapaxes(q_BTNH, 1, 2).reshape(B, K, rows, H)
    scores_BKRS = jnp.einsum(
        "BKRH,BKSH->BKRS", q_BKRH, k_BKSH.astype(q_BTNH.dtype), preferred_element_type=jnp.float32
    )
    scores_BNTS = scores_BKRS.reshape(B, N, T, S) * scale
    visible_BTS = _visible(positions_BT, key_positions_BS, window)
    weights_BNTS = _softmax(jnp.where(visible_BTS[:, None], scores_BNTS, MASKED), sinks_N)
    weights_BNTS = dropout(weights_BNTS.astype(q_BTNH.dtype), rate, dropout_key)
    out_BKRH = jnp.einsum(
        "BKRS,BKSH->BKRH", weights_BNTS.reshape(B, K, rows, S), v_BKSH.astype(q_BTNH.dtype)
    )
    return jnp.swapaxes(out_BKRH.reshape(B, N, T, H), 1, 2)


def _visible(positions_BT: jax.Array, key_positions_BS: jax.Array, window: int | None) -> jax.Array:
    queries_BT1, keys_B1S = positions_BT[:, :, None], key_positions_BS[:, None]
    visible_BTS = keys_B1S <= queries_BT1
    if window is None:
        return visible_BTS
    return visible_BTS & (keys_B1S > queries_BT1 - window) & (keys_B1S >= 0)


def _softmax(scores_BNTS: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
    """Returns the softmax over S, with the sink as one score more whose weight is given to nobody."""
    if sinks_N is None:
        return jax.nn.softmax(scores_BNTS, axis=-1)
    sinks_1N11 = sinks_N.astype(jnp.float32)[None, :, None, None]
    highest_BNT1 = jnp.maximum(scores_BNTS.max(-1, keepdims=True), sinks_1N11)
    highest_BNT1 = jax.lax.stop_gradient(highest_BNT1)
    exp_BNTS = jnp.exp(scores_BNTS - highest_BNT1)
    return exp_BNTS / (exp_BNTS.sum(-1, keepdims=True) + jnp.exp(sinks_1N11 - highest_BNT1))
