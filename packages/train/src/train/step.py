"""One update, as a pure function: tokens and state in, state and numbers out. `loop` does the effects around it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from core.layers import wide_dtype
from core.losses import Batch, loss
from core.models import Model, Params
from train import guards, optimizer, precision
from train.config import TrainConfig

LOGITS = 2**26  # formed at a time where that is left to us: 268 MB in float32


class State(NamedTuple):
    """What an update changes. The iteration is not in it: it belongs to the loop, with the data and the schedule."""

    params: Params
    opt_state: optax.OptState
    ema: Params | None = None  # the average of the weights, with `ema_decay`
    norms: guards.Norms | None = None  # of the last gradients, with `skip_spikes`
    scale: precision.LossScale | None = None  # with dtype float16


def initial_state(params: Params, config: TrainConfig) -> State:
    return State(
        params,
        optimizer.steps(config).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
        norms=guards.no_norms() if config.skip_spikes else None,
        scale=precision.starting_at(config.loss_scale) if config.dtype == "float16" else None,
    )


def update(
    state: State,
    tokens_ABS: jax.Array,
    learning_rate: jax.Array,
    dropout_key: jax.Array | None,
    *,
    model: Model,
    config: TrainConfig,
    dtype: Any,
) -> tuple[State, dict[str, jax.Array]]:
    """Returns the next state, the mean loss over all sequences, and the gradient's norm before clipping.

    A gradient that is not finite, or with `skip_spikes` one far above the last, leaves weights and optimizer as they
    were; in float16 the loss scale then falls. "bad_leaf" is the number of the gradient's first leaf that is not
    finite, or -1; see `guards.names`.

    tokens_ABS holds A micro-batches of B sequences of S = block_size + 1 ids; A makes one update, whatever its size.
    """
    mean_loss, grads = gradients(
        state.params,
        tokens_ABS,
        dropout_key,
        model=model,
        dtype=dtype,
        chunk=loss_chunk(config, model),
        scale=None if state.scale is None else state.scale.scale,
    )
    bad_leaf = guards.first_bad(grads)
    grads, norm = optimizer.clip(grads, config.grad_clip)
    keep, norms = jnp.isfinite(norm), state.norms
    if norms is not None:
        keep &= ~guards.is_spike(norms, norm, config.skip_spikes)
        norms = guards.remembered(norms, norm)
    scale = state.scale
    if scale is not None:
        scale = precision.following(scale, precision.all_finite(grads), config.loss_scale_interval)
    updates, opt_state = optimizer.steps(config).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    params, opt_state = guards.selected(keep, (params, opt_state), (state.params, state.opt_state))
    ema = state.ema
    if ema is not None:
        rate = jnp.where(keep, 1 - config.ema_decay, 0.0)
        ema = jax.tree.map(lambda mean, p: mean + rate * (p - mean), ema, params)
    numbers = {"train_loss": mean_loss, "grad_norm": norm, "bad_leaf": bad_leaf, "kept": keep}
    if scale is not None:
        numbers["loss_scale"] = scale.scale
    return State(params, opt_state, ema, norms, scale), numbers


def loss_chunk(config: TrainConfig, model: Model) -> int | None:
    """Returns of how many positions a sequence the logits are formed at a time; None is all.

    With loss_chunk=0, as many as make LOGITS numbers, in pieces of a length.
    """
    T = config.block_size
    pieces = math.ceil(T * config.batch_size * model.config.axes["V"] / LOGITS)
    positions = config.loss_chunk or math.ceil(T / pieces)
    return positions if positions < T else None


def gradients(
    params: Params,
    tokens_ABS: jax.Array,
    key: jax.Array | None,
    *,
    model: Model,
    dtype: Any,
    chunk: int | None = None,
    scale: jax.Array | None = None,
) -> tuple[jax.Array, Params]:
    """Returns the loss and its gradient, each the mean over the A micro-batches, one in memory at a time.

    What is differentiated is the loss times `scale`, if that is given; what is returned is not scaled.
    """

    def of_micro_batch(index: jax.Array, tokens_BS: jax.Array) -> tuple[jax.Array, Params]:
        dropout_key = None if key is None else jax.random.fold_in(key, index)
        batch = next_tokens(tokens_BS)

        def scaled(params: Params) -> tuple[jax.Array, jax.Array]:
            found = loss(params, model, batch, dropout_key=dropout_key, dtype=dtype, chunk=chunk)
            return found if scale is None else found * scale, found

        grads, found = jax.grad(scaled, has_aux=True)(params)
        return found, grads

    A = tokens_ABS.shape[0]
    if A == 1:  # no loop, no second copy of the gradients
        mean, grads = of_micro_batch(jnp.int32(0), tokens_ABS[0])
        return mean, grads if scale is None else jax.tree.map(lambda g: g / scale, grads)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), wide_dtype(dtype)), params))
    total, _ = jax.lax.scan(
        lambda total, xs: (jax.tree.map(jnp.add, total, of_micro_batch(*xs)), None),
        zeros,
        (jnp.arange(A), tokens_ABS),
    )
    mean, grads = jax.tree.map(lambda x: x / A, total)
    return mean, grads if scale is None else jax.tree.map(lambda g: g / scale, grads)


def next_tokens(tokens_BS: jax.Array) -> Batch:
    """Splits windows of S ids into S - 1 inputs and the ids that follow them."""
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:])
