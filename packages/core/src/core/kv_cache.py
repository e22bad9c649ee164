"""The keys and values of the tokens seen so far: a pytree that goes into a model and comes out of it.

Layout [R, K, S, H] a layer, unstacked, R rows: a decode step reads one head's keys as one contiguous block, which on a
CPU is 1.6 times as fast at 32 rows as [R, S, K, H] (docs/log.md).

Numbers of bfloat16 are kept as their bits, uint16: scattered as bfloat16, on a CPU the whole cache would go through
float32 with each token.

A layer that sees all has a slot for every position. One that sees the last `window` has a ring of that many (or a few
more): slot s holds the latest position p with p % S == s, so that which it is follows from how far the row has come,
and nothing but keys and values is stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.config import Config

FEW = 16
"""So many new tokens a row are written one by one; more, as one block that must fit."""


class Layer(NamedTuple):
    """One layer's keys and values as they are kept (`numbers`).

    `first_row` is which row the first of the tokens belongs to; None is the first.
    """

    k_RKSH: jax.Array
    v_RKSH: jax.Array
    first_row: jax.Array | None = None


class KVCache(NamedTuple):
    """One entry a layer; slot s along S holds the token at position s, in a ring the latest at s, S + s, 2 S + s ..."""

    k_RKSH: tuple[jax.Array, ...]
    v_RKSH: tuple[jax.Array, ...]
    first_row: jax.Array | None = None
    """A model is fed the rows from this one on; None feeds all."""

    @classmethod
    def zeros(
        cls, config: Config, rows: int, length: int, dtype=jnp.float32, *, ahead: int = 0
    ) -> "KVCache":
        """Returns an empty cache for the positions below `length` of each of `rows` rows.

        It takes 2 * rows * key heads * head size * slots numbers a layer: `length` slots, or the window and `ahead` if
        that is fewer. With `ahead`, so many tokens after a row's last can be fed and taken back.
        """
        sizes = config.axes
        heads = sizes.get("K", sizes["N"])  # without grouped queries every head has its own keys
        slots = [length if w is None else min(length, w + ahead) for w in config.windows]
        shapes = [(rows, heads, S, sizes["H"]) for S in slots]
        kept = jnp.uint16 if dtype == jnp.bfloat16 else dtype
        ks, vs = (tuple(jnp.zeros(shape, kept) for shape in shapes) for _ in range(2))
        return cls(ks, vs)

    def layer(self, index: int) -> Layer:
        """Returns what one layer is fed with."""
        return Layer(self.k_RKSH[index], self.v_RKSH[index], self.first_row)

    @classmethod
    def of(cls, layers: list[Layer]) -> "KVCache":
        """Returns the cache of `layers`."""
        ks, vs = zip(*((layer.k_RKSH, layer.v_RKSH) for layer in layers), strict=True)
        return cls(ks, vs, layers[0].first_row)


def numbers(kept: jax.Array) -> jax.Array:
    """Returns the keys or values of what is kept of them."""
    return jax.lax.bitcast_convert_type(kept, jnp.bfloat16) if kept.dtype == jnp.uint16 else kept


def _kept(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns keys or values, which may be so already, as a cache like that one keeps them."""
    if like.dtype != jnp.uint16 or x.dtype == jnp.uint16:
        return x.astype(like.dtype)
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def append(
    past: Layer, k_BKTH: jax.Array, v_BKTH: jax.Array, positions_BT: jax.Array, lengths_B: jax.Array
) -> Layer:
    """Returns the layer with the first `lengths_B` of each row's T new entries in the slots of their positions.

    More than `FEW` go in as they are, padding too: it must fit, and be overwritten before anyone comes far enough to
    see it.
    """
    T, S = k_BKTH.shape[2], past.k_RKSH.shape[2]
    if T > FEW:
        return Layer(
            _write(past.k_RKSH, k_BKTH, positions_BT[:, 0], past.first_row),
            _write(past.v_RKSH, v_BKTH, positions_BT[:, 0], past.first_row),
            past.first_row,
        )
    rows_B1 = (0 if past.first_row is None else past.first_row) + jnp.arange(len(k_BKTH))[:, None]
    is_token_BT = jnp.arange(T)[None] < lengths_B[:, None]
    slots_BT = jnp.where(is_token_BT, positions_BT % S, S)  # beyond the end: dropped

    def put(cache_RKSH: jax.Array, new_BKTH: jax.Array) -> jax.Array:
        new_BTKH = _kept(jnp.swapaxes(new_BKTH, 1, 2), cache_RKSH)
        return cache_RKSH.at[rows_B1, :, slots_BT].set(new_BTKH, mode="drop")

    return Layer(put(past.k_RKSH, k_BKTH), put(past.v_RKSH, v_BKTH), past.first_row)


class Laid(NamedTuple):
    """A ring's keys and values and the new ones after them, in order of position, negative for an empty slot."""

    k_BKXH: jax.Array
    v_BKXH: jax.Array
    positions_BX: jax.Array


def lay_out(
    past: Layer, k_BKTH: jax.Array, v_BKTH: jax.Array, positions_BT: jax.Array, lengths_B: jax.Array
) -> tuple[Laid, Layer]:
    """Returns a ring and what comes after it side by side, and the ring with the new entries in it.

    A prompt's first queries see what its last keys evict. Padding evicts nothing.
    """
    start_B, (B, _, T, _) = positions_BT[:, 0], k_BKTH.shape
    S = past.k_RKSH.shape[2]
    order_BS = (start_B[:, None] + jnp.arange(S)[None]) % S
    k_BKXH, v_BKXH = (
        jnp.concatenate([_take(rows_of(ring_RKSH, past.first_row, B), order_BS), new], axis=2)
        for ring_RKSH, new in (
            (past.k_RKSH, _kept(k_BKTH, past.k_RKSH)),
            (past.v_RKSH, _kept(v_BKTH, past.v_RKSH)),
        )
    )
    first_B1 = start_B[:, None] - S
    kept_BS = held(start_B - 1 + lengths_B, S) - first_B1
    positions_BX = first_B1 + jnp.arange(S + T)[None]
    is_own_BX = (positions_BX >= 0) & (positions_BX < (start_B + lengths_B)[:, None])
    laid = Laid(numbers(k_BKXH), numbers(only(v_BKXH, is_own_BX)), positions_BX)
    zeros_B = jnp.zeros_like(start_B)
    return laid, Layer(
        _write(past.k_RKSH, _take(k_BKXH, kept_BS), zeros_B, past.first_row),
        _write(past.v_RKSH, _take(v_BKXH, kept_BS), zeros_B, past.first_row),
        past.first_row,
    )


def held(last_B: jax.Array, S: int) -> jax.Array:
    """Returns the position [B, S] in each slot of a ring whose latest is `last_B`; negative for an empty slot."""
    return last_B[:, None] - (last_B[:, None] - jnp.arange(S)[None]) % S


def only(v_BKSH: jax.Array, is_own_BS: jax.Array) -> jax.Array:
    """Returns the values with zeros where a slot holds none of the row's: no weight makes a number of what is none."""
    return jnp.where(is_own_BS[:, None, :, None], v_BKSH, jnp.zeros((), v_BKSH.dtype))


def rows_of(cache_RKSH: jax.Array, first_row: jax.Array | None, B: int) -> jax.Array:
    """Returns the B rows that tokens belong to."""
    if first_row is None:
        return cache_RKSH
    return jax.lax.dynamic_slice_in_dim(cache_RKSH, first_row, B, axis=0)


def _take(x_BKSH: jax.Array, slots_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BKSH, slots_BS[:, None, :, None], axis=2)


def _write(
    cache_RKSH: jax.Array, new_BKTH: jax.Array, slot_B: jax.Array, first_row: jax.Array | None
) -> jax.Array:
    """Returns the cache with each row's new entries in T slots from `slot_B` on."""
    new_BKTH = _kept(new_BKTH, cache_RKSH)
    if first_row is not None:
        for b in range(len(new_BKTH)):
            place = (first_row + b, 0, slot_B[b], 0)
            cache_RKSH = jax.lax.dynamic_update_slice(cache_RKSH, new_BKTH[b : b + 1], place)
        return cache_RKSH

    def write_row(cache_KSH, new_KTH, slot):
        return jax.lax.dynamic_update_slice(cache_KSH, new_KTH, (0, slot, 0))

    return jax.vmap(write_row)(cache_RKSH, new_BKTH, slot_B)
