"""A model in another precision: what is rounded, by how much, what is copied, and that rows stay apart."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import reference
import tiny
import tiny_gpt_oss
from core import checkpoint, models, precision
from core.attention import attend_cache
from core.config import ConfigError
from core.engine import Completion, Engine, Request
from core.errors import CheckpointError
from core.kv_cache import Layer, append, numbers
from core.layers import linear, unembed
from core.models.modules import rows
from core.precision import prepare
from core.quant import DynamicInt8, Transposed, round_rows
from core.sampling import Sampling


def flatten(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep=".")


def rounded(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of numbers in int8 by the formula, in float64, and their scales."""
    x = np.asarray(x, np.float64)
    scales = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / np.where(scales == 0, 1, scales)), scales


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- products


def test_rows_are_rounded_each_with_its_own_scale():
    x = random(7, 40) * np.array([[1, 1e-3, 0, 1e9, 5, 1e-30, 2]], np.float32).T
    values, scales = jax.jit(round_rows)(jnp.asarray(x))
    expected, expected_scales = rounded(x)
    assert np.abs(np.asarray(values) - expected).max() <= 1  # ties fall to either side
    assert (np.asarray(values) == expected).mean() > 0.99
    assert np.abs(np.asarray(values)).max(-1).tolist() == [127, 127, 0, 127, 127, 127, 127]
    np.testing.assert_allclose(scales, np.where(expected_scales == 0, 1, expected_scales), 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_gives_nothing_finite_and_spoils_no_other(bad: float):
    kernel = DynamicInt8(jnp.ones((3, 4), jnp.int8), jnp.ones(3))
    x = np.ones((2, 4), np.float32)
    x[1, 2] = bad
    y = np.asarray(linear(jnp.asarray(x), kernel, None))
    assert not np.isfinite(y[1]).any()
    np.testing.assert_allclose(y[0], 4, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_product_in_int8_is_that_of_the_rounded_numbers(count: int):
    """Whole numbers are added up exactly, and then scaled."""
    rng = np.random.default_rng(1)
    kernel = DynamicInt8(
        jnp.asarray(rng.integers(-127, 128, (3, 5, 2, 70), np.int8)),
        jnp.asarray(rng.uniform(0.5, 2, (3, 5)), jnp.float32),
    )
    x = random(count, 2, 70)
    y = linear(jnp.asarray(x), kernel, None, inputs=2)
    values, scales = (
        np.asarray(z, np.float64) for z in round_rows(jnp.asarray(x.reshape(count, 140)))
    )
    sums = values @ np.asarray(kernel.values_OI, np.float64).reshape(15, 140).T
    expected = sums * scales * np.asarray(kernel.scales_O, np.float64).reshape(1, 15)
    np.testing.assert_allclose(np.asarray(y).reshape(count, 15), expected, rtol=4e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_kernel_is_the_same_map(dtype: Any):
    kernel = jnp.asarray(random(2, 7, 3, 5, seed=1), dtype)
    x, bias = jnp.asarray(random(4, 2, 7), dtype), jnp.asarray(random(3, 5, seed=2), dtype)
    turned = Transposed(jnp.moveaxis(kernel, (0, 1), (-2, -1)))
    ours = linear(x, turned, bias, inputs=2)
    assert ours.dtype == dtype
    assert ours.shape == (4, 3, 5)
    theirs = linear(x, kernel, bias, inputs=2)
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), np.asarray(theirs, np.float64), atol=1e-5, rtol=2.0**-7
    )


def test_a_table_in_int8_gives_its_rows_and_nan_for_an_id_that_it_has_not():
    table = DynamicInt8(jnp.asarray([[1, -2], [3, 127]], jnp.int8), jnp.asarray([0.5, 2]))
    ids = jnp.asarray([[1, 0, 2, -1]])
    found = np.asarray(jax.jit(rows)(table, ids))[0]
    assert found[:2].tolist() == [[6, 254], [0.5, -1]]
    assert np.isnan(found[2:]).all()
    assert unembed(jnp.ones((1, 3, 2)), table).shape == (1, 3, 2)


def test_a_narrow_cache_is_read_without_a_wide_copy():
    """XLA would make one before the loop over its blocks, which takes longer than all the rest."""
    layer = Layer(*(jnp.zeros((3, 2, 2048, 16), jnp.uint16) for _ in range(2)))
    q_BTNH, positions_BT = jnp.zeros((3, 1, 4, 16), jnp.bfloat16), jnp.zeros((3, 1), jnp.int32)
    attend = jax.jit(functools.partial(attend_cache, scale=1.0))
    ones_B = jnp.ones(3, jnp.int32)
    lowered = attend.lower(q_BTNH, layer, positions_BT=positions_BT, lengths_B=ones_B)
    compiled = lowered.compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < layer.k_RKSH.nbytes / 2


def test_a_narrow_cache_is_written_without_a_wide_copy():
    """XLA would make two a layer and step, one there and one back: most of the time of 32 rows."""
    layer = Layer(*(jnp.zeros((3, 2, 2048, 16), jnp.uint16) for _ in range(2)))
    k_BTNH, places_B = jnp.ones((3, 2, 1, 16), jnp.bfloat16), jnp.arange(3)
    write = jax.jit(append, donate_argnums=0)
    lowered = write.lower(layer, k_BTNH, -k_BTNH, places_B[:, None], jnp.ones(3, jnp.int32))
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < layer.k_RKSH.nbytes / 2
    k_RKSH, v_RKSH, _ = write(layer, k_BTNH, -k_BTNH, places_B[:, None], jnp.ones(3, jnp.int32))
    assert numbers(k_RKSH).sum() == 3 * 2 * 16
    assert (numbers(v_RKSH)[2, :, 2] == -1).all()


def test_a_table_in_int8_is_read_in_a_loop_without_a_wide_copy():
    table = DynamicInt8(jnp.zeros((5000, 64), jnp.int8), jnp.zeros(5000))

    @jax.jit
    def walk(table: DynamicInt8) -> jax.Array:
        return jax.lax.fori_loop(
            0, 9, lambda i, sum: sum + rows(table, i[None, None])[0, 0], jnp.zeros(64)
        )

    analysis = walk.lower(table).compile().memory_analysis()
    assert analysis is not None
    temporaries = analysis.temp_size_in_bytes
    assert temporaries < table.values_OI.nbytes


# ---- parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.ModelFolder:
    path = tmp_path_factory.mktemp("models") / "model"
    model = models.build(tiny.config(tie_word_embeddings=False))
    checkpoint.save(path, model.config, tiny.params(model))
    return checkpoint.open(path)


@pytest.mark.parametrize("wanted", [None, "float32"])
def test_what_is_in_a_precision_already_is_not_copied(folder, wanted: str | None):
    params = folder.params()
    prepared = prepare(models.build(folder.config), params, wanted)
    before, after = flatten(params), flatten(prepared.params)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert (prepared.dtype, prepared.cache_dtype) == (jnp.float32, jnp.float32)


def test_a_bfloat16_folder_stays_as_it_is(folder):
    narrow = folder.params(jnp.bfloat16)
    prepared = prepare(models.build(folder.config), narrow, "bfloat16")
    assert all(x is flatten(narrow)[name] for name, x in flatten(prepared.params).items())


def test_bfloat16_narrows_kernels_and_tables_and_nothing_else(folder):
    dense = flatten(folder.params())
    prepared = prepare(models.build(folder.config), folder.params(), "bfloat16")
    assert (prepared.dtype, prepared.cache_dtype) == (jnp.bfloat16, jnp.bfloat16)
    for name, x in flatten(prepared.params).items():
        word = folder.config.tensors()[name]
        if name.endswith((".scale", ".bias")):
            assert np.array_equal(x, dense[name])
            continue
        expected = dense[name].astype(jnp.bfloat16)
        if isinstance(x, Transposed):
            inputs = {"D3NH": 1, "NHD": 2, "DF": 1, "FD": 1}[word]
            expected = jnp.moveaxis(expected, range(inputs), range(-inputs, 0))
            x = x.kernel_OI
        else:
            assert word in ("VD", "PD")
        assert x.dtype == jnp.bfloat16
        assert np.array_equal(x, expected)


def test_int8_is_what_conversion_stores(folder, tmp_path: Path):
    """And embeddings and head besides, a row a channel."""
    convert = pytest.importorskip("convert.int8")
    config, dense = folder.config, flatten(folder.params())
    prepared = flatten(prepare(models.build(config), folder.params(), "int8").params)
    kernels = {"D3NH": 1, "NHD": 2, "DF": 1, "FD": 1, "VD": 0}
    seen = set()
    for name, word in config.tensors().items():
        x = prepared[name]
        if word not in kernels:
            assert x is dense[name] or np.array_equal(x, dense[name])
            continue
        seen.add(word)
        assert isinstance(x, DynamicInt8)
        inputs = kernels[word]
        turned = np.moveaxis(np.asarray(dense[name]), range(inputs), range(-inputs, 0))
        outputs = turned.ndim - (inputs or 1)
        values = np.concatenate([*convert.values(turned, outputs, name)]).reshape(turned.shape)
        scales = np.concatenate([*convert.scales(turned, outputs, name)])
        assert np.array_equal(x.values_OI, values)
        assert np.array_equal(x.scales_O, scales.reshape(turned.shape[:outputs]))
    assert seen == kernels.keys()


def logits_of(prepared: precision.Prepared, tokens_BT: jax.Array) -> np.ndarray:
    apply = jax.jit(functools.partial(prepared.model.apply, dtype=prepared.dtype))
    return np.asarray(apply(prepared.params, tokens_BT))


@pytest.mark.parametrize(
    ("wanted", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03), ("int8", 0.03)]
)
def test_an_int8_folder_opens_in_every_precision(wanted: str, tolerance: float):
    """In int8 without a copy of its kernels, in the others as the model of the decoded ones."""
    config = tiny.config(quantization="int8", n_layer=1)
    model = models.build(config)
    params, tokens_BT = model.init(jax.random.key(0)), tiny.tokens(config, 2, 9)
    expected = logits_of(prepare(model, params, None), tokens_BT)
    prepared = prepare(model, params, wanted)
    assert prepared.model.config == config.dense
    error = np.abs(logits_of(prepared, tokens_BT) - expected).max() / np.abs(expected).max()
    assert error <= tolerance
    kernel = flatten(prepared.params)["blocks.0.mlp.up.kernel"]
    if wanted == "int8":
        assert kernel.values_OI is flatten(params)["blocks.0.mlp.up.kernel.values"]
    else:
        assert isinstance(kernel, Transposed) == (wanted == "bfloat16")


@pytest.mark.parametrize(
    ("wanted", "tolerance"), [("float32", 0), ("bfloat16", 0.05), ("int8", 0.05)]
)
def test_packed_experts_stay_packed_and_routers_as_they_are(wanted: str, tolerance: float):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    config = tiny_gpt_oss.config(quantization="mxfp4", layer_types=None, **sizes)
    model = models.build(config)
    params = tiny_gpt_oss.params(tiny_gpt_oss.weights(config, amplify=1))
    tokens_BT = tiny.tokens(config, 2, 9)
    expected = logits_of(prepare(model, params, None), tokens_BT)
    prepared = prepare(model, params, wanted)
    before, after = flatten(params), flatten(prepared.params)
    assert before.keys() == after.keys()
    for name in (n for n in before if ".moe." in n or n.endswith(".sinks")):
        assert after[name] is before[name]
    # The mean, because where a router was near a tie another expert is chosen.
    error = np.abs(logits_of(prepared, tokens_BT) - expected).mean() / np.abs(expected).mean()
    assert error <= tolerance


def test_what_cannot_be_is_an_error(model, params):
    with pytest.raises(ConfigError, match="'fp8' is not one of float32, bfloat16, int8"):
        prepare(model, params, "fp8")
    with pytest.raises(ConfigError, match="'fp8'"):
        Engine(model, params, precision="fp8")
    with pytest.raises(ValueError, match="have a precision already"):
        prepare(*prepare(model, params, "int8")[:2], "float32")
    broken = flatten(params) | {"blocks.1.mlp.up.kernel": jnp.full((24, 96), jnp.inf)}
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.mlp\.up\.kernel: a weight is not finite"
    ):
        prepare(model, traverse_util.unflatten_dict(broken, sep="."), "int8")


def test_a_sum_that_an_int32_might_not_hold_is_refused(model, params, monkeypatch):
    monkeypatch.setattr(precision, "_MOST_INPUTS", 95)
    with pytest.raises(ConfigError, match=r"mlp\.down\.kernel sums 96 products; .* 95 at most"):
        prepare(model, params, "int8")
    assert 127**2 * 133_144 < 2**31 <= 127**2 * 133_145  # the number itself


# ---- the engine


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def narrow(request: pytest.FixtureRequest) -> Engine:
    model = models.build(tiny.config(n_layer=1))
    params = tiny.params(model, amplify=25)
    return Engine(model, params, slots=5, top_logprobs=2, precision=request.param)


def asked() -> list[Request]:
    return [
        Request(
            np.asarray(tiny.tokens(tiny.config(), 3 + i, seed=i)).tolist(),
            Sampling(temperature=i % 2, max_new_tokens=4 + i, logprobs=2, seed=i),
            id=f"row {i}",
        )
        for i in range(7)
    ]


def complete(engine: Engine, requests: list[Request]) -> list[Completion]:
    results = engine.complete(requests)
    assert all(isinstance(result, Completion) for result in results), results
    return [result for result in results if isinstance(result, Completion)]


def test_in_every_precision_a_row_has_its_own_bits_wherever_it_is(narrow: Engine):
    requests = asked()
    alone = [complete(narrow, [request])[0] for request in requests]
    assert len({completion.tokens for completion in alone}) == len(alone)
    for order in (requests, requests[::-1], requests[::2] + requests[1::2]):
        for request, completion in zip(order, complete(narrow, order), strict=True):
            assert completion == alone[requests.index(request)]


def test_an_engine_s_log_probabilities_are_near_the_float32_model_s(narrow: Engine):
    model = models.build(tiny.config(n_layer=1))
    params = tiny.params(model, amplify=25)
    for completion in complete(narrow, asked()[:3]):
        tokens = [*completion.prompt_tokens, *completion.tokens]
        exact_TV = reference.log_softmax(reference.logits(model.config, params, [tokens[:-1]])[0])
        for t, score in enumerate(completion.logprobs or (), start=len(completion.prompt_tokens)):
            spread = exact_TV[t - 1].std()
            assert abs(score.logprob - exact_TV[t - 1, score.token]) < 0.1 * spread


def test_a_cache_is_as_narrow_as_the_precision_says(narrow: Engine):
    complete(narrow, asked()[:1])
    assert narrow._state is not None
    assert {x.dtype.itemsize for x in narrow._state.cache.k_RKSH} == {2}


def test_generate_takes_a_precision(folder):
    flags = ["--prompt_tokens=5,6,7", "--json", "--temperature=0", "--max_new_tokens=2"]
    command = [sys.executable, "-m", "core.generate", f"--model={folder.path}", *flags]
    asked = [*command, "--precision=int8", "--logprobs=0"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    exact_V = reference.log_softmax(
        reference.logits(folder.config, folder.params(), [[5, 6, 7]])[0, -1]
    )
    moved = said["logprobs"][0]["logprob"] - exact_V[said["tokens"][0]]
    assert 1e-5 < abs(moved) < 0.05  # float32 moves by 1e-6
    wrong = subprocess.run([*command, "--precision=fp8"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "should be one of <float32|bfloat16|int8>" in wrong.stderr
