"""The language-modelling loss: mean cross-entropy of the next token, in nats, and what keeps experts in balance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core import moe
from core.config import GptOssConfig
from core.models import Model, Params


class Batch(NamedTuple):
    """Token ids and, at each position, the id that comes next; a negative target counts for nothing.

    (nanoGPT writes -1 for that, Hugging Face -100.)
    """

    inputs_BT: jax.Array
    targets_BT: jax.Array


class Terms(NamedTuple):
    """What a loss is the sum of: `cross_entropy` and, in a mixture of experts, a multiple of `load_balance`."""

    cross_entropy: jax.Array
    load_balance: jax.Array | None


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
    auxiliary: bool = True,
) -> jax.Array:
    """Returns the mean cross-entropy of `batch` in nats; differentiable in `params`.

    With `auxiliary`, a mixture of experts adds its load balance times the configuration's `router_aux_loss_coef`: what
    training goes down. Without, models of all families can be compared.

    >>> loss_and_grads = jax.value_and_grad(loss)
    """
    found = terms(params, model, batch, dropout_key=dropout_key, dtype=dtype)
    if not auxiliary or found.load_balance is None or not isinstance(model.config, GptOssConfig):
        return found.cross_entropy
    return found.cross_entropy + model.config.router_aux_loss_coef * found.load_balance


def terms(
    params: Params,
    model: Model,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> Terms:
    """Returns the parts of `loss`, to report them apart.

    All inputs count in the load balance, also where no target does; see `core.moe.load_balance`.
    """
    logits_BTV, routers = model.apply_and_route(
        params, batch.inputs_BT, dropout_key=dropout_key, dtype=dtype
    )
    entropy = cross_entropy(logits_BTV, batch.targets_BT)
    if not routers or not isinstance(model.config, GptOssConfig):
        return Terms(entropy, None)
    return Terms(entropy, moe.load_balance(routers, model.config.num_experts_per_tok))
