"""Products of a few rows and a weight matrix."""

import jax
import jax.numpy as jnp

from core.native.library import call


def product(x_RI: jax.Array, matrix: jax.Array, *, axis: int) -> jax.Array:
    """Returns `x_RI` times `matrix`, contracted along its `axis`, in float32.

    Each may be float32 or bfloat16. A row's bits depend on nothing but that row and the matrix.
    """
    result = jax.ShapeDtypeStruct((len(x_RI), matrix.shape[1 - axis]), jnp.float32)
    return call("product", result, x_RI.astype(jnp.float32), matrix, axis=axis)
