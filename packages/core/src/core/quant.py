"""Weights stored in fewer bits, decoded where they are used.

MXFP4 (OCP Microscaling Formats 1.0, 2023): 32 consecutive numbers of the contracted axis share a scale, a power of two;
each is four bits (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two to a byte, the first in the low half.

Int8: whole numbers from -127 to 127 and one float32 scale for each output channel, which is a 127th of the channel's
largest weight (`core.int8`).

Model folders hold MXFP4 and Int8; `core.precision` makes the other forms, which are multiplied faster.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class MXFP4(NamedTuple):
    """A kernel of expert after expert: axis Q counts blocks of 32 along the contracted axis, Y the 16 bytes of one.

    `scales` are exponents with a bias of 127; 255 is no number, and conversion refuses it.
    """

    blocks_EOQY: jax.Array  # uint8; O stands for one or several output axes
    scales_EOQ: jax.Array  # uint8

    def expert(self, index: jax.Array | int) -> "MXFP4":
        """Returns one expert's kernel, still packed."""
        return MXFP4(self.blocks_EOQY[index], self.scales_EOQ[index])

    def decode(self, dtype=jnp.bfloat16) -> jax.Array:
        """Returns the kernel with its output axes first, [..., O, 32 Q].

        Exact in bfloat16 and wider: two bits of significand and a power of two. (What is below 2**-126 in magnitude,
        and so subnormal, is zero: XLA's arithmetic has no subnormals on a CPU.)
        """
        # Constants of a jitted function would be decoded by XLA while it compiles, and wrongly (jax 0.10.2, CPU).
        blocks_EOQY = jax.lax.optimization_barrier(self.blocks_EOQY)
        codes = jax.lax.bitcast_convert_type(blocks_EOQY, jnp.float4_e2m1fn).astype(dtype)
        codes = codes.reshape(*self.scales_EOQ.shape, 32)
        # In two steps, because 2**-127 is itself subnormal.
        half = self.scales_EOQ // 2
        values = codes * _power(half + 64, dtype)[..., None]
        values = values * _power(self.scales_EOQ - half + 63, dtype)[..., None]
        return values.reshape(*self.scales_EOQ.shape[:-1], -1)


class Int8(NamedTuple):
    """The kernel of a linear map: O stands for one or several output axes, I for the contracted ones after them."""

    values_OI: jax.Array  # int8
    scales_O: jax.Array  # float32

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """Returns the kernel with its output axes first; the product with the scale is rounded once, to float32."""
        inputs = (1,) * (self.values_OI.ndim - self.scales_O.ndim)
        scales = self.scales_O.reshape(self.scales_O.shape + inputs)
        return (self.values_OI.astype(jnp.float32) * scales).astype(dtype)


class DynamicInt8(NamedTuple):
    """An Int8 of which the product is one of whole numbers: what it is multiplied by is rounded too, row by row."""

    values_OI: jax.Array  # int8
    scales_O: jax.Array  # float32


class Transposed(NamedTuple):
    """A kernel with its output axes first, as a CPU reads narrow numbers fastest."""

    kernel_OI: jax.Array


def round_rows(x_RI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the whole numbers and the scales [R, 1] of `x_RI`: a row's scale is a 127th of its largest number.

    A row that is not finite has no finite scale, so that what becomes of it is no number either.
    """
    wide_RI = x_RI.astype(jnp.float32)
    scales_R1 = jnp.abs(wide_RI).max(-1, keepdims=True) / 127
    scales_R1 = jnp.where(scales_R1 == 0, 1, scales_R1)
    return jnp.round(wide_RI / scales_R1).astype(jnp.int8), scales_R1


def _power(biased: jax.Array, dtype) -> jax.Array:
    """Returns 2 ** (biased - 127) of normal exponents, from the bits."""
    bits = biased.astype(jnp.uint16) << 7
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)
