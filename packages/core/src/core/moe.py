"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) as GPT-OSS has it: a router, clamped SwiGLU experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.quant import MXFP4

_LARGEST_TILE = 64  # rows that meet one expert at a time


class Experts(NamedTuple):
    """The parameters of E experts; a kernel is dense, or packed with its output axes before the contracted one."""

    gate_up_EDF2: jax.Array | MXFP4
    gate_up_bias_EF2: jax.Array
    down_EFD: jax.Array | MXFP4
    down_bias_ED: jax.Array

    def expert(self, index: jax.Array) -> "Experts":
        """Returns one expert's parameters, without the axis E."""
        gate_up, down = (
            kernel.expert(index) if isinstance(kernel, MXFP4) else kernel[index]
            for kernel in (self.gate_up_EDF2, self.down_EFD)
        )
        return Experts(gate_up, self.gate_up_bias_EF2[index], down, self.down_bias_ED[index])


def route(
    x_RD: jax.Array, kernel_DE: jax.Array, bias_E: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the weights and the numbers of the `count` experts of each row, [R, count]; the weights sum to 1.

    The softmax is over the chosen alone. All in float32: in bfloat16 near ties fall to either side.
    """
    kernel_DE, bias_1E = kernel_DE.astype(jnp.float32), bias_E.astype(jnp.float32)[None]
    logits_RE = x_RD.astype(jnp.float32) @ kernel_DE + bias_1E
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
    trains: bool,
) -> jax.Array:
    """Returns each row's weighted sum of what its experts make of it, in float32.

    Here the form of the computation is chosen. With `trains`, dense kernels all meet all rows, which has a gradient and
    costs E / C times the arithmetic. Otherwise rows meet their own experts only, and one expert at a time is unpacked.
    """
    if trains and not isinstance(experts.down_EFD, MXFP4):
        return _all_experts(x_RD, weights_RC, chosen_RC, experts, alpha, limit)
    y_RCD = _chosen_experts(x_RD, chosen_RC, experts, alpha, limit)
    return (y_RCD * weights_RC[..., None]).sum(1)


def swiglu(gate_up_XF2: jax.Array, alpha: float, limit: float) -> jax.Array:
    """Returns (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up within it, in float32."""
    gate, up = gate_up_XF2[..., 0], gate_up_XF2[..., 1]
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _all_experts(
    x_RD: jax.Array,
    weights_RC: jax.Array,
    chosen_RC: jax.Array,
    experts: Experts,
    alpha: float,
    limit: float,
) -> jax.Array:
    E = experts.down_bias_ED.shape[0]
    rows_R1 = jnp.arange(len(x_RD))[:, None]
    weights_RE = jnp.zeros((len(x_RD), E)).at[rows_R1, chosen_RC].set(weights_RC)

    def one(expert: Experts) -> jax.Array:
        return _expert(x_RD, expert, alpha, limit)

    y_ERD = jax.vmap(one)(experts)
    return jnp.einsum("ERD,RE->RD", y_ERD, weights_RE)


def _chosen_experts(
    x_RD: jax.Array, chosen_RC: jax.Array, experts: Experts, alpha: float, limit: float
) -> jax.Array:
    """Returns y_RCD, in float32: rows sorted by expert go through in tiles of one expert each.

    A tile has a size that R alone decides, so that a row's numbers do not depend on where the others go.
    """
    R, C = chosen_RC.shape
    E, D = experts.down_bias_ED.shape
    pairs = R * C
    tile = 1
    while tile * E < pairs and tile < _LARGEST_TILE:
        tile *= 2

    expert_P = chosen_RC.reshape(-1)
    order_P = jnp.argsort(expert_P, stable=True)
    size_E = jnp.bincount(expert_P, length=E)
    end_E = jnp.cumsum(size_E)
    tiles_E = (size_E + tile - 1) // tile
    last_tile_E = jnp.cumsum(tiles_E)

    def take_tile(i: jax.Array, y_PD: jax.Array) -> jax.Array:
        e = jnp.searchsorted(last_tile_E, i, side="right")
        begin = end_E[e] - size_E[e] + (i - last_tile_E[e] + tiles_E[e]) * tile
        places_t = begin + jnp.arange(tile)
        pair_t = jnp.where(places_t < end_E[e], order_P[jnp.minimum(places_t, pairs - 1)], pairs)
        x_tD = x_RD[jnp.minimum(pair_t // C, R - 1)]
        y_tD = _expert(x_tD, experts.expert(e), alpha, limit)
        return y_PD.at[pair_t].set(y_tD, mode="drop")

    y_PD = jax.lax.fori_loop(0, last_tile_E[-1], take_tile, jnp.zeros((pairs, D)))
    return y_PD.reshape(R, C, D)


def _expert(x_RD: jax.Array, expert: Experts, alpha: float, limit: float) -> jax.Array:
    """Returns what one expert (the fields of `expert` without their axis E) makes of every row, in float32."""
    bias_1F2 = expert.gate_up_bias_EF2.astype(jnp.float32)[None]
    h_RF2 = _product(x_RD, expert.gate_up_EDF2).reshape(-1, *bias_1F2.shape[1:]) + bias_1F2
    h_RF = swiglu(h_RF2, alpha, limit).astype(x_RD.dtype)
    return _product(h_RF, expert.down_EFD) + expert.down_bias_ED.astype(jnp.float32)[None]


def _product(x_RI: jax.Array, kernel: jax.Array | MXFP4) -> jax.Array:
    """Returns `x` times one expert's kernel, [R, O] in float32; packed kernels are [O, I], dense ones [I, O]."""
    if isinstance(kernel, MXFP4):
        dense, axis = kernel.decode(x_RI.dtype).reshape(-1, x_RI.shape[1]), 1
    else:
        dense, axis = kernel.reshape(x_RI.shape[1], -1).astype(x_RI.dtype), 0
    return jax.lax.dot_general(
        x_RI, dense, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
