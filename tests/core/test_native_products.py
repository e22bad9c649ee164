"""Native products against float64, and the bits of a row whoever is beside it."""

import functools
import hashlib
import os
import subprocess
import sys
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from core import layers, native
from core.errors import NativeError
from core.native import build
from core.quant import DynamicInt8, Int8, Transposed

# What x is, what the matrix is, which of its axes is contracted; rounded is x that becomes int8.
FORMS = [
    ("float32", "float32", 0),
    ("float32", "float32", 1),
    ("float32", "bfloat16", 0),
    ("bfloat16", "bfloat16", 0),
    ("bfloat16", "bfloat16", 1),
    ("bfloat16", "float32", 1),
    ("float32", "int8", 1),
    ("rounded", "int8", 1),
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not native.available():
        pytest.skip("no native kernels: no C++ compiler, or FLAXMILL_NATIVE=off")


def a_case(form: tuple[str, str, int], R: int, I: int, O: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng([R, I, O])
    x, matrix, axis = form
    shape = (I, O) if axis == 0 else (O, I)
    if matrix == "int8":
        values = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    else:
        values = jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(matrix)))
    rows = rng.standard_normal((R, I)).astype(jnp.dtype(x.replace("rounded", "float32")))
    return jnp.asarray(rows), values


@functools.partial(jax.jit, static_argnums=0)
def multiplied(form: tuple[str, str, int], x_RI: jax.Array, matrix: jax.Array) -> jax.Array:
    if form[0] == "rounded":
        return native.rounded_product(x_RI, matrix, jnp.ones(len(matrix)))
    return native.product(x_RI, matrix, axis=form[2])


def assert_is_the_product(form: tuple[str, str, int], x_RI: jax.Array, matrix: jax.Array) -> None:
    """Within 4 roundings of the sum of magnitudes, or what they may come to in a long sum; see `products.py`."""
    x, w = (np.asarray(a).astype(np.float64) for a in (x_RI, matrix))
    w = w if form[2] == 0 else w.T
    bound = max(4, 2 * np.sqrt(len(w))) * 2.0**-24 * (abs(x) @ abs(w))
    if form[0] == "rounded":
        bound += abs(x).max(1, keepdims=True) / 254 * abs(w).sum(0)
    y = np.asarray(multiplied(form, x_RI, matrix))
    assert y.shape == bound.shape
    assert (abs(y - x @ w) <= bound).all(), (abs(y - x @ w) / bound).max()


@forms
@pytest.mark.parametrize(
    ("R", "I", "O"), [(1, 1, 1), (3, 65, 50), (9, 33, 97), (70, 131, 49), (5, 256, 192)]
)
def test_products_are_those_of_float64(form: tuple[str, str, int], R: int, I: int, O: int):
    assert_is_the_product(form, *a_case(form, R, I, O))


@hypothesis.given(
    form=st.sampled_from(FORMS),
    R=st.integers(0, 20),
    I=st.integers(0, 150),
    O=st.integers(1, 120),
)
@hypothesis.example(form=FORMS[0], R=2, I=0, O=3)
@hypothesis.example(form=FORMS[1], R=0, I=3, O=2)
@hypothesis.settings(max_examples=20)
def test_any_sizes_will_do(form: tuple[str, str, int], R: int, I: int, O: int):
    hypothesis.assume(I > 0 or form[0] != "rounded")
    assert_is_the_product(form, *a_case(form, R, I, O))


@forms
def test_a_row_has_the_same_bits_alone_and_among_any_others(form: tuple[str, str, int]):
    x_RI, matrix = a_case(form, 70, 131, 101)
    every_RO = np.asarray(multiplied(form, x_RI, matrix))
    order = np.random.default_rng(1).permutation(70)
    np.testing.assert_array_equal(multiplied(form, x_RI[order], matrix), every_RO[order])
    for R in (1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 16, 23, 32, 47, 64):
        first = (7 * R) % (71 - R)
        some_RO = multiplied(form, x_RI[first : first + R], matrix)
        np.testing.assert_array_equal(some_RO, every_RO[first : first + R])


@pytest.mark.parametrize("form", [f for f in FORMS if f[2] == 1], ids=str)
def test_a_sum_that_goes_on_part_by_part_is_the_same(form: tuple[str, str, int]):
    x_RI, matrix = a_case(form, 11, 8213, 31)  # eight rows of x do not fit into the first cache
    assert_is_the_product(form, x_RI, matrix)
    every_RO = np.asarray(multiplied(form, x_RI, matrix))
    for row in (0, 5, 10):
        np.testing.assert_array_equal(
            multiplied(form, x_RI[row : row + 1], matrix)[0], every_RO[row]
        )


@pytest.mark.slow
@forms
def test_so_has_it_for_every_number_of_rows(form: tuple[str, str, int]):
    x_RI, matrix = a_case(form, 70, 133, 101)
    every_RO = np.asarray(multiplied(form, x_RI, matrix))
    for R in range(1, 70):
        np.testing.assert_array_equal(multiplied(form, x_RI[:R], matrix), every_RO[:R])


THREADS = """
import hashlib, numpy as np, test_native_products as t
for form in t.FORMS:
    print(hashlib.sha256(np.asarray(t.multiplied(form, *t.a_case(form, 9, 300, 500)))).hexdigest())
"""


@pytest.mark.slow
def test_threads_change_no_bit():
    here = [np.asarray(multiplied(form, *a_case(form, 9, 300, 500))) for form in FORMS]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
    for threads in ("1", "5"):
        environment = os.environ | {"NPROC": threads, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True
        )
        assert done.stdout.split() == [hashlib.sha256(y.tobytes()).hexdigest() for y in here], done


@pytest.mark.slow
@pytest.mark.parametrize("isa", list(build.isas())[1:])
def test_every_instruction_set_multiplies(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLAXMILL_NATIVE_ISA", isa)
    jax.clear_caches()
    for form in FORMS:
        for R, I, O in [(1, 133, 101), (3, 133, 101), (11, 133, 101), (11, 8213, 31)]:
            x_RI, matrix = a_case(form, R, I, O)
            assert_is_the_product(form, x_RI, matrix)
            alone_1O = multiplied(form, x_RI[R // 2 :][:1], matrix)
            np.testing.assert_array_equal(alone_1O[0], multiplied(form, x_RI, matrix)[R // 2])
    jax.clear_caches()


@forms
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_row(form: tuple[str, str, int], number: float):
    x_RI, matrix = a_case(form, 5, 70, 60)
    clean_RO = np.asarray(multiplied(form, x_RI, matrix))
    y_RO = np.asarray(multiplied(form, x_RI.at[2, 37].set(number), matrix))
    assert not np.isfinite(y_RO[2]).any()
    np.testing.assert_array_equal(np.delete(y_RO, 2, 0), np.delete(clean_RO, 2, 0))


@pytest.mark.parametrize("form", [f for f in FORMS if f[1] != "int8"], ids=str)
def test_a_weight_that_is_no_number_stays_in_its_output(form: tuple[str, str, int]):
    x_RI, matrix = a_case(form, 5, 70, 60)
    clean_RO = np.asarray(multiplied(form, x_RI, matrix))
    place = (37, 59) if form[2] == 0 else (59, 37)
    y_RO = np.asarray(multiplied(form, x_RI, matrix.at[place].set(jnp.nan)))
    assert np.isnan(y_RO[:, 59]).all()
    np.testing.assert_array_equal(y_RO[:, :59], clean_RO[:, :59])


@pytest.mark.parametrize(
    "kernel",
    [
        jnp.ones((6, 4, 2)),
        jnp.ones((6, 4, 2), jnp.bfloat16),
        Transposed(jnp.ones((4, 2, 6), jnp.bfloat16)),
        Int8(jnp.ones((4, 2, 6), jnp.int8), jnp.full((4, 2), 0.5)),
        DynamicInt8(jnp.ones((4, 2, 6), jnp.int8), jnp.full((4, 2), 0.5)),
    ],
    ids=["float32", "bfloat16", "transposed", "int8", "dynamic int8"],
)
def test_few_rows_are_multiplied_here_while_serving(kernel: Any):
    dtype = jnp.bfloat16 if jax.tree.leaves(kernel)[0].dtype == jnp.bfloat16 else jnp.float32
    x = jnp.arange(18, dtype=dtype).reshape(3, 6)
    apart, all_, many = (jnp.zeros((rows, 6), dtype) for rows in (3, native.ROWS, native.ROWS + 1))
    program = jax.make_jaxpr(lambda x: layers.linear(x, kernel, None))
    assert "ffi_call" not in str(program(x))
    with native.serving():
        assert "ffi_call" in str(program(apart))
        assert "ffi_call" in str(program(all_))
        assert "ffi_call" not in str(program(many))
        served = jax.jit(lambda x: layers.linear(x, kernel, None))(x)
    expected = jax.jit(lambda x: layers.linear(x, kernel, None))(x)
    assert served.dtype == expected.dtype
    np.testing.assert_allclose(*(y.astype(jnp.float32) for y in (served, expected)), rtol=1e-2)


def test_rounded_rows_are_those_of_the_xla_form():
    x_RI, values_OI = a_case(("rounded", "int8", 1), 9, 300, 100)
    x_RI = x_RI.at[3].set(0)
    kernel = DynamicInt8(values_OI, jnp.linspace(0.001, 0.02, 100))
    expected = layers.linear(x_RI, kernel, None)
    with native.serving():
        found = layers.linear(x_RI, kernel, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_weights_are_read_where_they_lie_in_a_loop_too(dtype: Any, axis: int):
    """Whatever copied or turned or widened a matrix would need as much room beside it."""
    matrices = jnp.ones((512, 512), dtype), jnp.zeros((512, 512), dtype)

    @jax.jit
    def steps(x_RI: jax.Array, matrices: tuple[jax.Array, ...]) -> jax.Array:
        def step(_: Any, x_RI: jax.Array) -> jax.Array:
            for matrix in matrices:
                x_RI = layers.product(x_RI, matrix, axis=axis).astype(dtype)
            return x_RI

        with native.serving():
            return jax.lax.fori_loop(0, 3, step, x_RI)

    memory = steps.lower(jnp.ones((2, 512), dtype), matrices).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < matrices[0].nbytes / 2


def test_no_gradient_is_defined():
    x_RI, matrix = a_case(FORMS[0], 2, 6, 8)
    with native.serving(), pytest.raises(NativeError, match=r"no gradient is defined.*product"):
        jax.grad(lambda x: layers.linear(x, matrix, None).sum())(x_RI)
