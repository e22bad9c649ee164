"""The gradients that are written out, against those that jax derives, and the loss of a few positions at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import layers, losses


def draws(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape) * scale)


def close(found: Any, expected: Any, share: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=share * float(np.abs(b).max()))


@pytest.mark.parametrize("approximate", [False, True])
def test_the_gradient_of_gelu_is_jax_s_from_end_to_end(approximate: bool):
    x = jnp.linspace(-12, 12, 4001)
    ours = layers.gelu_tanh if approximate else layers.gelu_erf
    theirs = lambda x: jax.nn.gelu(x, approximate=approximate)  # noqa: E731
    found, expected = (jax.jit(jax.vmap(jax.value_and_grad(f)))(x) for f in (ours, theirs))
    close(found, expected, 5e-6 if approximate else 3e-7)  # 1 - tanh ** 2 cancels
    np.testing.assert_array_equal(ours(x), theirs(x))  # without gradients the bits are jax's
    half = x.astype(jnp.bfloat16)
    assert jax.grad(lambda x: ours(x).sum())(half).dtype == jnp.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_of_layer_norm_is_the_derivative(bias: bool):
    x, scale, weights = draws(3, 5, 24) * 4 + 9, 1 + draws(24, seed=1), draws(3, 5, 24, seed=2)
    shift = draws(24, seed=3) if bias else None

    def plain(x: jax.Array, scale: jax.Array, shift: jax.Array | None) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        y = y * scale[None, None]
        return ((y if shift is None else y + shift[None, None]) * weights).sum()

    def ours(x: jax.Array, scale: jax.Array, shift: jax.Array | None) -> jax.Array:
        return (layers.layer_norm(x, scale, shift, 1e-5) * weights).sum()

    given = (x, scale, shift)
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*given) for f in (ours, plain))
    close(found, expected, 2e-6)


B, T, D, V = 3, 10, 8, 37


@pytest.mark.parametrize("chunk", [None, 1, 4, 10])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_of_a_few_positions_at_a_time_is_that_of_all(chunk: int | None, dtype: Any):
    x, head = draws(B, T, D).astype(dtype), draws(V, D, seed=1)
    drawn = np.random.default_rng(2).integers(0, V, (B, T))
    drawn[1, 7:] = -1
    targets = jnp.asarray(drawn)

    def ours(x: jax.Array, head: jax.Array) -> jax.Array:
        return 3 * losses.unembedded_cross_entropy(x, head, targets, chunk)

    def plain(x: jax.Array, head: jax.Array) -> jax.Array:
        logits = jnp.einsum(
            "BTD,VD->BTV", x.astype(jnp.float32), head.astype(dtype).astype(jnp.float32)
        )
        return 3 * losses.cross_entropy(logits, targets)

    share = 1e-6 if dtype == jnp.float32 else 1e-2
    expected, found = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, head) for f in (plain, ours))
    close(found, expected, share)
    close(jax.jit(ours)(x, head), expected[0], 1e-6)


def test_no_more_logits_than_a_chunk_s_are_ever_formed():
    """As compiled: the temporaries of 64 positions at a time, of 1,024, take under a seventh of those of all."""
    x, head = jnp.zeros((4, 1024, 16)), jnp.zeros((2048, 16))
    targets = jnp.zeros((4, 1024), jnp.int32)

    def temporaries(chunk: int | None) -> int:
        grads = jax.grad(
            lambda x, head: losses.unembedded_cross_entropy(x, head, targets, chunk), (0, 1)
        )
        sizes: Any = jax.jit(grads).lower(x, head).compile().memory_analysis()
        return sizes.temp_size_in_bytes

    whole, few = temporaries(None), temporaries(64)
    assert whole > 4 * 1024 * 2048 * 4
    assert few < whole / 7


def test_the_loss_without_any_target_is_zero_and_so_is_its_gradient():
    x, head, targets = draws(B, T, D), draws(V, D, seed=1), np.full((B, T), -1)
    found = jax.value_and_grad(losses.unembedded_cross_entropy, (0, 1))(x, head, targets, 4)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_bias_s_gradient_is_summed_in_float32(dtype: Any):
    """Over 700 rows; rounded to bfloat16 it would have 8 bits."""
    x, kernel = draws(700, 3).astype(dtype), draws(3, 4, 2, seed=1)
    bias, weights = draws(4, 2, seed=2), draws(700, 4, 2, seed=3).astype(dtype)

    def weighted(bias: jax.Array) -> jax.Array:
        return (layers.linear(x, kernel, bias) * weights).astype(jnp.float32).sum()

    found = jax.jit(jax.grad(weighted))(bias)
    expected = np.asarray(weights, np.float64).sum(0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_an_activation_in_bfloat16_is_the_one_in_float32_rounded_once(name: str):
    half = jnp.linspace(-12, 12, 4001).astype(jnp.bfloat16)
    function = layers.ACTIVATIONS[name]
    exact = function(half.astype(jnp.float32)).astype(jnp.bfloat16)
    assert exact.dtype == function(half).dtype
    np.testing.assert_array_equal(function(half), exact)
