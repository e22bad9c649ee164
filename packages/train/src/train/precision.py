"""Dynamic loss scaling for float16, as torch.amp.GradScaler does it (Micikevicius et al. 2018, arXiv:1710.03740).

Gradients below 6e-8 are zero in float16, so the loss is multiplied by a scale and the gradients divided by it. The
scale is halved with every gradient that overflows, whose update is left out, and doubled after so many that did not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

GROWTH, BACKOFF = 2.0, 0.5


class LossScale(NamedTuple):
    """The scale, and how many gradients in a row were finite under it."""

    scale: jax.Array
    good_steps: jax.Array


def starting_at(scale: float) -> LossScale:
    return LossScale(jnp.float32(scale), jnp.int32(0))


def following(state: LossScale, finite: jax.Array, interval: int) -> LossScale:
    """Returns the scale after a gradient; it grows with the `interval`-th finite one in a row, but not to infinity."""
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grows = good_steps == interval
    grown = state.scale * GROWTH
    grown = jnp.where(jnp.isfinite(grown), grown, state.scale)
    scale = jnp.where(finite, jnp.where(grows, grown, state.scale), state.scale * BACKOFF)
    return LossScale(scale, jnp.where(grows, 0, good_steps))


def all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
