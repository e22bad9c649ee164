"""What the families share of Flax modules: parameters that are declared under the names of the model folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from core import sharding
from core.layers import linear
from core.quant import DynamicInt8, Int8, Transposed

Initializer = Callable[..., jax.Array]


class Compute(NamedTuple):
    """How a forward pass is computed; what it computes is the same.

    `remat` is one of REMAT, `attention` one of `core.attention.IMPLEMENTATIONS`; with `scan_layers` a whole sequence
    goes through one block that is compiled once, its parameters a slice of all blocks' (see `scanned`).
    """

    remat: str = "none"
    attention: str = "xla"
    scan_layers: bool = False


PLAIN = Compute()
SOWN = "intermediates"

_SAVED = jax.checkpoint_policies
REMAT: dict[str, Any] = {
    "none": None,
    "dots": _SAVED.dots_with_no_batch_dims_saveable,
    "residual": _SAVED.save_only_these_names("residual"),
    "full": _SAVED.nothing_saveable,
}
"""What a block keeps for its backward pass: everything; the results of products with weights; what attention and MLP
add to the residual stream; its input alone. What is not kept is computed again."""


def remat(block: Any, compute: Compute) -> Any:
    """Returns the module class `block`, keeping what `compute` says."""
    policy = REMAT[compute.remat]
    return block if policy is None else nn.remat(block, policy=policy)


def scanned(
    block_of: Callable[[Any], nn.Module],
    kinds: Sequence[Any],
    params: Mapping[str, Any],
    x_BTD: jax.Array,
    keys: Iterable[Any],
    *arguments: Any,
    compute: Compute,
) -> tuple[jax.Array, list[Any]]:
    """Returns what comes out of the blocks "0" to "L-1", and what each has sown, in a scan over their parameters.

    `kinds` says how blocks differ in more than their numbers: where they take turns, as windows do, one turn is a step
    of the scan. The parameters of a kind are stacked here, so nobody else need know; that copies them once a pass.

    Args:
      block_of: makes the block of a kind, without a parent.
      kinds: of every layer.
      params: of every layer by its number.
      x_BTD: what goes into the first.
      keys: every layer's key for dropout, or None.
      arguments: what blocks take between `x_BTD` and the key.
      compute: says what a block keeps for the backward pass.
    """
    L = len(kinds)
    turn = next(n for n in range(1, L + 1) if L % n == 0 and [*kinds] == [*kinds[:n]] * (L // n))
    layers = [(params[str(layer)], key) for layer, key in enumerate(keys)]
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[kind::turn]) for kind in range(turn)
    ]

    def one(kind: Any) -> Callable[..., Any]:
        block = block_of(kind)

        def run(x_BTD: jax.Array, layer: Any) -> Any:
            own, key = layer
            result: Any = block.apply({"params": own}, x_BTD, *arguments, key, mutable=SOWN)
            (x_BTD, _), sown = result
            return x_BTD, sown.get(SOWN, {})

        policy = REMAT[compute.remat]
        # A loop keeps the passes apart; barriers against finding common parts would only be in the way.
        return run if policy is None else jax.checkpoint(run, policy=policy, prevent_cse=False)

    blocks = [one(kind) for kind in kinds[:turn]]

    def step(x_BTD: jax.Array, layers: Any) -> Any:
        sown = []
        for block, layer in zip(blocks, layers, strict=True):
            x_BTD, found = block(x_BTD, layer)
            sown.append(found)
        return x_BTD, sown

    x_BTD, sown = jax.lax.scan(step, x_BTD, stacked)
    return x_BTD, [
        jax.tree.map(lambda x, i=layer // turn: x[i], sown[layer % turn]) for layer in range(L)
    ]


def residual(y_BTD: jax.Array) -> jax.Array:
    """Returns what is added to the residual stream, under the name by which REMAT keeps it."""
    return checkpoint_name(y_BTD, "residual")


def looked_up(table: Any, cache: Any) -> Any:
    """Returns the table as rows of it are taken: whole on each device but in a decoder, which takes few."""
    if cache is not None or not isinstance(table, jax.Array):
        return table
    return sharding.whole_rows(table)


def stream(x_BTD: jax.Array, cache: Any) -> jax.Array:
    """Returns the residual stream, which on several devices is cut along the batch; a decoder's stays where it is."""
    return x_BTD if cache is not None else sharding.cut_batch(x_BTD)


class Linear(nn.Module):
    """An affine map from the axes `inputs` to the axes `outputs`; its kernel starts as N(0, std).

    With `int8` the kernel is stored so, and starts uniform, near that standard deviation.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float
    use_bias: bool = True
    int8: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _stored(self, "kernel", self._values if self.int8 else self._dense)
        if isinstance(kernel, dict):
            kernel = Int8(kernel["values"], kernel["scales"])
        bias = self.param("bias", nn.initializers.zeros, self.outputs) if self.use_bias else None
        return linear(x, kernel, bias, inputs=len(self.inputs))

    def _dense(self, key: jax.Array) -> jax.Array:
        return nn.initializers.normal(self.std)(key, self.inputs + self.outputs)

    def _values(self, key: jax.Array) -> dict[str, jax.Array]:
        values = jax.random.randint(key, self.outputs + self.inputs, -127, 128, jnp.int8)
        scale = self.std / 73.3  # the standard deviation of the values
        return {"values": values, "scales": jnp.full(self.outputs, scale, jnp.float32)}


class Table(nn.Module):
    """A matrix that is looked up or multiplied by: token and position embeddings, an untied head."""

    leaf: str
    shape: tuple[int, int]
    initializer: Initializer

    @nn.compact
    def __call__(self) -> Any:
        return _stored(self, self.leaf, lambda key: self.initializer(key, self.shape))


def _stored(module: nn.Module, name: str, start: Callable[[jax.Array], Any]) -> Any:
    """Returns a parameter, which begins as `start` gives it and may since have been put in a form of `core.quant`."""
    found = module.get_variable("params", name)
    return found if isinstance(found, DynamicInt8 | Transposed) else module.param(name, start)


def rows(table: jax.Array | DynamicInt8, ids_BT: jax.Array) -> jax.Array:
    """Returns the rows of `table`; NaN for an id that it has not, because a wrong row would pass for a right one."""
    if isinstance(table, DynamicInt8):
        values = table.values_OI.at[ids_BT].get(mode="clip")
        scales = rows(table.scales_O[:, None], ids_BT)  # in which an id that it has not shows
        return values.astype(jnp.float32) * scales
    matrix: jax.Array = table
    if matrix.dtype.itemsize < 4:
        # Else XLA makes a float32 copy of the whole table before a loop in which rows are taken from it.
        matrix, ids_BT = jax.lax.optimization_barrier((matrix, ids_BT))
    ids_BT = jnp.where(ids_BT < 0, matrix.shape[0], ids_BT)  # negative ids would count from the end
    return matrix.at[ids_BT].get(mode="fill", fill_value=jnp.nan)


def last(x_BTD: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """Returns x_B1D: of each row its last token, if the rest of the row is padding; the first of a row of none."""
    if lengths_B is None:
        return x_BTD[:, -1:]
    index_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    return jnp.take_along_axis(x_BTD, index_B11, axis=1)
