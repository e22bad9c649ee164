from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import core
import reference
import tiny

value_and_grad = jax.jit(jax.value_and_grad(core.loss), static_argnums=1)


def a_batch(config, *shape: int) -> core.Batch:
    """Random targets, some of them to be ignored."""
    inputs_BT, targets_BT = tiny.tokens(config, 2, *shape)
    return core.Batch(inputs_BT, targets_BT.at[0, 1].set(-1).at[-1, 3:].set(-1))


def test_loss_is_the_numpy_reference_s_with_ignored_targets_left_out(model, params):
    batch = a_batch(model.config, 3, 11)
    found, _ = value_and_grad(params, model, batch)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference.loss(model.config, params, *batch), rtol=1e-6)


def test_loss_without_any_target_is_zero_and_has_no_gradient(model, params):
    inputs_BT = tiny.tokens(model.config, 3, 11)
    batch = core.Batch(inputs_BT, jnp.full_like(inputs_BT, -1))
    value, grads = value_and_grad(params, model, batch)
    assert value == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_cross_entropy_survives_logits_as_large_as_float32_allows():
    logits_BTV = jnp.array([[[3e38, 0.0, -3e38], [-3e38, 0.0, 1.0]]])
    found = core.cross_entropy(logits_BTV, jnp.array([[0, 2]]))
    np.testing.assert_allclose(found, np.log1p(np.exp(-1)) / 2, rtol=1e-6)


def test_gradients_are_the_finite_differences_of_the_numpy_reference(model, params):
    """Along one random direction a tensor; the float64 differences themselves are good to 1e-8."""
    batch = a_batch(model.config, 3, 11)
    _, grads = value_and_grad(params, model, batch)
    flat_grads: dict[str, Any] = traverse_util.flatten_dict(grads, sep=".")
    flat: dict[str, Any] = traverse_util.flatten_dict(reference.float64(params), sep=".")
    rng, step = np.random.default_rng(0), 1e-5
    for name, x in flat.items():
        direction = rng.standard_normal(x.shape)

        def loss_at(distance, name=name, x=x, direction=direction):
            moved = traverse_util.unflatten_dict(flat | {name: x + distance * direction}, sep=".")
            return reference.loss(model.config, moved, *batch)

        slope = (loss_at(step) - loss_at(-step)) / (2 * step)
        found = np.vdot(np.asarray(flat_grads[name], np.float64), direction)
        np.testing.assert_allclose(found, slope, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("ignored", [-1, -100])
def test_every_negative_target_counts_for_nothing(ignored):
    logits_BTV = jnp.array([[[2.0, 0.0, -1.0], [0.5, 0.1, 3.0]]])
    alone = core.cross_entropy(logits_BTV[:, :1], jnp.array([[1]]))
    assert core.cross_entropy(logits_BTV, jnp.array([[1, ignored]])) == alone


def test_a_target_outside_the_vocabulary_is_nan():
    assert jnp.isnan(core.cross_entropy(jnp.zeros((1, 1, 3)), jnp.array([[3]])))
