"""Products of some rows and a weight matrix, in float32. A row's bits depend on that row and on the matrix alone.

Each product of two numbers is exact but for one rounding, if any, and each of the I additions rounds once (`product.cc`
says in which order): an output is off by at most about I * 2**-24 times the sum of its products' magnitudes, and in
practice by the square root of that many roundings. As everywhere in XLA on a CPU, subnormal numbers count as zero.
"""

import jax
import jax.numpy as jnp

from core.native.library import call, is_serving

ROWS = 128  # a whole chunk of a prompt

_FLOATS = (jnp.float32, jnp.bfloat16)
_LONGEST = 2**16  # products of int8 whose sum int32 is sure to hold


def serves(x_RI: jax.Array, matrix: jax.Array) -> bool:
    """Whether a product is to be computed here: `core.layers` asks, while it is traced."""
    known = x_RI.dtype in _FLOATS and (matrix.dtype in _FLOATS or matrix.dtype == jnp.int8)
    return known and len(x_RI) <= ROWS and is_serving()


def product(x_RI: jax.Array, matrix: jax.Array, *, axis: int) -> jax.Array:
    """Returns `x_RI`, float32 or bfloat16, times `matrix`, contracted along its `axis`, in float32.

    The matrix is float32, bfloat16 or, with axis 1, int8; it is read as it lies, and what is narrower is widened.
    """
    result = jax.ShapeDtypeStruct((len(x_RI), matrix.shape[1 - axis]), jnp.float32)
    return call("product", result, x_RI, matrix, axis=axis)


def rounded_product(x_RI: jax.Array, values_OI: jax.Array, scales_O: jax.Array) -> jax.Array:
    """Returns `x_RI` times `values_OI * scales_O`, int8 by float32, after rounding each row of x to int8.

    The unit is a 127th of the row's largest magnitude (`core.quant.round_rows`). The sums are exact, so an output is
    off by at most half a unit times the sum of its weights' magnitudes. A row with a NaN or an infinity gives NaN.
    """
    if x_RI.shape[1] > _LONGEST:
        return product(x_RI, values_OI, axis=1) * scales_O[None]
    result = jax.ShapeDtypeStruct((len(x_RI), len(values_OI)), jnp.float32)
    return call("rounded_product", result, x_RI.astype(jnp.float32), values_OI, scales_O)
