"""Native attention over a cache against float64, what it does not read, a query's bits whoever is beside it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import native
from core.errors import NativeError
from core.native import build


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not native.available():
        pytest.skip("no native kernels: no C++ compiler, or FLAXMILL_NATIVE=off")


class Case(NamedTuple):
    q_BTNH: jax.Array
    k_RKSH: jax.Array
    v_RKSH: jax.Array
    starts_B: jax.Array
    lengths_B: jax.Array


def a_case(
    B: int, T: int, N: int, K: int, S: int, H: int, starts: list[int], *, dtype: Any = jnp.float32
) -> Case:
    """The cache has one row more than the queries."""
    rng = np.random.default_rng(S)

    def normal(*shape: int, scale: float = 1) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * scale, dtype)

    q_BTNH = normal(B, T, N, H, scale=2)
    k_RKSH, v_RKSH = normal(B + 1, K, S, H), normal(B + 1, K, S, H)
    return Case(q_BTNH, k_RKSH, v_RKSH, jnp.asarray(starts), jnp.full(B, T))


@functools.partial(jax.jit, static_argnames="window")
def attend(
    case: Case, sinks_N: Any = None, first_row: Any = None, window: int | None = None
) -> jax.Array:
    q, k, v, starts, lengths = case
    given = {"starts_B": starts, "lengths_B": lengths, "scale": q.shape[-1] ** -0.5}
    return native.attend_cache(q, k, v, first_row, **given, window=window, sinks_N=sinks_N)


@jax.jit
def attend_prompt(case: Case, sinks_N: Any = None, first_row: Any = None) -> jax.Array:
    q, k, v, starts, lengths = case
    given = {"starts_B": starts, "lengths_B": lengths, "scale": q.shape[-1] ** -0.5}
    return native.attend_prompt(q, k, v, first_row, **given, sinks_N=sinks_N)


def in_float64(
    case: Case, sinks_N: Any = None, first_row: int = 0, window: int | None = None
) -> np.ndarray:
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in case[:3])
    (_, T, N, H), (_, K, S, _) = q.shape, k.shape
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(len(q), T, N):
        last = int(case.starts_B[b]) + t
        seen = np.arange(0 if window is None else max(0, last - window + 1), last + 1) % S
        scores = k[first_row + b, n // (N // K), seen] @ q[b, t, n] * H**-0.5
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks_N is None else np.exp(float(sinks_N[n])))
        out[b, t, n] = weights @ v[first_row + b, n // (N // K), seen] / total
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ((3, 1, 4, 4, 70, 8), [0, 69, 33]),
        ((2, 5, 6, 2, 200, 64), [190, 3]),
        ((2, 3, 3, 3, 130, 20), [64, 61]),
        ((1, 2, 10, 2, 257, 80), [255]),
    ],
)
def test_queries_mix_the_values_up_to_their_own(
    sizes: tuple[int, int, int, int, int, int], starts: list[int], dtype: Any
):
    case = a_case(*sizes, starts, dtype=dtype)
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    first_row = jnp.ones((), jnp.int32)
    found = attend(case, None, first_row).astype(jnp.float32)
    np.testing.assert_allclose(found, in_float64(case, None, 1), atol=tolerance)


@pytest.mark.parametrize("window", [16, 13])
def test_a_ring_and_a_sink(window: int):
    """16 slots: all rows have gone round but the second; for three queries, a window of 13 leaves room."""
    T = 1 if window == 16 else 3
    case = a_case(4, T, 6, 3, 16, 24, [15, 0, 16, 1000])
    sinks_N = jnp.linspace(-3, 5, 6)
    found = attend(case, sinks_N, window=window)
    np.testing.assert_allclose(found, in_float64(case, sinks_N, 0, window), atol=2e-6)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_has_the_same_bits_alone_and_among_any_others(dtype: Any, window: int | None):
    case = a_case(3, 5, 4, 2, 300, 24, [0, 61, 290], dtype=dtype)
    together = np.asarray(attend(case, window=window).astype(jnp.float32))
    for b, t in np.ndindex(3, 5):
        one = Case(
            case.q_BTNH[b : b + 1, t : t + 1],
            *case[1:3],
            case.starts_B[b : b + 1] + t,
            jnp.ones(1, jnp.int32),
        )
        alone = attend(one, None, jnp.full((), b, jnp.int32), window=window)
        np.testing.assert_array_equal(alone[0, 0].astype(jnp.float32), together[b, t])
    # One head alone has no other queries to share widened keys with.
    single = case._replace(q_BTNH=case.q_BTNH[:, :1, ::2], lengths_B=jnp.ones(3, jnp.int32))
    found = attend(single, window=window).astype(jnp.float32)[:, 0]
    np.testing.assert_array_equal(found, together[:, 0, ::2])


@pytest.mark.parametrize("window", [None, 40])
def test_nothing_is_read_but_what_is_seen(window: int | None):
    case = a_case(2, 2, 4, 2, 300, 16, [70, 131])
    seen = np.zeros((3, 1, 300, 1), bool)
    for b, start in enumerate((70, 131)):
        seen[b, :, (0 if window is None else start - window + 1) : start + 2] = True
    hidden = case._replace(
        k_RKSH=jnp.where(seen, case.k_RKSH, jnp.nan), v_RKSH=jnp.where(seen, case.v_RKSH, jnp.nan)
    )
    np.testing.assert_array_equal(attend(hidden, window=window), attend(case, window=window))


def test_queries_that_are_none_are_zero_and_look_at_nothing():
    case = a_case(3, 2, 4, 2, 40, 16, [-1, 20, 7])
    case = case._replace(lengths_B=jnp.array([0, 1, 2], jnp.int32))
    hidden = case._replace(k_RKSH=case.k_RKSH.at[0].set(jnp.nan))
    found = np.asarray(attend(hidden, jnp.zeros(4)))
    assert not found[0].any()
    assert not found[1, 1].any()
    rest = Case(*(x[1:] for x in case))
    expected = in_float64(rest, np.zeros(4))
    np.testing.assert_allclose(found[1, 0], expected[0, 0], atol=2e-6)
    np.testing.assert_allclose(found[2], expected[1], atol=2e-6)


def test_a_long_context_is_split_by_position():
    """Splits are of 2,048 positions: the second query is the first that sees into the third split."""
    case = a_case(1, 2, 2, 1, 4100, 8, [4095])
    sinks_N = jnp.array([2.0, -1.0])
    found = attend(case, sinks_N)
    np.testing.assert_allclose(found, in_float64(case, sinks_N), atol=1e-6)
    second = case._replace(
        q_BTNH=case.q_BTNH[:, 1:], starts_B=case.starts_B + 1, lengths_B=jnp.ones(1, jnp.int32)
    )
    np.testing.assert_array_equal(attend(second, sinks_N)[:, 0], found[:, 1])


def test_weights_are_exponentials_to_the_last_bits():
    """Two keys, scores 0 and -s, values 0 and 1: what comes out is 1 / (1 + e^s)."""
    scores = np.linspace(0, 85, 1201, dtype=np.float32)
    B = len(scores)
    k_RKSH = jnp.stack([jnp.zeros(B), -jnp.asarray(scores)], 1)[:, None, :, None]
    v_RKSH = jnp.broadcast_to(jnp.array([0.0, 1.0])[None, None, :, None], (B, 1, 2, 1))
    ones = jnp.ones((B, 1, 1, 1))
    case = Case(ones, k_RKSH, v_RKSH, jnp.ones(B, jnp.int32), jnp.ones(B, jnp.int32))
    found = np.asarray(attend(case), np.float64).reshape(-1)
    expected = 1 / (1 + np.exp(scores.astype(np.float64)))
    assert (abs(found / expected - 1) < 4 * 2**-24 * 2).all()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number_stays_with_its_query(number: float):
    case = a_case(2, 2, 4, 2, 40, 16, [5, 20])
    clean, found = (
        np.array(attend(case._replace(q_BTNH=q)))
        for q in (case.q_BTNH, case.q_BTNH.at[1, 0, 2, 3].set(number))
    )
    assert np.isnan(found[1, 0, 2]).all()
    found[1, 0, 2] = clean[1, 0, 2]
    np.testing.assert_array_equal(found, clean)


# Queries a task begins in the middle of a token's heads (129 of 3), keys that fill no block, and several blocks.
PROMPTS = [((2, 43, 6, 2, 200, 64), [0, 131]), ((1, 129, 3, 3, 150, 20), [21])]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("sizes", "starts"), PROMPTS)
def test_the_queries_of_a_prompt_mix_the_values_up_to_their_own(
    sizes: tuple[int, int, int, int, int, int], starts: list[int], dtype: Any
):
    case = a_case(*sizes, starts, dtype=dtype)
    sinks_N = jnp.linspace(-3, 5, sizes[2])
    for sinks in (None, sinks_N):
        found = attend_prompt(case, sinks, jnp.ones((), jnp.int32)).astype(jnp.float32)
        tolerance = 4e-6 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(found, in_float64(case, sinks, 1), atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_prompt_s_query_has_the_same_bits_in_another_row_and_chunk(dtype: Any):
    case = a_case(2, 90, 4, 2, 200, 24, [70, 3], dtype=dtype)
    together = np.asarray(attend_prompt(case).astype(jnp.float32))
    for first, count in ((0, 17), (5, 40), (61, 29)):
        part = case.q_BTNH[:1, first : first + count]
        some = Case(part, *case[1:3], case.starts_B[:1] + first, jnp.full(1, count))
        found = attend_prompt(some, None, jnp.zeros((), jnp.int32)).astype(jnp.float32)
        np.testing.assert_array_equal(found[0], together[0, first : first + count])


def test_a_prompt_s_padding_may_reach_beyond_the_cache():
    case = a_case(1, 80, 4, 2, 100, 16, [90])
    within = case._replace(lengths_B=jnp.full(1, 10))
    found = np.asarray(attend_prompt(case))
    np.testing.assert_array_equal(found[:, :10], attend_prompt(within)[:, :10])
    last = case._replace(q_BTNH=case.q_BTNH[:, 10:], starts_B=jnp.array([99]))  # sees all there is
    every = jnp.concatenate([last.q_BTNH[:, :1]] * 70, 1)
    expected = attend_prompt(last._replace(q_BTNH=every, lengths_B=jnp.full(1, 1)))[:, 0]
    np.testing.assert_array_equal(found[:, 10], expected)


def test_a_prompt_reads_nothing_but_its_own_positions():
    case = a_case(2, 20, 4, 2, 300, 16, [70, 131])
    case = case._replace(lengths_B=jnp.array([20, 7], jnp.int32))
    seen = np.zeros((3, 1, 300, 1), bool)
    seen[0, :, :90] = seen[1, :, :138] = True
    hidden = case._replace(
        k_RKSH=jnp.where(seen, case.k_RKSH, jnp.nan), v_RKSH=jnp.where(seen, case.v_RKSH, jnp.nan)
    )
    found = np.asarray(attend_prompt(hidden))
    np.testing.assert_array_equal(found, attend_prompt(case))
    assert np.isfinite(found).all()
    assert not found[1, 7:].any()


@pytest.mark.slow
@pytest.mark.parametrize("isa", list(build.isas())[1:])
def test_every_instruction_set_gives_the_same_numbers(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLAXMILL_NATIVE_ISA", isa)
    jax.clear_caches()
    for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)):
        case = a_case(2, 3, 6, 2, 200, 28, [100, 3], dtype=dtype)
        found = attend(case, jnp.zeros(6)).astype(jnp.float32)
        np.testing.assert_allclose(found, in_float64(case, np.zeros(6)), atol=tolerance)
        case = a_case(1, 30, 6, 2, 200, 28, [100], dtype=dtype)
        found = attend_prompt(case, jnp.zeros(6)).astype(jnp.float32)
        np.testing.assert_allclose(found, in_float64(case, np.zeros(6)), atol=tolerance)
    jax.clear_caches()


def test_no_gradient_is_defined():
    case = a_case(1, 1, 2, 1, 8, 4, [3])
    with pytest.raises(NativeError, match="no gradient is defined"):
        jax.grad(lambda q: attend(case._replace(q_BTNH=q)).sum())(case.q_BTNH)
