"""Rotary positions (Su et al. 2021, arXiv:2104.09864), stretched by YaRN (Peng et al. 2023, arXiv:2309.00071)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from core.config import GptOssConfig


def frequencies(config: GptOssConfig) -> tuple[np.ndarray, float]:
    """Returns the angles a position turns each pair of a head by, [H / 2] in radians, and what cos and sin are times.

    YaRN (section 3.2): pairs that turn more than beta_fast times within the original context keep their frequency,
    those that turn less than beta_slow times have it divided by the factor, and those between are blended linearly.
    With `rope_truncate` the ramp's ends are rounded outwards to whole pairs; GPT-OSS does not. The attention's
    temperature (section 3.3) is the second result.
    """
    H, base = config.head_dim, config.rope_theta

    def pair(turns: float) -> float:
        """The pair, not a whole number, that turns so many times within the original context."""
        wavelength = config.initial_context_length / (turns * 2 * math.pi)
        return H * math.log(wavelength) / (2 * math.log(base))

    low, high = pair(config.rope_beta_fast), pair(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    extrapolated = base ** -(np.arange(0, H, 2) / H)
    ramp = np.clip((np.arange(H // 2) - low) / max(high - low, 0.001), 0, 1)
    blended = extrapolated * (1 - ramp) + extrapolated / config.rope_factor * ramp
    concentration = 0.1 * math.log(config.rope_factor) + 1 if config.rope_factor > 1 else 1.0
    return blended, concentration


def tables(config: GptOssConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of every position's angles, [B, T, H / 2] in float32."""
    angles, concentration = frequencies(config)
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * angles.astype(np.float32)[None, None]
    return jnp.cos(angles_BTh) * concentration, jnp.sin(angles_BTh) * concentration


def rotate(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Returns `x` with pair (i, i + H / 2) of every head turned by the position's angle i."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
