"""The language-modelling loss: mean cross-entropy of the next token, in nats."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core.models import Model, Params


class Batch(NamedTuple):
    """Token ids and, at each position, the id that comes next; a negative target counts for nothing.

    (nanoGPT writes -1 for that, Hugging Face -100.)
    """

    inputs_BT: jax.Array
    targets_BT: jax.Array


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns the mean over all targets that are not negative, a float32 scalar; zero if there are none.

    A target outside the vocabulary makes it NaN.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    counted_BT = targets_BT >= 0
    chosen_BT1 = jnp.where(counted_BT, targets_BT, 0)[..., None]
    chosen_BT = jnp.take_along_axis(logits_BTV, chosen_BT1, axis=-1)[..., 0]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT
    return jnp.where(counted_BT, losses_BT, 0).sum() / jnp.maximum(
        counted_BT.sum(dtype=jnp.float32), 1
    )


def loss(
    params: Params,
    model: Model,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Returns the mean cross-entropy of `batch` in nats; differentiable in `params`.

    >>> loss_and_grads = jax.value_and_grad(loss)
    """
    logits_BTV = model.apply(params, batch.inputs_BT, dropout_key=dropout_key, dtype=dtype)
    return cross_entropy(logits_BTV, batch.targets_BT)
