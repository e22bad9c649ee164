"""Causal attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2), over a sequence or over a cache.

Scores and softmax are float32 whatever the activations are, because bfloat16 loses the tail. Visibility is by
position: a query at position p sees the keys at positions 0..p, or the last `window` of them, and nothing else about
the batch matters. G query heads share each key head (Ainslie et al. 2023, arXiv:2305.13245); query head n has key head
n // G.

Long sequences go through in blocks of queries, so that the scores take a bounded number of bytes whatever the length;
where there is a window, a block meets only the keys that its window reaches.

Over a cache, queries meet the keys in blocks of positions that are the same for everyone, as far as the furthest row
has come, with the softmax kept up from block to block (Milakov & Gimelshein 2018, arXiv:1805.02867). A block of which a
row sees nothing changes no bit of that row's, so a row's numbers do not depend on its neighbours, and the time depends
on what is in the cache, not on its size.
"""

import functools

import jax
import jax.numpy as jnp

from core import flash, kv_cache, native
from core.kv_cache import Layer
from core.layers import dropout, wide_dtype

# Finite, so that a fully masked row gives a number; any value this low gives the same bits as minus infinity otherwise.
MASKED = -1e30

# Scores held at a time for a row of the batch: 134 MB. All published GPT-2s stay below it at their full context, and
# so in one block.
_SCORES = 2**25
_LARGEST_BLOCK = 512
_POSITIONS = 64  # of a cache, that queries meet at a time


def attend_next(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    past: Layer | None,
    *,
    positions_BT: jax.Array,
    scale: float,
    lengths_B: jax.Array | None = None,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "xla",
) -> tuple[jax.Array, Layer | None]:
    """Returns out_BTNH, each query's mixture of the values up to its own, and the layer's cache with them in it.

    Args:
      q_BTNH: queries.
      k_BTKH: the keys at the same positions.
      v_BTKH: their values.
      past: the layer's cache; None if these are all positions from 0 on.
      positions_BT: where they go; they run on by one along T.
      scale: see `attend`.
      lengths_B: how many of the T are tokens; the rest is padding, which nobody sees. None is all.
      window: how many keys a query of this layer sees, its own included; the cache is then a ring.
      sinks_N: see `attend`.
      dropout_rate: see `attend`; without a cache only.
      dropout_key: see `attend`.
      implementation: one of `core.flash.IMPLEMENTATIONS`, without a cache only.
    """
    B, T = positions_BT.shape
    if past is None and implementation != "xla":
        assert sinks_N is None
        assert dropout_key is None or dropout_rate == 0
        fused = flash.attend(q_BTNH, k_BTKH, v_BTKH, implementation, scale=scale, window=window)
        return fused, None
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    given = {"positions_BT": positions_BT, "scale": scale, "sinks_N": sinks_N}
    if past is None:
        drop = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
        return attend(q_BTNH, k_BKTH, v_BKTH, window=window, **given, **drop), None
    new = k_BKTH, v_BKTH, positions_BT, jnp.full(B, T) if lengths_B is None else lengths_B
    S = past.k_RKSH.shape[2]
    # A cache of fewer slots than the window was made for fewer positions than that: nothing is evicted.
    few = T <= kv_cache.FEW and (window is None or window > S or window + T - 1 <= S)
    if native.is_serving() and native.attends(q_BTNH.dtype, past.k_RKSH.dtype):
        seen = {"starts_B": positions_BT[:, 0], "lengths_B": new[3]}
        if few:
            past = kv_cache.append(past, *new)
            return native.attend_cache(
                q_BTNH, *past, **seen, scale=scale, sinks_N=sinks_N, window=window
            ), past
        if window is None:
            past = kv_cache.append(past, *new)
            return native.attend_prompt(q_BTNH, *past, **seen, scale=scale, sinks_N=sinks_N), past
    if window is None:
        past = kv_cache.append(past, *new)
        return attend_cache(q_BTNH, past, lengths_B=new[3], **given), past
    if few:
        past = kv_cache.append(past, *new)
        k_BKSH, v_BKSH = (kv_cache.rows_of(x, past.first_row, B) for x in past[:2])
        held_BS = kv_cache.held(positions_BT[:, 0] + new[3] - 1, S)
        k_BKSH = kv_cache.numbers(k_BKSH)
        v_BKSH = kv_cache.numbers(kv_cache.only(v_BKSH, held_BS >= 0))
        return attend(q_BTNH, k_BKSH, v_BKSH, held_BS, window=window, **given), past
    laid, past = kv_cache.lay_out(past, *new)
    return attend(q_BTNH, *laid, window=window, **given), past


def attend_cache(
    q_BTNH: jax.Array,
    cache: Layer,
    *,
    positions_BT: jax.Array,
    lengths_B: jax.Array,
    scale: float,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Returns out_BTNH: `attend` over a cache of all positions, read no further than the furthest row has come.

    What a row's slot holds beyond its first `lengths_B` queries is not its own, and may be no number.
    """
    B, T, N, H = q_BTNH.shape
    K, S = cache.k_RKSH.shape[1:3]
    size = _POSITIONS if S % _POSITIONS == 0 else S
    rows, dtype = N // K * T, jax.eval_shape(kv_cache.numbers, cache.k_RKSH).dtype
    q_BKRH = jnp.swapaxes(q_BTNH, 1, 2).reshape(B, K, rows, H).astype(dtype)
    positions_BR1 = jnp.tile(positions_BT, (1, N // K))[:, :, None]
    first_row = 0 if cache.first_row is None else cache.first_row
    # The sink is a score that every query has met already.
    sinks_N = None if sinks_N is None else sinks_N.astype(jnp.float32)
    highest_KR = jnp.full((K, rows), MASKED) if sinks_N is None else _each(sinks_N, K, T)
    highest_BKR = jnp.broadcast_to(highest_KR[None], (B, K, rows))
    sum_BKR = jnp.full((B, K, rows), 0.0 if sinks_N is None else 1.0)

    def block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest_BKR, sum_BKR, out_BKRH = carry
        k_RKSH, v_RKSH = cache.k_RKSH, cache.v_RKSH
        if dtype.itemsize < 4:
            # Else XLA makes a float32 copy of the whole cache before the loop, which takes up to 60 times as long.
            k_RKSH, v_RKSH, i = jax.lax.optimization_barrier((k_RKSH, v_RKSH, i))
        place, shape = (first_row, 0, i * size, 0), (B, K, size, H)
        k_BKsH = kv_cache.numbers(jax.lax.dynamic_slice(k_RKSH, place, shape))
        v_BKsH = kv_cache.numbers(jax.lax.dynamic_slice(v_RKSH, place, shape))
        v_BKsH = kv_cache.only(v_BKsH, i * size + jnp.arange(size)[None] <= last_B1)
        scores_BKRs = _einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKsH) * scale
        visible_BRs = i * size + jnp.arange(size)[None, None] <= positions_BR1
        scores_BKRs = jnp.where(visible_BRs[:, None], scores_BKRs, MASKED)
        rise_BKR = jnp.maximum(highest_BKR, scores_BKRs.max(-1))
        weights_BKRs = jnp.exp(scores_BKRs - rise_BKR[..., None])
        kept_BKR = jnp.exp(highest_BKR - rise_BKR)
        mixed_BKRH = _einsum("BKRS,BKSH->BKRH", weights_BKRs.astype(dtype), v_BKsH)
        return (
            rise_BKR,
            sum_BKR * kept_BKR + weights_BKRs.sum(-1),
            out_BKRH * kept_BKR[..., None] + mixed_BKRH,
        )

    last_B1 = (positions_BT[:, 0] + lengths_B - 1)[:, None]
    blocks = jnp.minimum(positions_BT.max(), S - 1) // size + 1
    start = highest_BKR, sum_BKR, jnp.zeros((B, K, rows, H))
    _, sum_BKR, out_BKRH = jax.lax.fori_loop(0, blocks, block, start)
    out_BNTH = (out_BKRH / sum_BKR[..., None]).reshape(B, N, T, H)
    return jnp.swapaxes(out_BNTH, 1, 2).astype(q_BTNH.dtype)


def _each(x_N: jax.Array, K: int, T: int) -> jax.Array:
    """Returns x_KR: each head's number for each of its T queries, as rows of its key head."""
    return jnp.broadcast_to(x_N.reshape(K, -1, 1), (K, x_N.size // K, T)).reshape(K, -1)


def _einsum(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


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
        "BKRH,BKSH->BKRS",
        q_BKRH,
        k_BKSH.astype(q_BTNH.dtype),
        preferred_element_type=wide_dtype(q_BTNH.dtype),
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
