"""The language-modelling loss: mean cross-entropy of the next token, in nats, and what keeps experts in balance."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core import moe
from core.config import GptOssConfig
from core.layers import product, unembed, wide_dtype, widened
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
    counted_BT = targets_BT >= 0
    losses_BT = _losses(widened(logits_BTV), targets_BT)
    return jnp.where(counted_BT, losses_BT, 0).sum() / _count(targets_BT)


def _losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    chosen_BT1 = jnp.maximum(targets_BT, 0)[..., None]
    chosen_BT = jnp.take_along_axis(logits_BTV, chosen_BT1, axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def _count(targets_BT: jax.Array) -> jax.Array:
    return jnp.maximum((targets_BT >= 0).sum(dtype=jnp.float32), 1)


def unembedded_cross_entropy(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk: int | None = None
) -> jax.Array:
    """Returns `cross_entropy(unembed(x_BTD, head_VD), targets_BT)` with the logits of `chunk` positions at a time.

    None is all at once. With gradients, those of the logits are formed with the logits and multiplied at once, in the
    same pass: nothing of size V is kept but the head's gradient, and no product is done twice.
    """
    loss: Any = _unembedded(x_BTD, head_VD, targets_BT, chunk)
    return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unembedded(x_BTD, head_VD, targets_BT, chunk):
    T = x_BTD.shape[1]
    if chunk is None or chunk >= T:
        return cross_entropy(unembed(x_BTD, head_VD), targets_BT)

    def of_chunk(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x_BtD, targets_Bt = piece
        losses_Bt = _losses(unembed(x_BtD, head_VD), targets_Bt)
        return total + jnp.where(targets_Bt >= 0, losses_Bt, 0).sum(), None

    zero = jnp.zeros((), wide_dtype(x_BTD.dtype))
    total, _ = jax.lax.scan(of_chunk, zero, _cut(x_BTD, targets_BT, chunk))
    return total / _count(targets_BT)


def _cross_entropy_forward(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk: int | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Keeps the gradients of the sum, not of the mean: divided by all targets they would be lost in half precision."""
    B, T, D = x_BTD.shape
    narrow_VD = head_VD.astype(x_BTD.dtype)

    def of_chunk(
        carry: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, dhead_VD = carry
        x_BtD, targets_Bt = piece
        logits_BtV = unembed(x_BtD, narrow_VD)
        counted_Bt = targets_Bt >= 0
        total += jnp.where(counted_Bt, _losses(logits_BtV, targets_Bt), 0).sum()
        hit_BtV = jax.nn.one_hot(targets_Bt, head_VD.shape[0], dtype=logits_BtV.dtype)
        d_BtV = jnp.where(counted_Bt[..., None], jax.nn.softmax(logits_BtV) - hit_BtV, 0)
        d_RV = d_BtV.reshape(-1, head_VD.shape[0]).astype(x_BTD.dtype)
        dhead_VD += product(d_RV.T, x_BtD.reshape(-1, D), axis=0)
        return (total, dhead_VD), product(d_RV, narrow_VD, axis=0).reshape(x_BtD.shape)

    dtype = wide_dtype(x_BTD.dtype)
    carry = jnp.zeros((), dtype), jnp.zeros(head_VD.shape, dtype)
    if chunk is None or chunk >= T:
        (total, dhead_VD), dx_BTD = of_chunk(carry, (x_BTD, targets_BT))
    else:
        (total, dhead_VD), dx_CBtD = jax.lax.scan(of_chunk, carry, _cut(x_BTD, targets_BT, chunk))
        dx_BTD = jnp.moveaxis(dx_CBtD, 0, 1).reshape(B, -1, D)[:, :T]
    count = _count(targets_BT)
    like = jnp.zeros((0,), x_BTD.dtype), jnp.zeros((0,), head_VD.dtype)
    return total / count, (dx_BTD, dhead_VD, count, *like)


def _cross_entropy_backward(
    chunk: int | None, saved: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    dx_BTD, dhead_VD, count, like_x, like_head = saved
    factor = cotangent / count
    return (dx_BTD * factor).astype(like_x.dtype), (dhead_VD * factor).astype(like_head.dtype), None


_unembedded.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _cut(x_BTD: jax.Array, targets_BT: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns T in pieces of `chunk`, the pieces first; the last one is padded with what does not count.

    T and not rows, so that a batch that is cut over devices stays so.
    """
    B, T, D = x_BTD.shape
    count = -(-T // chunk)
    rest = count * chunk - T
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, rest), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, rest)), constant_values=-1)
    x_CBtD = jnp.moveaxis(x_BTD.reshape(B, count, chunk, D), 1, 0)
    return x_CBtD, jnp.moveaxis(targets_BT.reshape(B, count, chunk), 1, 0)


def loss(
    params: Params,
    model: Model,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    auxiliary: bool = True,
    chunk: int | None = None,
) -> jax.Array:
    """Returns the mean cross-entropy of `batch` in nats; differentiable in `params`.

    With `auxiliary`, a mixture of experts adds its load balance times the configuration's `router_aux_loss_coef`: what
    training goes down. Without, models of all families can be compared. `chunk`: see `unembedded_cross_entropy`.

    >>> loss_and_grads = jax.value_and_grad(loss)
    """
    found = terms(params, model, batch, dropout_key=dropout_key, dtype=dtype, chunk=chunk)
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
    chunk: int | None = None,
) -> Terms:
    """Returns the parts of `loss`, to report them apart.

    All inputs count in the load balance, also where no target does; see `core.moe.load_balance`.
    """
    x_BTD, routers = model.hidden_and_route(
        params, batch.inputs_BT, dropout_key=dropout_key, dtype=dtype
    )
    entropy: Any = unembedded_cross_entropy(x_BTD, model.head(params), batch.targets_BT, chunk)
    if not routers or not isinstance(model.config, GptOssConfig):
        return Terms(entropy, None)
    return Terms(entropy, moe.load_balance(routers, model.config.num_experts_per_tok))
