"""Splash attention, its kernel run as plain operations, against our own; cuDNN's takes a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import flash
from core.attention import attend

B, T, N, K, H = 1, 130, 2, 1, 128


def draws(seed: int, *shape: int) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("window", [None, 37])
def test_splash_gives_our_attention(window: int | None):
    q, k, v = draws(0, B, T, N, H), draws(1, B, T, K, H), draws(2, B, T, K, H)
    found = flash.attend(q, k, v, "splash", scale=H**-0.5, window=window, interpret=True)
    expected = attend(
        q,
        jnp.swapaxes(k, 1, 2),
        jnp.swapaxes(v, 1, 2),
        positions_BT=jnp.arange(T)[None],
        scale=H**-0.5,
        window=window,
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
