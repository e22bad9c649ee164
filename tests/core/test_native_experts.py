"""Native experts against every pair of a row and an expert in float64, and the bits of a row whoever is beside it."""

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_gpt_oss
from core import moe, native
from core.errors import NativeError
from core.models import gpt_oss
from core.native import build
from core.quant import MXFP4

ALPHA, LIMIT = 1.702, 2.0
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not native.available():
        pytest.skip("no native kernels: no C++ compiler, or FLAXMILL_NATIVE=off")


def packed(rng: np.random.Generator, *shape: int, low: int = 120, high: int = 125) -> MXFP4:
    *outer, inputs = shape
    blocks = rng.integers(0, 256, (*outer, inputs // 32, 16), np.uint8)
    scales = rng.integers(low, high, (*outer, inputs // 32), np.uint8)
    return MXFP4(jnp.asarray(blocks), jnp.asarray(scales))


def a_case(
    R: int, D: int, F: int, E: int, C: int, kernel: Any, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, moe.Experts]:
    """Rows, weights, choices, experts; `kernel` is MXFP4 or a type of float."""
    rng = np.random.default_rng(R)

    def normal(*shape: int, scale: float = 1, to: Any = dtype) -> jax.Array:
        return jnp.asarray((rng.standard_normal(shape) * scale).astype(jnp.dtype(to)))

    if kernel is MXFP4:
        gate_up, down = packed(rng, E, F, 2, D), packed(rng, E, D, F)
    else:
        gate_up = normal(E, D, F, 2, scale=0.2, to=kernel)
        down = normal(E, F, D, scale=0.2, to=kernel)
    experts = moe.Experts(gate_up, normal(E, F, 2), down, normal(E, D))
    chosen_RC = np.stack([rng.permutation(E)[:C] for _ in range(R)]).astype(np.int32)
    weights_RC = rng.dirichlet(np.ones(C), R).astype(np.float32)
    return normal(R, D), jnp.asarray(weights_RC), jnp.asarray(chosen_RC), experts


@functools.partial(jax.jit, static_argnames="limit")
def mixed(x_RD: Any, weights_RC: Any, chosen_RC: Any, experts: Any, limit: float = LIMIT) -> Any:
    with native.serving():
        return moe.mix(x_RD, weights_RC, chosen_RC, experts, alpha=ALPHA, limit=limit)


def dense(kernel: Any) -> np.ndarray:
    """[E, I, O] in float64, by the table of the format."""
    if not isinstance(kernel, MXFP4):
        wide = np.asarray(kernel).astype(np.float64)
        return wide.reshape(*wide.shape[:2], -1)
    blocks, scales = np.asarray(kernel.blocks_EOQY), np.asarray(kernel.scales_EOQ, int)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    values = CODES[codes % 8] * 2.0 ** (scales - 127)[..., None]
    values = np.where(values < 2.0**-126, 0, np.where(values < 2.0**128, values, np.inf))
    values = np.where(codes > 7, -1, 1) * values
    return values.reshape(len(scales), -1, scales.shape[-1] * 32).swapaxes(1, 2)


def in_float64(
    x_RD: Any, weights_RC: Any, chosen_RC: Any, experts: Any, limit: float = LIMIT
) -> np.ndarray:
    gate_up, down = dense(experts.gate_up_EDF2), dense(experts.down_EFD)
    gate_up_bias, down_bias = (
        np.asarray(bias).astype(np.float64).reshape(len(gate_up), -1)
        for bias in (experts.gate_up_bias_EF2, experts.down_bias_ED)
    )
    rows = np.asarray(x_RD).astype(np.float64)
    y_RD = np.zeros_like(rows)
    for r, c in np.ndindex(chosen_RC.shape):
        e = int(chosen_RC[r, c])
        h = rows[r] @ gate_up[e] + gate_up_bias[e]
        gate, up = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
        h = (up + 1) * gate / (1 + np.exp(-ALPHA * gate))
        if x_RD.dtype == jnp.bfloat16:
            h = h.astype(np.float32).astype(x_RD.dtype).astype(np.float32)
        y_RD[r] += float(weights_RC[r, c]) * (h @ down[e] + down_bias[e])
    return y_RD


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kernel", [MXFP4, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 96, 160, 5, 2), (31, 160, 32, 4, 3)])
def test_rows_are_the_weighted_sums_of_their_experts(
    sizes: tuple[int, int, int, int, int], kernel: Any, dtype: Any
):
    """The contracted axes have blocks that fill no whole vector; near a tie h may be rounded either way."""
    case = a_case(*sizes, kernel, dtype)
    expected = in_float64(*case)
    tolerance = 2e-6 if dtype == jnp.float32 else 1e-4
    if dtype == jnp.bfloat16 and kernel == jnp.float32:
        assert not native.mixes(jnp.dtype(dtype), case[3].gate_up_EDF2)
        tolerance = 2e-2
    np.testing.assert_allclose(mixed(*case), expected, atol=tolerance * abs(expected).max())


@pytest.mark.parametrize("kernel", [MXFP4, jnp.float32])
def test_odd_sizes_and_more_outputs_than_a_tile_has(kernel: Any):
    """Tiles are of 64 outputs of packed kernels, and of 512 of dense ones."""
    sizes = (9, 32, 544, 3, 1) if kernel is MXFP4 else (9, 7, 263, 3, 1)
    case = a_case(*sizes, kernel, jnp.float32)
    expected = in_float64(*case)
    np.testing.assert_allclose(mixed(*case), expected, atol=2e-6 * abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kernel", [MXFP4, jnp.bfloat16])
def test_a_row_has_the_same_bits_alone_and_among_any_others(kernel: Any, dtype: Any):
    """Up to 15 rows of one expert, which go through in blocks of 8, 4, 2 and 1."""
    x_RD, weights_RC, chosen_RC, experts = a_case(19, 96, 64, 3, 2, kernel, dtype)
    every_RD = np.asarray(mixed(x_RD, weights_RC, chosen_RC, experts))
    order = np.random.default_rng(1).permutation(19)
    for rows in (order, order[:1], order[1:4], order[4:11]):
        some = mixed(x_RD[rows], weights_RC[rows], chosen_RC[rows], experts)
        np.testing.assert_array_equal(some, every_RD[rows])


@pytest.mark.slow
def test_threads_change_no_bit():
    script = (
        "import test_native_experts as t, hashlib, numpy as np\n"
        "from core.quant import MXFP4\n"
        "y = t.mixed(*t.a_case(9, 160, 544, 4, 2, MXFP4, 'float32'))\n"
        "print(hashlib.sha256(np.asarray(y).tobytes()).hexdigest())"
    )
    here = mixed(*a_case(9, 160, 544, 4, 2, MXFP4, "float32"))
    for threads in ("1", "5"):
        path = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
        environment = os.environ | {"NPROC": threads, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == hashlib.sha256(np.asarray(here).tobytes()).hexdigest(), done


@pytest.mark.slow
@pytest.mark.parametrize("isa", list(build.isas())[1:])
def test_every_instruction_set_gives_the_sums(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLAXMILL_NATIVE_ISA", isa)
    for kernel in (MXFP4, jnp.float32):
        case = a_case(11, 96, 160, 4, 2, kernel, jnp.float32)
        jax.clear_caches()
        expected = in_float64(*case)
        np.testing.assert_allclose(mixed(*case), expected, atol=2e-6 * abs(expected).max())
    jax.clear_caches()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("low", "high", "size"), [(0, 4, 1e14), (252, 255, 1e-6)])
def test_extreme_scales_give_what_their_decoded_weights_give(
    low: int, high: int, size: float, dtype: Any
):
    """Weights below 2^-126 are 0, those that are too large infinite: as `MXFP4.decode` has them.

    h is up to 1e30 where weights are small, and small where they are large, so that they alone make the difference.
    """
    x_RD, weights_RC, chosen_RC, experts = a_case(3, 64, 96, 3, 1, MXFP4, dtype)
    down = packed(np.random.default_rng(2), 3, 64, 96, low=low, high=high)
    # Every other output has the codes of +-0.5 only, with which no scale is too large.
    halves = jnp.where(down.blocks_EOQY > 127, 0x19, 0x91).astype(jnp.uint8)
    even_O = (jnp.arange(64) % 2 == 0)[None, :, None, None]
    down = down._replace(blocks_EOQY=jnp.where(even_O, halves, down.blocks_EOQY))
    gate_up_bias_EF2 = jnp.zeros_like(experts.gate_up_bias_EF2)
    down_bias_ED = jnp.zeros_like(experts.down_bias_ED)
    experts = moe.Experts(experts.gate_up_EDF2, gate_up_bias_EF2, down, down_bias_ED)
    case = x_RD * jnp.asarray(size, dtype), weights_RC, chosen_RC
    found = np.asarray(mixed(*case, experts, limit=1e38))
    with np.errstate(invalid="ignore", over="ignore"):
        expected = in_float64(*case, experts, 1e38)
    finite = np.isfinite(expected)
    assert finite[:, ::2].all()
    assert finite.all() == (low == 0)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    found, expected = found[finite], expected[finite]
    tolerance = (1e-5 if dtype == jnp.float32 else 1e-3) * abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_what_is_no_number_stays_in_its_row():
    x_RD, weights_RC, chosen_RC, experts = a_case(6, 96, 64, 2, 1, MXFP4, jnp.float32)
    clean_RD = np.asarray(mixed(x_RD, weights_RC, chosen_RC, experts))
    found_RD = np.asarray(mixed(x_RD.at[2, 5].set(jnp.nan), weights_RC, chosen_RC, experts))
    assert np.isnan(found_RD[2]).all()
    np.testing.assert_array_equal(np.delete(found_RD, 2, 0), np.delete(clean_RD, 2, 0))
    found_RD = np.asarray(mixed(x_RD.at[2, 5].set(jnp.inf), weights_RC, chosen_RC, experts))
    np.testing.assert_array_equal(np.delete(found_RD, 2, 0), np.delete(clean_RD, 2, 0))


def test_a_gate_that_is_no_number_is_not_taken_for_the_limit():
    """Of an infinite input, a zero weight makes a NaN in the gate alone; up is the limit."""
    gate_up_EDF2 = jnp.zeros((1, 1, 1, 2)).at[..., 1].set(1)
    zeros = jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 1)), jnp.zeros((1, 1))
    experts = moe.Experts(gate_up_EDF2, *zeros)
    one_11 = jnp.ones((1, 1))
    assert np.isnan(mixed(jnp.inf * one_11, one_11, jnp.zeros((1, 1), jnp.int32), experts)).all()


def test_a_choice_that_is_no_expert_gives_nothing():
    x_RD, weights_RC, chosen_RC, experts = a_case(4, 32, 32, 3, 2, MXFP4, jnp.float32)
    chosen_RC = chosen_RC.at[1].set(jnp.array([-1, 3], jnp.int32)).at[2, 0].set(2**30)
    found_RD = np.asarray(mixed(x_RD, weights_RC, chosen_RC, experts))
    assert not found_RD[1].any()
    one = x_RD[2:3], weights_RC[2:3, 1:], chosen_RC[2:3, 1:]
    np.testing.assert_array_equal(found_RD[2:3], mixed(*one, experts))


@pytest.mark.parametrize("serving", [False, True])
def test_padding_chooses_nobody(serving: bool):
    """Or it would cost the reading of its experts: 15 idle slots of 16 as much as 15 tokens."""
    config = tiny_gpt_oss.packed_config()
    mixture = gpt_oss.MoE(config)
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 64)), jnp.float32)
    params: Any = jax.jit(mixture.init)(jax.random.key(0), x_BTD)
    params["params"]["down"]["bias"] += 1
    with native.serving() if serving else contextlib.nullcontext():
        apply = jax.jit(lambda lengths: mixture.apply(params, x_BTD, lengths))
        every_BTD, found_BTD = apply(None), np.array(apply(jnp.array([0, 4, 1])))
    is_token_BT = np.arange(4)[None] < np.array([0, 4, 1])[:, None]
    assert not found_BTD[~is_token_BT].any()
    np.testing.assert_array_equal(found_BTD[is_token_BT], np.asarray(every_BTD)[is_token_BT])


def test_the_kernel_serves_and_nothing_else_does():
    case = a_case(4, 32, 32, 3, 2, MXFP4, jnp.float32)
    mix = functools.partial(moe.mix, alpha=ALPHA, limit=LIMIT)
    assert "mix_experts" not in str(jax.make_jaxpr(mix)(*case))
    with native.serving():
        assert "mix_experts" in str(jax.make_jaxpr(mix)(*case))
        with pytest.raises(NativeError, match="no gradient is defined"):
            jax.grad(lambda x: mix(x, *case[1:]).sum())(case[0])
