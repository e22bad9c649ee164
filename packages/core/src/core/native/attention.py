"""Attention over a cache: of a few queries a row, and of a chunk of a prompt."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.native.library import call


def attends(*dtypes: jnp.dtype) -> bool:
    """Whether queries and caches of these types are taken."""
    return all(dtype in (jnp.float32, jnp.bfloat16, jnp.uint16) for dtype in dtypes)


def attend_cache(
    q_BTNH: jax.Array,
    k_RKSH: jax.Array,
    v_RKSH: jax.Array,
    first_row: jax.Array | None = None,
    *,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Returns out_BTNH: what each query makes of the values at positions up to its own, which must be in the cache.

    Only what is seen is read. A query's bits depend on that query, its position and what it sees alone, whatever T, the
    other rows and the threads are.

    Args:
      q_BTNH: queries, float32 or bfloat16.
      k_RKSH: keys, float32, bfloat16, or the bits of such as uint16; the key of position p lies in slot p % S.
      v_RKSH: values, of the same type.
      first_row: the cache's row that the first row of queries belongs to; None is 0.
      starts_B: the position of each row's first query; they run on by one along T.
      lengths_B: how many of a row's queries are computed; the others cost nothing and are zero.
      scale: what the scores are multiplied by.
      window: how many keys a query sees, its own included, at most S less T - 1, or any number if S slots have every
        position so far; None is all.
      sinks_N: a score a head that takes its share of the softmax and gives nothing.
    """
    return _attend(
        "attend_cache",
        q_BTNH,
        k_RKSH,
        v_RKSH,
        first_row,
        starts_B,
        lengths_B,
        sinks_N,
        scale=np.float32(scale),
        window=np.int64(window or 0),
    )


def attend_prompt(
    q_BTNH: jax.Array,
    k_RKSH: jax.Array,
    v_RKSH: jax.Array,
    first_row: jax.Array | None = None,
    *,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    scale: float,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Returns out_BTNH: `attend_cache` for many queries a row, without a window.

    Keys are turned once for all that meet them. Sums have another order than those of `attend_cache`; a query's bits
    depend on that query, its position and what was written to its row alone, as long as all of that is numbers.
    """
    return _attend(
        "attend_prompt",
        q_BTNH,
        k_RKSH,
        v_RKSH,
        first_row,
        starts_B,
        lengths_B,
        sinks_N,
        scale=np.float32(scale),
    )


def _attend(
    kernel: str,
    q_BTNH: jax.Array,
    k_RKSH: jax.Array,
    v_RKSH: jax.Array,
    first_row: jax.Array | None,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array | None,
    **attributes: Any,
) -> jax.Array:
    first_row = jnp.zeros((), jnp.int32) if first_row is None else first_row
    return call(
        kernel,
        jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        q_BTNH,
        k_RKSH,
        v_RKSH,
        starts_B.astype(jnp.int32),
        lengths_B.astype(jnp.int32),
        first_row.astype(jnp.int32).reshape(1),
        jnp.zeros(0, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32),
        **attributes,
    )
