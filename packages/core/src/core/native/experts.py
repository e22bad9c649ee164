"""Experts for rows that have chosen theirs, packed kernels as they are stored."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from core.native.library import call
from core.quant import MXFP4

_WHOLE = 128  # a row of the scratch has whole vectors of words, which hold so many numbers at most


def mixes(dtype: jnp.dtype, *kernels: jax.Array | MXFP4) -> bool:
    """Whether `mix_experts` computes, for rows of that type, what these kernels say: no wider one is rounded."""
    dense = [kernel.dtype for kernel in kernels if not isinstance(kernel, MXFP4)]
    floats = (jnp.float32, jnp.bfloat16)
    return dtype in floats and all(d in floats and d.itemsize <= dtype.itemsize for d in dense)


def mix_experts(
    x_RD: jax.Array,
    weights_RC: jax.Array,
    chosen_RC: jax.Array,
    gate_up_EDF2: jax.Array | MXFP4,
    gate_up_bias_EF2: jax.Array,
    down_EFD: jax.Array | MXFP4,
    down_bias_ED: jax.Array,
    *,
    alpha: float,
    limit: float,
) -> jax.Array:
    """Returns each row's weighted sum of what its experts make of it, in float32: `core.moe.mix` on one CPU.

    A chosen number that is no expert's gives nothing and costs nothing. Rows of one expert share one reading of its
    kernels. A row's bits depend on that row, its weights and the kernels alone.
    """
    (R, D), C = x_RD.shape, chosen_RC.shape[1]
    E, F = gate_up_bias_EF2.shape[:2]
    numbers = R * _whole(D) + R * C * (_whole(F) + D)
    y_RD, _ = call(
        "mix_experts",
        (
            jax.ShapeDtypeStruct((R, D), jnp.float32),
            jax.ShapeDtypeStruct((numbers,), jnp.float32),
        ),
        x_RD,
        weights_RC.astype(jnp.float32),
        chosen_RC.astype(jnp.int32),
        *_parts(gate_up_EDF2),
        gate_up_bias_EF2.reshape(E, -1),
        *_parts(down_EFD),
        down_bias_ED,
        alpha=np.float32(alpha),
        limit=np.float32(limit),
    )
    return y_RD


def _parts(kernel: jax.Array | MXFP4) -> tuple[jax.Array, jax.Array]:
    """Returns the numbers and the scales; a dense kernel has none of these."""
    if isinstance(kernel, MXFP4):
        return kernel.blocks_EOQY, kernel.scales_EOQ
    return kernel, jnp.zeros(0, jnp.uint8)


def _whole(length: int) -> int:
    return math.ceil(length / _WHOLE) * _WHOLE
