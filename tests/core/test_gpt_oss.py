"""GPT-OSS against an independent float64 NumPy model, its cache and its packed experts against itself."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import tiny_gpt_oss as tiny
from core import rotary
from core.config import PRESETS, GptOssConfig
from core.engine import Completion, Engine, Request
from core.kv_cache import KVCache
from core.models import Model
from core.quant import MXFP4
from core.sampling import Sampling

# Two float32 summation orders of these sizes differ by 2e-5 here; the smallest mistake below moves a logit by 3e-3.
ATOL = 2e-4
T = 47  # more than two windows, and not a multiple of one

TOGETHER = [
    ("published",),
    ("truncate", "full first", "wide limit", "tied"),
    ("no yarn", "all full"),
]
LOGITS_OF = [
    *(
        pytest.param(
            functools.reduce(operator.or_, (tiny.VARIANTS[name] for name in names)),
            id=", ".join(names),
        )
        for names in TOGETHER
    ),
    *(
        pytest.param(variant, id=f"{name} alone", marks=pytest.mark.slow)
        for name, variant in tiny.VARIANTS.items()
    ),
]


def tokens(config: Any, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, config.vocab_size, shape), jnp.int32)


def assert_logits(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=1e-4)
    np.testing.assert_array_equal(np.argmax(found, -1), np.argmax(expected, -1))


@pytest.fixture(scope="module")
def model() -> Model:
    return core.build(tiny.config())


@pytest.fixture(scope="module")
def flat(model: Model) -> dict[str, np.ndarray]:
    assert isinstance(model.config, GptOssConfig)
    return tiny.weights(model.config)


@pytest.fixture(scope="module")
def found_BTV(model: Model, flat: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(tiny.params(flat), tokens(model.config, 1, T)))


@pytest.mark.parametrize("variant", LOGITS_OF)
def test_logits_are_the_numpy_reference_s(variant: dict[str, Any]):
    config = tiny.config(**variant)
    flat, tokens_BT = tiny.weights(config), tokens(config, 1, T)
    found = jax.jit(core.build(config).apply)(tiny.params(flat), tokens_BT)
    expected = tiny.logits(config, flat, tokens_BT)
    assert_logits(found, expected)
    assert expected.std() > 1


@pytest.mark.parametrize(
    "mistake",
    [
        "no sinks",
        "scaled sinks",
        "odd layers slide",
        "heads",
        "interleaved",
        "concentration",
        "truncate",
        "softmax before top-k",
        "halves",
        "alpha",
        "no one",
        "no clamp",
        "gate from below",
        "no bias",
    ],
)
def test_a_wrong_formula_exceeds_the_tolerance(model: Model, flat, found_BTV, mistake: str):
    wrong_BTV = tiny.logits(model.config, flat, tokens(model.config, 1, T), **{mistake: True})  # pyright: ignore[reportArgumentType]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logits(found_BTV, wrong_BTV)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_exceeds_the_tolerance(model: Model, flat, found_BTV, off: int):
    wrong_BTV = tiny.logits(model.config, flat, tokens(model.config, 1, T), window=off)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logits(found_BTV, wrong_BTV)


def test_the_published_frequencies_are_the_golden_ones():
    config = PRESETS["gpt-oss-20b"]
    assert isinstance(config, GptOssConfig)
    angles, concentration = rotary.frequencies(config)
    golden = {0: 1.0, 1: 0.6890443, 7: 7.374457e-2, 8: 5.081327e-2, 9: 3.170570e-2, 12: 6.794959e-3}
    golden |= {16: 4.564839e-4, 17: 1.293187e-4, 18: 3.830881e-5, 31: 3.023511e-7}
    np.testing.assert_allclose(angles[list(golden)], list(golden.values()), rtol=2e-7)
    assert concentration == pytest.approx(1.3465735902799727, abs=1e-15)


@pytest.mark.slow
def test_extending_a_cache_gives_the_logits_of_the_whole_at_every_position(model, flat, found_BTV):
    """A prompt of 23, longer than the window, and its padding; then token by token."""
    tokens_BT = tokens(model.config, 1, T)
    params, extend = tiny.params(flat), jax.jit(model.extend)
    prompt_BT = tokens_BT[:, :32].at[:, 23:].set(1)
    cache = KVCache.zeros(model.config, 1, 64)
    logits_BTV, cache = extend(
        params, prompt_BT, jnp.arange(32)[None], cache, lengths_B=jnp.array([23])
    )
    np.testing.assert_allclose(logits_BTV[:, :23], found_BTV[:, :23], atol=ATOL)
    for t in range(23, T):
        logits_BTV, cache = extend(params, tokens_BT[:, t : t + 1], jnp.array([[t]]), cache)
        np.testing.assert_allclose(logits_BTV[:, 0], found_BTV[:, t], atol=ATOL)


def test_packed_experts_are_the_unpacked_ones():
    config = tiny.packed_config()
    flat = tiny.weights(config)
    tokens_BT = tokens(config, 1, 29)
    dense = tiny.unpacked(config, flat)
    found = jax.jit(core.build(config).apply)(tiny.params(flat), tokens_BT)
    assert_logits(found, tiny.logits(config.dense, dense, tokens_BT))


def test_every_code_under_every_scale_is_exact():
    """The 16 codes in order (low half first) under every scale but 255, which is no number."""
    row = np.frombuffer(bytes.fromhex("1032547698badcfe") * 2, np.uint8)
    scales = np.arange(255, dtype=np.uint8)[:, None]
    blocks = np.broadcast_to(row, (255, 1, 16))
    exact = tiny.decode(blocks, scales)
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32)
    expected[np.abs(expected) < 2.0**-126] = 0  # subnormal
    for dtype in (jnp.float32, jnp.bfloat16):
        found = np.asarray(MXFP4(jnp.asarray(blocks), jnp.asarray(scales)).decode(dtype))
        np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_kernels_that_a_jitted_function_closes_over_are_decoded_as_arguments_are():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 2, 16), np.uint8)
    kernel = MXFP4(jnp.asarray(blocks), jnp.asarray(rng.integers(110, 140, (2, 3, 2), np.uint8)))
    argument = jax.jit(lambda kernel: kernel.decode(jnp.float32))(kernel)
    np.testing.assert_array_equal(jax.jit(lambda: kernel.decode(jnp.float32))(), argument)
    expert = jax.jit(lambda e: kernel.expert(e).decode(jnp.float32))(1)
    np.testing.assert_array_equal(expert, argument[1])


def test_the_engine_continues_it_greedily_and_alone_as_among_others():
    config = tiny.packed_config(num_hidden_layers=2)
    model, params = core.build(config), tiny.params(tiny.weights(config))
    engine = Engine(model, params, slots=3)
    prompts = [tokens(config, 9).tolist(), tokens(config, 13).tolist(), [7]]
    requests = [Request(p, Sampling(temperature=0, max_new_tokens=30)) for p in prompts]
    together = engine.complete(requests)
    assert together == [engine.complete([request])[0] for request in requests]
    first = together[0]
    assert isinstance(first, Completion)
    whole = [*prompts[0], *first.tokens]
    logits_TV = np.asarray(jax.jit(model.apply)(params, jnp.asarray([whole])))[0]
    assert len(set(first.tokens)) > 5
    assert logits_TV[8:-1].argmax(-1).tolist() == list(first.tokens)


@pytest.mark.slow
def test_packed_experts_continue_as_unpacked_ones_do():
    config = tiny.packed_config()
    flat = tiny.weights(config)
    unpacked = tiny.params(tiny.unpacked(config, flat))
    prompt, greedy = tokens(config, 9).tolist(), Sampling(temperature=0, max_new_tokens=40)
    packed, dense = (
        Engine(core.build(c), params, slots=1).complete([Request(prompt, greedy)])[0]
        for c, params in ((config, tiny.params(flat)), (config.dense, unpacked))
    )
    assert isinstance(packed, Completion)
    assert packed == dense
    assert len(set(packed.tokens)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_fresh_parameters_are_those_of_the_configuration(packed: bool):
    make = tiny.packed_config if packed else tiny.config
    config = make(num_hidden_layers=1, layer_types=None)
    params = core.build(config).init(jax.random.key(0))
    flat = {
        ".".join(key.key for key in path): leaf  # pyright: ignore[reportAttributeAccessIssue]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert flat.keys() == config.tensors().keys()
    kernel = params["blocks"]["0"]["moe"]["down"]["kernel"]
    if packed:
        kernel = MXFP4(
            **{f"{n}_{a}": kernel[n] for n, a in (("blocks", "EOQY"), ("scales", "EOQ"))}
        )
        kernel = kernel.decode(jnp.float32)
    assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.5)


def test_the_gradient_of_the_sinks_and_the_router_is_that_of_finite_differences(model, flat):
    tokens_BT = tokens(model.config, 1, 22)
    batch = core.Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
    cross_entropy = functools.partial(core.loss, auxiliary=False)
    gradients = jax.jit(jax.grad(cross_entropy), static_argnums=1)(tiny.params(flat), model, batch)
    targets = np.asarray(batch.targets_BT)[0]

    def loss(changed: dict[str, np.ndarray]) -> float:
        logits_TV = tiny.logits(model.config, changed, batch.inputs_BT)[0]
        chosen = logits_TV[np.arange(len(targets)), targets]
        return float((np.log(np.exp(logits_TV).sum(-1)) - chosen).mean())

    for name, place in {
        "blocks.0.attn.sinks": (3,),
        "blocks.1.attn.sinks": (5,),
        "blocks.0.moe.router.kernel": (4, 2),
        "blocks.2.moe.gate_up.kernel": (2, 5, 7, 1),
        "blocks.1.moe.down.kernel": (0, 3, 4),
        "blocks.2.attn.k.kernel": (8, 1, 4),
    }.items():
        step = 1e-5
        up, down = (flat | {name: flat[name].astype(np.float64)} for _ in range(2))
        up[name][place] += step
        down[name] = down[name].copy()
        down[name][place] -= step
        expected = (loss(up) - loss(down)) / (2 * step)
        node: Any = gradients
        for part in name.split("."):
            node = node[part]
        np.testing.assert_allclose(node[place], expected, rtol=2e-3, atol=2e-6, err_msg=name)
