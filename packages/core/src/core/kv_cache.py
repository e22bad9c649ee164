"""The keys and values of the tokens seen so far: a pytree that goes into a model and comes out of it.

Layout [B, K, S, H] a layer, unstacked: a decode step reads one head's keys as one contiguous block, which on a CPU is
1.6 times as fast at 32 rows as [B, S, K, H] (docs/log.md).

A layer that sees all has a slot for every position. One that sees the last `window` has a ring of that many: slot s
holds the latest position p with p % S == s, so that which it is follows from how far the row has come, and nothing
but keys and values is stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.config import Config


class KVCache(NamedTuple):
    """One entry a layer; slot s along S holds the token at position s, in a ring the latest at s, S + s, 2 S + s ..."""

    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]

    @classmethod
    def zeros(cls, config: Config, batch: int, length: int, dtype=jnp.float32) -> "KVCache":
        """Returns an empty cache for the positions below `length` of each of `batch` rows.

        It takes 2 * batch * key heads * head size * slots numbers a layer: `length` slots, or the window if that is
        fewer.
        """
        sizes = config.axes
        heads = sizes.get("K", sizes["N"])  # without grouped queries every head has its own keys
        slots = [length if w is None else min(length, w) for w in config.windows]
        shapes = [(batch, heads, S, sizes["H"]) for S in slots]
        return cls(*(tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2)))


class Seen(NamedTuple):
    """The keys and values that queries may look at, and where they stand."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array | None = None
    """Each key's position, negative if there is none; None: index s along S is position s."""


Layer = tuple[jax.Array, jax.Array]
"""One layer's k_BKSH and v_BKSH."""


def extend(
    past: Layer | None,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    *,
    window: int | None = None,
    lengths_B: jax.Array | None = None,
) -> tuple[Seen, Layer]:
    """Returns what queries at `positions_BT` may look at, and the layer's cache with the new entries in it.

    Args:
      past: the layer's cache; None if these are all positions from 0 on.
      k_BTKH: the new keys.
      v_BTKH: the new values.
      positions_BT: where they go; they run on by one along T.
      window: how many keys a query of this layer sees, itself included; the cache is then a ring.
      lengths_B: how many of the T are tokens; the rest is padding, which evicts nothing. None is all.
    """
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    if past is None:
        return Seen(k_BKTH, v_BKTH), (k_BKTH, v_BKTH)
    start_B, T, S = positions_BT[:, 0], positions_BT.shape[1], past[0].shape[2]
    if window is None or (T == 1 and lengths_B is None):
        slot_B = start_B if window is None else start_B % S
        k_BKSH, v_BKSH = _write(past[0], k_BKTH, slot_B), _write(past[1], v_BKTH, slot_B)
        # Without a ring, padding is overwritten before anyone comes far enough to see it.
        held_BS = None if window is None else _held(start_B, S)
        return Seen(k_BKSH, v_BKSH, held_BS), (k_BKSH, v_BKSH)
    # A prompt's first queries see what its last keys evict, so past and new lie side by side, in order of position.
    order_BS = (start_B[:, None] + jnp.arange(S)[None]) % S
    k_BKXH, v_BKXH = (
        jnp.concatenate([_take(cache_BKSH, order_BS), new_BKTH.astype(cache_BKSH.dtype)], axis=2)
        for cache_BKSH, new_BKTH in ((past[0], k_BKTH), (past[1], v_BKTH))
    )
    first_B1 = start_B[:, None] - S
    last_B = start_B - 1 + (T if lengths_B is None else lengths_B)
    kept_BS = _held(last_B, S) - first_B1
    seen = Seen(k_BKXH, v_BKXH, first_B1 + jnp.arange(S + T)[None])
    return seen, (_take(k_BKXH, kept_BS), _take(v_BKXH, kept_BS))


def _held(last_B: jax.Array, S: int) -> jax.Array:
    """Returns the position [B, S] in each slot of a ring whose latest is `last_B`; negative for an empty slot."""
    return last_B[:, None] - (last_B[:, None] - jnp.arange(S)[None]) % S


def _take(x_BKSH: jax.Array, slots_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BKSH, slots_BS[:, None, :, None], axis=2)


def _write(cache_BKSH: jax.Array, new_BKTH: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Returns the cache with each row's new entries in T slots from `slot_B` on."""

    def write_row(cache_KSH, new_KTH, slot):
        return jax.lax.dynamic_update_slice(cache_KSH, new_KTH, (0, slot, 0))

    return jax.vmap(write_row)(cache_BKSH, new_BKTH.astype(cache_BKSH.dtype), slot_B)
