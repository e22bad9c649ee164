"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) as GPT-OSS has it: a router, clamped SwiGLU experts.

No expert has a capacity and no row is dropped: the pairs of a row and one of its experts are sorted by expert, and each
expert's kernels meet its own rows (Gale et al. 2022, arXiv:2211.15841).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from core import native, sharding
from core.quant import MXFP4

_LARGEST_TILE = 64  # rows that meet one expert at a time


class Experts(NamedTuple):
    """The parameters of E experts; a kernel is dense, or packed with its output axes before the contracted one."""

    gate_up_EDF2: jax.Array | MXFP4
    gate_up_bias_EF2: jax.Array
    down_EFD: jax.Array | MXFP4
    down_bias_ED: jax.Array


def router_logits(x_RD: jax.Array, kernel_DE: jax.Array, bias_E: jax.Array) -> jax.Array:
    """Returns logits_RE, in float32 whatever `x` is: in bfloat16 near ties fall to either side."""
    kernel_DE, bias_1E = kernel_DE.astype(jnp.float32), bias_E.astype(jnp.float32)[None]
    return x_RD.astype(jnp.float32) @ kernel_DE + bias_1E


def route(logits_RE: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the weights and the numbers of the `count` experts of each row, [R, count]; the weights sum to 1.

    The softmax is over the chosen alone.
    """
    highest_RC, chosen_RC = jax.lax.top_k(logits_RE, count)
    return jax.nn.softmax(highest_RC, axis=-1), chosen_RC


def mix(
    x_RD: jax.Array,
    weights_RC: jax.Array,
    chosen_RC: jax.Array,
    experts: Experts,
    *,
    alpha: float,
    limit: float,
    ragged: bool | None = None,
) -> jax.Array:
    """Returns each row's weighted sum of what its experts make of it, in float32; differentiable but in packed kernels.

    Here the form of the computation is chosen: `jax.lax.ragged_dot` for dense kernels on an accelerator; a loop over
    tiles of rows on a CPU, where the former costs up to 20 times as much (docs/log.md), and for packed kernels, of
    which one expert at a time is unpacked; while serving on a CPU, the native kernel, which unpacks none. `ragged`
    chooses for dense kernels. Where a mesh is set that cuts the experts (`jax.set_mesh`), each device works for its
    own, and their sums are added.
    """
    kernels = experts.gate_up_EDF2, experts.down_EFD
    if ragged is None and native.is_serving() and native.mixes(x_RD.dtype, *kernels):
        return native.mix_experts(x_RD, weights_RC, chosen_RC, *experts, alpha=alpha, limit=limit)
    E = experts.down_bias_ED.shape[0]
    ragged = jax.default_backend() != "cpu" if ragged is None else ragged
    settings = {"tile": _tile(chosen_RC.size, E), "alpha": alpha, "limit": limit, "ragged": ragged}
    one = functools.partial(_mix_of, **settings)
    devices = jax.sharding.get_abstract_mesh().shape.get(sharding.EXPERT, 1)
    if devices == 1 or E % devices:
        return one(x_RD, weights_RC, chosen_RC, experts)

    def of_device(x_RD, weights_RC, chosen_RC, experts):
        first = jax.lax.axis_index(sharding.EXPERT) * len(experts.down_bias_ED)
        return jax.lax.psum(one(x_RD, weights_RC, chosen_RC - first, experts), sharding.EXPERT)

    whole, cut = PartitionSpec(), PartitionSpec(sharding.EXPERT)
    return jax.shard_map(
        of_device,
        in_specs=(whole, whole, whole, cut),
        out_specs=whole,
        axis_names={sharding.EXPERT},
        check_vma=False,
    )(x_RD, weights_RC, chosen_RC, experts)


def _mix_of(
    x_RD: jax.Array,
    weights_RC: jax.Array,
    chosen_RC: jax.Array,
    experts: Experts,
    *,
    tile: int,
    alpha: float,
    limit: float,
    ragged: bool,
) -> jax.Array:
    """Returns what `experts` give of the weighted sum; others than 0..E-1 may be chosen, and give nothing here."""
    R, C = chosen_RC.shape
    E, D = experts.down_bias_ED.shape
    expert_P = chosen_RC.reshape(-1)
    expert_P = jnp.where(
        (expert_P >= 0) & (expert_P < E), expert_P, E
    )  # the others' rows come last
    order_P = jnp.argsort(expert_P, stable=True)
    size_E = jnp.bincount(expert_P, length=E)

    def product(x_PI: jax.Array, kernel: jax.Array | MXFP4, bias_EO: jax.Array) -> jax.Array:
        if ragged and not isinstance(kernel, MXFP4):
            return _ragged(x_PI, kernel, bias_EO, size_E)
        return _tiled(x_PI, kernel, bias_EO, size_E, tile)

    gate_up_PF2 = product(
        x_RD[order_P // C],
        _matrices(experts.gate_up_EDF2, D),
        experts.gate_up_bias_EF2.reshape(E, -1),
    ).reshape(R * C, -1, 2)
    h_PF = swiglu(gate_up_PF2, alpha, limit).astype(x_RD.dtype)
    down = _matrices(experts.down_EFD, h_PF.shape[1])
    y_PD = product(h_PF, down, experts.down_bias_ED)
    y_PD = jnp.zeros_like(y_PD).at[order_P].set(y_PD, unique_indices=True)
    return (y_PD.reshape(R, C, D) * weights_RC[..., None]).sum(1)


def load_balance(routers: Sequence[jax.Array], count: int) -> jax.Array:
    """Returns how unequally the `count` experts of each row are spread, over the logits_RE of all layers together.

    The E-fold sum over experts of the share of rows that chose one times its mean probability (Fedus et al. 2021,
    arXiv:2101.03961, equations 4-6): `count` when all are equal, E at most. The gradient is that of the probabilities.
    """
    logits_RE = jnp.concatenate(routers)
    R, E = logits_RE.shape
    _, chosen_RC = jax.lax.top_k(logits_RE, count)
    share_E = jnp.bincount(chosen_RC.reshape(-1), length=E) / R
    return E * (share_E * jax.nn.softmax(logits_RE, axis=-1).mean(0)).sum()


def swiglu(gate_up_XF2: jax.Array, alpha: float, limit: float) -> jax.Array:
    """Returns (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up within it, in float32."""
    gate, up = gate_up_XF2[..., 0], gate_up_XF2[..., 1]
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _ragged(
    x_PI: jax.Array, kernel_EIO: jax.Array, bias_EO: jax.Array, size_E: jax.Array
) -> jax.Array:
    """What `_tiled` gives, by the backend's own product of groups, which promises nothing of rows of no group."""
    places_P = jnp.arange(len(x_PI))
    own_P1 = (places_P < size_E.sum())[:, None]
    y_PO = jax.lax.ragged_dot(
        jnp.where(own_P1, x_PI, 0),
        kernel_EIO.astype(x_PI.dtype),
        size_E.astype(jnp.int32),
        preferred_element_type=jnp.float32,
    )
    expert_P = jnp.searchsorted(jnp.cumsum(size_E), places_P, side="right")
    bias_PO = bias_EO.astype(jnp.float32)[jnp.minimum(expert_P, len(bias_EO) - 1)]
    return jnp.where(own_P1, y_PO + bias_PO, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(
    x_PI: jax.Array, kernel: jax.Array | MXFP4, bias_EO: jax.Array, size_E: jax.Array, tile: int
) -> jax.Array:
    """Returns each row times its expert's kernel, plus its bias, [P, O] in float32.

    The first size_E[0] rows are expert 0's, and so on; what is left is nobody's, and zero. Kernels are [E, I, O],
    packed ones [E, O, Q, Y]. Rows go through in tiles of one expert each, whose size does not depend on who is chosen,
    so that a row's numbers do not depend on where the others go.
    """
    padded_PI = _padded(x_PI, tile)

    def take(e: jax.Array, begin: jax.Array, own_t1: jax.Array, y_PO: jax.Array) -> jax.Array:
        x_tI = jax.lax.dynamic_slice_in_dim(padded_PI, begin, tile)
        y_tO = _product(x_tI, *_expert(kernel, e, x_PI.dtype))
        y_tO = y_tO + bias_EO[e].astype(jnp.float32)[None]
        # What of the tile is the next expert's is written again by the next tile.
        y_tO = jnp.where(own_t1, y_tO, 0)
        return jax.lax.dynamic_update_slice_in_dim(y_PO, y_tO, begin, 0)

    y_PO = jnp.zeros((len(padded_PI), bias_EO.shape[1]))
    return _for_tiles(size_E, tile, take, y_PO)[: len(x_PI)]


def _tiled_forward(x_PI, kernel, bias_EO, size_E, tile):
    return _tiled(x_PI, kernel, bias_EO, size_E, tile), (x_PI, kernel, bias_EO, size_E)


def _tiled_backward(tile, saved, dy_PO):
    """The same loop over the transposed kernels; their gradients are summed in place, an expert's in its tiles."""
    x_PI, kernel, bias_EO, size_E = saved
    padded_PI, padded_PO = _padded(x_PI, tile), _padded(dy_PO, tile)
    packed = isinstance(kernel, MXFP4)

    def take(e: jax.Array, begin: jax.Array, own_t1: jax.Array, sums: Any) -> Any:
        dx_PI, dkernel_EIO, dbias_EO = sums
        x_tI = jnp.where(own_t1, jax.lax.dynamic_slice_in_dim(padded_PI, begin, tile), 0)
        dy_tO = jnp.where(own_t1, jax.lax.dynamic_slice_in_dim(padded_PO, begin, tile), 0)
        dbias_EO = dbias_EO.at[e].add(dy_tO.sum(0))
        dy_tO = dy_tO.astype(x_PI.dtype)
        matrix, inputs = _expert(kernel, e, x_PI.dtype)
        dx_tI = _product(dy_tO, matrix, 1 - inputs).astype(x_PI.dtype)
        dx_PI = jax.lax.dynamic_update_slice_in_dim(dx_PI, dx_tI, begin, 0)
        if not packed:
            dkernel_EIO = dkernel_EIO.at[e].add(_product(x_tI.T, dy_tO, 0))
        return dx_PI, dkernel_EIO, dbias_EO

    zeros_EIO = None if packed else jnp.zeros(kernel.shape)
    zeros = jnp.zeros_like(padded_PI), zeros_EIO, jnp.zeros(bias_EO.shape)
    dx_PI, dkernel_EIO, dbias_EO = _for_tiles(size_E, tile, take, zeros)
    dkernel_EIO = None if packed else dkernel_EIO.astype(kernel.dtype)
    return dx_PI[: len(x_PI)], dkernel_EIO, dbias_EO.astype(bias_EO.dtype), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _for_tiles(size_E: jax.Array, tile: int, take: Callable[..., Any], carry: Any) -> Any:
    """Calls take(expert, first row, which rows of the tile are the expert's [t, 1], carry) for each tile in order."""
    tiles_E = (size_E + tile - 1) // tile
    last_E = jnp.cumsum(tiles_E)
    begin_E = jnp.cumsum(size_E) - size_E

    def one(i: jax.Array, carry: Any) -> Any:
        e = (last_E <= i).sum()
        before = (i - last_E[e] + tiles_E[e]) * tile
        own_t1 = (before + jnp.arange(tile) < size_E[e])[:, None]
        return take(e, begin_E[e] + before, own_t1, carry)

    return jax.lax.fori_loop(0, last_E[-1], one, carry)


def _tile(pairs: int, E: int) -> int:
    tile = 1
    while tile * E < pairs and tile < _LARGEST_TILE:
        tile *= 2
    return tile


def _padded(x_PI: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x_PI, ((0, rows), (0, 0)))


def _matrices(kernel: jax.Array | MXFP4, inputs: int) -> jax.Array | MXFP4:
    """Returns the kernel with its output axes as one."""
    if not isinstance(kernel, MXFP4):
        return kernel.reshape(kernel.shape[0], inputs, -1)
    E, *_, Q, Y = kernel.blocks_EOQY.shape
    return MXFP4(kernel.blocks_EOQY.reshape(E, -1, Q, Y), kernel.scales_EOQ.reshape(E, -1, Q))


def _expert(kernel: jax.Array | MXFP4, e: jax.Array, dtype: Any) -> tuple[jax.Array, int]:
    """Returns one expert's kernel as a matrix, and which of its axes is the input's."""
    if isinstance(kernel, MXFP4):
        return kernel.expert(e).decode(dtype), 1
    return kernel[e].astype(dtype), 0


def _product(x_RI: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """Returns `x` times a matrix of which `axis` is contracted, in float32."""
    contracted = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x_RI, matrix, contracted, preferred_element_type=jnp.float32)
