"""The precision that a model computes in: its parameters, once opened, in the form that is multiplied fastest.

    float32     weights, activations and cache
    bfloat16    weights, activations and cache; sums, norms, softmax and logits are float32
    int8        kernels, embeddings and head in int8, with a scale for each output channel; what meets kernels and head
                is rounded to int8, with a scale for each row; other activations are float32, the cache is bfloat16

What is small stays as it is: norms, biases, sinks, positions, routers. So do experts, packed or not.
"""

import functools
import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from core import int8, workers
from core.config import PRECISIONS, GPT2Config
from core.errors import CheckpointError, ConfigError
from core.models import Model, Params, build
from core.quant import DynamicInt8, Int8, Transposed

_DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "int8": (jnp.float32, jnp.bfloat16),
}
"""Of activations and cache."""

_LINE = (
    64  # columns that are turned at a time, so that what is read is used while it is in the cache
)
_MOST_INPUTS = (2**31 - 1) // 127**2
"""A sum of so many products of two int8s is an int32."""


class Prepared(NamedTuple):
    """A model as an engine takes it; `dtype` is that of the activations."""

    model: Model
    params: Params
    dtype: Any
    cache_dtype: Any


def check(precision: str | None) -> None:
    """Makes sure that there is such a precision.

    Raises:
      ConfigError: there is not.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def prepare(model: Model, params: Params, precision: str | None) -> Prepared:
    """Returns the model in `precision`; None leaves everything as it is, and the embeddings say what to compute in.

    Parameters that are in it already are the arrays that were given, mapped files too. The others are made one after
    another: the new ones are in memory, and of the old ones what was in memory before.

    Raises:
      ConfigError: there is no such precision, or a sum could be more than int8's products have room for.
      CheckpointError: a weight is not finite, and int8 has no scale for it.
    """
    check(precision)
    if precision is None:
        embedding = params["wte"]["embedding"]
        is_int8 = isinstance(embedding, DynamicInt8)
        kinds = _DTYPES["int8"] if is_int8 else (embedding.dtype, embedding.dtype)
        return Prepared(model, params, *kinds)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    if any(isinstance(x, DynamicInt8 | Transposed) for x in flat.values()):
        raise ValueError("these parameters have a precision already; give those of the folder")
    if isinstance(model.config, GPT2Config) and model.config.quantization == "int8":
        flat, model = _joined(flat), build(model.config.dense)
    words = model.config.tensors()
    if precision == "int8":
        flat |= _rounded({name: x for name, x in flat.items() if _rounds(name, words[name])}, words)
    else:
        dtype = jnp.dtype(_DTYPES[precision][0])
        names = list(flat)
        cast = workers.each(
            lambda name, stop: _cast(name, flat[name], words[name], dtype),
            names,
            threads=workers.COUNT,
        )
        flat = dict(zip(names, cast, strict=True))
    return Prepared(model, traverse_util.unflatten_dict(flat, sep="."), *_DTYPES[precision])


def _joined(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters with the two parts of each int8 kernel as one."""
    joined: dict[str, Any] = {}
    for name, x in flat.items():
        kernel, _, part = name.rpartition(".")
        if part == "values":
            joined[kernel] = Int8(x, flat[f"{kernel}.scales"])
        elif part != "scales":
            joined[name] = x
    return joined


def _inputs(name: str, word: str) -> int | None:
    """Returns how many axes of a parameter are contracted, if it is the kernel of a linear map; they come first.

    Such a map reads the residual stream, D, or writes to it.
    """
    if not name.endswith(".kernel") or set(word) & set("EV"):
        return None
    return 1 if word[0] == "D" else len(word) - 1


def _cast(name: str, x: Any, word: str, dtype: Any) -> Any:
    """Returns a parameter in floating point, and a narrow kernel with its output axes first, for a CPU."""
    if not name.endswith((".kernel", ".embedding")) or word == "DE":
        return x
    inputs = _inputs(name, word) or 0
    turns = inputs > 0 and dtype.itemsize < 4 and _is_on_one_cpu(x)
    if isinstance(x, Int8):
        return Transposed(_decoded(x, dtype, 0)) if turns else _decoded(x, dtype, inputs)
    if x.dtype == dtype:
        return x
    return Transposed(_turned(np.asarray(x), dtype, inputs)) if turns else x.astype(dtype)


def _is_on_one_cpu(x: Any) -> bool:
    (*_, first) = jax.tree.leaves(x)
    devices = first.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _turned(x_IO: np.ndarray, dtype: Any, inputs: int) -> jax.Array:
    """Returns a kernel in a type of two bytes, its first axes last; in NumPy, since nothing has to be compiled."""
    shape = x_IO.shape[inputs:] + x_IO.shape[:inputs]
    narrow_IO = x_IO.astype(dtype).view(np.uint16).reshape(math.prod(x_IO.shape[:inputs]), -1)
    turned_OI = np.empty(narrow_IO.shape[::-1], np.uint16)
    for o in range(0, len(turned_OI), _LINE):
        turned_OI[o : o + _LINE] = narrow_IO[:, o : o + _LINE].T
    return jax.device_put(turned_OI.view(dtype).reshape(shape))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _decoded(kernel: Int8, dtype: Any, inputs: int) -> jax.Array:
    """Returns an int8 kernel in floating point, its last axes first."""
    return jnp.moveaxis(kernel.decode(dtype), range(-inputs, 0), range(inputs))


def _rounds(name: str, word: str) -> bool:
    return word == "VD" or _inputs(name, word) is not None


def _rounded(flat: dict[str, Any], words: Mapping[str, str]) -> dict[str, DynamicInt8]:
    """Returns the parameters in int8; several threads work, since NumPy lets them.

    Raises:
      ConfigError, CheckpointError: see `prepare`.
    """
    if any(len(x.sharding.device_set) > 1 for x in jax.tree.leaves(flat)):
        raise ConfigError("int8 is for one device yet; choose another precision for several")

    def round_one(name: str, stop: threading.Event) -> DynamicInt8:
        x = flat[name]
        try:
            made = x if isinstance(x, Int8) else _round(np.asarray(x), _inputs(name, words[name]))
        except int8.NotFinite as error:
            raise CheckpointError(
                f"{name}: {error}, and int8 has no scale for it; choose another precision"
            ) from error
        inputs = made[0].size // made[1].size
        if inputs > _MOST_INPUTS:
            raise ConfigError(f"{name} sums {inputs} products; int8 adds up {_MOST_INPUTS} at most")
        return DynamicInt8(*made)

    names = list(flat)
    return dict(zip(names, workers.each(round_one, names, threads=workers.COUNT), strict=True))


def _round(x: np.ndarray, inputs: int | None) -> DynamicInt8:
    """Returns a kernel whose `inputs` axes come first, or a table, whose rows are channels, in int8."""
    weights_OI = x if inputs is None else np.moveaxis(x, range(inputs), range(-inputs, 0))
    outputs = 1 if inputs is None else x.ndim - inputs
    channels = math.prod(weights_OI.shape[:outputs])
    values = np.empty((channels, weights_OI.size // channels), np.int8)
    scales = np.empty(channels, np.float32)
    start = 0
    for rows in int8.channels(weights_OI, outputs):
        part = slice(start, start + len(rows))
        scales[part] = int8.scales(rows)
        values[part] = int8.values(rows, scales[part])
        start += len(rows)
    return DynamicInt8(
        jax.device_put(values.reshape(weights_OI.shape)),
        jax.device_put(scales.reshape(weights_OI.shape[:outputs])),
    )
