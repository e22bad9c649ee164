"""The small mathematics of a transformer: norms, activations, linear maps, dropout. Pure functions on arrays.

Weights keep the axes of the checkpoint (see `core.axes`); the products run on flattened rows, `(B T) x D`, because the
backward pass of a three-dimensional product contracts two axes at once and costs small models a third of a step.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from core import native
from core.quant import DynamicInt8, Int8, Transposed, round_rows

Kernel = jax.Array | Int8 | DynamicInt8 | Transposed


def wide_dtype(dtype: Any) -> Any:
    """Returns what sums and functions of numbers of `dtype` are computed in: float32, for float64 as it is."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def widened(x: jax.Array) -> jax.Array:
    """Returns `x` in its `wide_dtype`."""
    return x.astype(wide_dtype(x.dtype))


def layer_norm(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float
) -> jax.Array:
    """Returns `x` normalised over its last axis, in float32 inside (Ba et al. 2016, arXiv:1607.06450).

    The variance is the mean of squared deviations: mean(x**2) - mean(x)**2 cancels where |mean| >> std. For its
    gradient the normalised rows are kept, not those that came in.
    """
    y: Any = _layer_norm(x, scale_D, bias_D, epsilon)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale_D, bias_D, epsilon):
    return _layer_norm_forward(x, scale_D, bias_D, epsilon)[0]


def _layer_norm_forward(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float
) -> tuple[jax.Array, tuple[Any, ...]]:
    wide = widened(x)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    unscaled = centred * inverse
    normal = unscaled * _rows_like(scale_D, x)
    if bias_D is not None:
        normal = normal + _rows_like(bias_D, x)
    return normal.astype(x.dtype), (unscaled, inverse, scale_D, bias_D)


def _layer_norm_backward(
    epsilon: float, saved: tuple[Any, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    unscaled, inverse, scale_D, bias_D = saved
    wide, rows = widened(dy), tuple(range(dy.ndim - 1))
    scaled = wide * _rows_like(scale_D, dy)
    along = (scaled * unscaled).mean(-1, keepdims=True)
    dx = (scaled - scaled.mean(-1, keepdims=True) - unscaled * along) * inverse
    dscale_D = (wide * unscaled).sum(rows).astype(scale_D.dtype)
    dbias_D = None if bias_D is None else wide.sum(rows).astype(bias_D.dtype)
    return dx.astype(dy.dtype), dscale_D, dbias_D


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """Returns `x` over its root mean square, in float32 inside (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    wide = widened(x)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    return (normal * _rows_like(scale_D, x)).astype(x.dtype)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU in its tanh form, OpenAI's `gelu_new` (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2)."""
    return jax.nn.gelu(widened(x), approximate=True).astype(x.dtype)


@jax.custom_vjp
def gelu_erf(x: jax.Array) -> jax.Array:
    """GELU as defined, x * Phi(x); PyTorch's and nanoGPT's default.

    With gradients Phi is (1 + erf) / 2 as in PyTorch, without them erfc / 2: they differ in the last bits.
    """
    return jax.nn.gelu(widened(x), approximate=False).astype(x.dtype)


# The slope is computed with the value, of which it shares the costly function, and is all that is kept.
def _gelu_tanh_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = widened(x)
    c = math.sqrt(2 / math.pi)
    tanh = jnp.tanh(c * (wide + 0.044715 * wide * wide * wide))
    inner = c * (1 + 3 * 0.044715 * wide * wide)
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * inner
    return (0.5 * wide * (1 + tanh)).astype(x.dtype), slope.astype(x.dtype)


def _gelu_erf_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = widened(x)
    phi = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
    slope = phi + wide * (jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi)))
    return (wide * phi).astype(x.dtype), slope.astype(x.dtype)


def _gelu_backward(slope: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (dy * slope,)


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_backward)
gelu_erf.defvjp(_gelu_erf_forward, _gelu_backward)


def quick_gelu(x: jax.Array) -> jax.Array:
    """The cheap GELU of the same paper, x * sigmoid(1.702 x)."""
    wide = widened(x)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """The SiLU of the same paper, x * sigmoid(x); swish with beta 1 (Ramachandran et al. 2017, arXiv:1710.05941)."""
    return jax.nn.silu(widened(x)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu": gelu_erf,
    "relu": jax.nn.relu,
    "silu": silu,
    "quick_gelu": quick_gelu,
}
"""By the names of `core.config.ACTIVATIONS`; three names of the tanh form differ in rounding only.

Each is computed in `wide_dtype` and rounded once: in bfloat16 XLA would round after every operation, which also takes a
CPU three times as long (docs/log.md).
"""


def linear(x: jax.Array, kernel: Kernel, bias: jax.Array | None, *, inputs: int = 1) -> jax.Array:
    """Returns `x @ kernel + bias`, contracting the last `inputs` axes of `x` with the first of `kernel`.

    A kernel of `core.quant` has its output axes first. An Int8 has no gradient: those of `x` and of the bias are
    defined.

    >>> linear(jnp.ones((2, 5, 4)), jnp.ones((4, 3, 2)), jnp.ones((3, 2))).shape
    (2, 5, 3, 2)
    """
    rows = x.shape[: x.ndim - inputs]
    flat = x.reshape(_size(rows), -1)
    if isinstance(kernel, Int8):
        outputs = kernel.scales_O.shape
        flat = _int8_product(flat, kernel).astype(x.dtype)
    elif isinstance(kernel, DynamicInt8):
        outputs = kernel.scales_O.shape
        flat = _dynamic_int8_product(flat, kernel).astype(x.dtype)
    elif isinstance(kernel, Transposed):
        outputs = kernel.kernel_OI.shape[:-inputs]
        matrix = kernel.kernel_OI.reshape(-1, flat.shape[1]).astype(x.dtype)
        flat = product(flat, matrix, axis=1).astype(x.dtype)
    else:
        outputs = kernel.shape[inputs:]
        matrix = kernel.reshape(-1, _size(outputs)).astype(x.dtype)
        if _is_narrow(x):
            flat = _narrow_product(flat, matrix)
        else:
            few = native.serves(flat, matrix)
            flat = product(flat, matrix, axis=0) if few else flat @ matrix
    if bias is not None:
        flat = (
            _plus(flat, bias.reshape(-1))
            if _is_narrow(x)
            else flat + bias.reshape(1, -1).astype(x.dtype)
        )
    return flat.reshape(rows + outputs)


@jax.custom_vjp
def _plus(y_RO: jax.Array, bias_O: jax.Array) -> jax.Array:
    """Returns narrow rows with a bias added, whose gradient is summed in float32.

    XLA's narrow sum over many rows loses digits, and takes a CPU a third of a small model's step (docs/log.md).
    """
    return y_RO + bias_O.reshape(1, -1).astype(y_RO.dtype)


def _plus_forward(y_RO: jax.Array, bias_O: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _plus(y_RO, bias_O), jnp.zeros((0,), bias_O.dtype)


def _plus_backward(like_bias: jax.Array, dy_RO: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy_RO, widened(dy_RO).sum(0).astype(like_bias.dtype)


_plus.defvjp(_plus_forward, _plus_backward)


def unembed(x_BTD: jax.Array, kernel_VD: jax.Array | DynamicInt8) -> jax.Array:
    """Returns the logits_BTV of `x_BTD`, in float32 whatever the activations are."""
    B, T, D = x_BTD.shape
    x_RD = x_BTD.reshape(B * T, D)
    if isinstance(kernel_VD, DynamicInt8):
        logits_RV = _dynamic_int8_product(x_RD, kernel_VD)
    else:
        logits_RV = product(x_RD, kernel_VD.astype(x_BTD.dtype), axis=1)
    return logits_RV.reshape(B, T, -1)


def product(x_RI: jax.Array, matrix: jax.Array, *, axis: int) -> jax.Array:
    """Returns `x_RI` times `matrix`, contracted along its `axis`, in float32.

    XLA multiplies by a narrow matrix as it lies in memory if the result is float32 and there are two rows; for one row,
    or for a narrow result, a CPU first makes a float32 copy of the matrix, as large as the weights twice. Few rows are
    for `core.native`, where it serves.
    """
    if native.serves(x_RI, matrix):
        return native.product(x_RI, matrix, axis=axis)
    lone = _is_narrow(x_RI) and len(x_RI) == 1
    y_RO = jax.lax.dot_general(
        jnp.concatenate([x_RI, x_RI]) if lone else x_RI,
        matrix,
        (((1,), (axis,)), ((), ())),
        preferred_element_type=wide_dtype(x_RI.dtype),
    )
    return y_RO[:1] if lone else y_RO


@jax.custom_vjp
def _narrow_product(x_RI: jax.Array, matrix_IO: jax.Array) -> jax.Array:
    """Returns the product of narrow numbers in their type; it and its gradients are summed by `product`.

    XLA's own narrow results take a CPU 2.5 times as long, 5 times for a hundred rows (docs/log.md).
    """
    return product(x_RI, matrix_IO, axis=0).astype(x_RI.dtype)


def _narrow_product_forward(
    x_RI: jax.Array, matrix_IO: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow_product(x_RI, matrix_IO), (x_RI, matrix_IO)


def _narrow_product_backward(
    saved: tuple[jax.Array, jax.Array], dy_RO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_RI, matrix_IO = saved
    dx_RI = product(dy_RO, matrix_IO, axis=1).astype(x_RI.dtype)
    return dx_RI, product(x_RI.T, dy_RO, axis=0).astype(matrix_IO.dtype)


_narrow_product.defvjp(_narrow_product_forward, _narrow_product_backward)


_TILE = 64  # output channels of an int8 kernel that are converted at a time


def _int8_product(x_RI: jax.Array, kernel: Int8) -> jax.Array:
    """Returns `x_RI` times the kernel, in float32, in which whole numbers are exact; the scales come last.

    A matrix that is converted as a whole goes through memory, which takes a CPU 7 to 40 times as long as the product;
    tiles stay in its cache. Here the form is chosen, as measured in docs/log.md.
    """
    values_OI = kernel.values_OI.reshape(-1, x_RI.shape[1])
    if native.serves(x_RI, values_OI):
        return native.product(x_RI, values_OI, axis=1) * kernel.scales_O.reshape(1, -1)
    x_RI = x_RI.astype(jnp.float32)
    O, I = values_OI.shape
    whole = O // _TILE * _TILE if jax.default_backend() == "cpu" else 0

    def of_tile(values_tI: jax.Array) -> jax.Array:
        return x_RI @ values_tI.astype(jnp.float32).T

    y_nRt = jax.lax.map(of_tile, values_OI[:whole].reshape(-1, _TILE, I))
    y_RO = y_nRt.swapaxes(0, 1).reshape(len(x_RI), whole)
    if whole < O:
        y_RO = jnp.concatenate([y_RO, of_tile(values_OI[whole:])], axis=1)
    return y_RO * kernel.scales_O.reshape(1, -1)


def _dynamic_int8_product(x_RI: jax.Array, kernel: DynamicInt8) -> jax.Array:
    """Returns `x_RI`, rounded row by row, times the kernel, in float32: sums of whole numbers, scaled.

    XLA multiplies whole numbers as they lie in memory if there are two rows; for one a CPU first widens the matrix.
    """
    values_OI = kernel.values_OI.reshape(-1, x_RI.shape[1])
    if native.serves(x_RI, values_OI):
        return native.rounded_product(x_RI, values_OI, kernel.scales_O.reshape(-1))
    values_RI, scales_R1 = round_rows(x_RI)
    if len(values_RI) == 1:
        values_RI = jnp.concatenate([values_RI, values_RI])
    sums_RO = jax.lax.dot_general(
        values_RI,
        values_OI,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    y_RO = sums_RO[: len(x_RI)].astype(jnp.float32) * kernel.scales_O.reshape(1, -1)
    return y_RO * scales_R1


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Returns `x` with a share `rate` zeroed and the rest scaled up (Srivastava et al. 2014); `x` without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _rows_like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """`vector`, widened, with leading axes of one, so that no rank is promoted silently."""
    return widened(vector).reshape((1,) * (x.ndim - 1) + vector.shape)


def _is_narrow(x: jax.Array) -> bool:
    return x.dtype.itemsize < 4


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
