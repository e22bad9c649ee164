"""Which updates are left out, and which leaf is to blame.

An update whose gradient is not finite never reaches the weights, so that what stops the run can be looked for in them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128  # llm.c's (llmc/outlier_detector.h): shorter ones take the noise for spikes


class Norms(NamedTuple):
    """The last gradient norms, in a ring, and how many there have been."""

    norms_W: jax.Array
    seen: jax.Array


def no_norms() -> Norms:
    return Norms(jnp.zeros(WINDOW), jnp.int32(0))


def remembered(norms: Norms, norm: jax.Array) -> Norms:
    """Returns `norms` with another; one that is not finite would spoil the mean for good, and is left out."""
    place = jnp.where(jnp.isfinite(norm), norms.seen % WINDOW, WINDOW)
    return Norms(norms.norms_W.at[place].set(norm, mode="drop"), norms.seen + jnp.isfinite(norm))


def is_spike(norms: Norms, norm: jax.Array, limit: float) -> jax.Array:
    """Tells whether `norm` is more than `limit` standard deviations above the window's mean, once that is full."""
    above = norm - norms.norms_W.mean()
    return (norms.seen >= WINDOW) & (above > limit * norms.norms_W.std())


def first_bad(grads: Any) -> jax.Array:
    """Returns the number of the first leaf that is not finite, in the order of `names`; -1 if all are.

    The sums are those that the global norm is made of, so the compiler has them anyway.
    """
    sums = jnp.stack([jnp.sum((g.conj() * g).real) for g in jax.tree.leaves(grads)])
    bad = ~jnp.isfinite(sums)
    return jnp.where(bad.any(), jnp.argmax(bad), -1)


def names(tree: Any) -> list[str]:
    """Returns the leaves' names as the model folder has them."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def selected(keep: jax.Array, new: Any, old: Any) -> Any:
    """Returns `new` where `keep` holds, else `old`: two trees of the same shapes."""
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
