"""GPT-2 with kernels in int8: it is the model of its own decoded kernels, in every form of the product."""

import functools
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import tiny
from core import checkpoint, models
from core.config import ConfigError, GPT2Config
from core.engine import Completion, Engine, Request
from core.layers import linear
from core.quant import Int8
from core.sampling import Sampling


def random_kernel(outputs: tuple[int, ...], inputs: tuple[int, ...], seed: int = 0) -> Int8:
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, outputs + inputs, np.int8)
    scales = rng.uniform(0.5, 2, outputs).astype(np.float32) / 73
    return Int8(jnp.asarray(values), jnp.asarray(scales))


def rounded(flat: dict[str, jax.Array], config: GPT2Config) -> dict[str, jax.Array]:
    """The parameters of an int8 model, made of a dense one's by the formula."""
    result: dict[str, jax.Array] = {}
    for name, word in config.tensors().items():
        if not name.endswith((".values", ".scales")):
            result[name] = flat[name]
            continue
        dense = np.asarray(flat[name.rpartition(".")[0]], np.float64)
        outputs = len(config.tensors()[name.rpartition(".")[0] + ".scales"])
        inputs = dense.ndim - outputs
        turned = np.moveaxis(dense, range(inputs), range(-inputs, 0))
        scales = np.abs(turned).max(axis=tuple(range(outputs, dense.ndim)), keepdims=True) / 127
        scales = scales.astype(np.float32)
        values = np.rint(turned / scales).astype(np.int8)
        result[name] = jnp.asarray(values if name.endswith(".values") else scales.squeeze())
        assert len(word) == result[name].ndim
    return result


def dense_again(flat: dict[str, jax.Array], config: GPT2Config) -> dict[str, Any]:
    """The parameters of the dense model that an int8 one stands for."""
    result: dict[str, jax.Array] = {}
    for name in config.dense.tensors():
        if name in flat:
            result[name] = flat[name]
            continue
        kernel = Int8(flat[f"{name}.values"], flat[f"{name}.scales"])
        outputs = kernel.scales_O.ndim
        inputs = kernel.values_OI.ndim - outputs
        result[name] = jnp.moveaxis(kernel.decode(), range(-inputs, 0), range(inputs))
    return traverse_util.unflatten_dict(result, sep=".")


def pair(**variant: Any) -> tuple[models.Model, Any, models.Model, Any]:
    """An int8 model and the dense one of its decoded kernels."""
    config = tiny.config(quantization="int8", **variant)
    dense = models.build(config.dense)
    original: dict[str, Any] = traverse_util.flatten_dict(tiny.params(dense), sep=".")
    flat = rounded(original, config)
    params = traverse_util.unflatten_dict(flat, sep=".")
    return models.build(config), params, dense, dense_again(flat, config)


def test_decoding_is_the_product_rounded_once():
    kernel = random_kernel((5, 7), (3, 11))
    values, scales = (np.asarray(x, np.float64) for x in kernel)
    exact = values * scales[:, :, None, None]
    assert np.array_equal(np.asarray(kernel.decode()), exact.astype(np.float32))
    narrow = jnp.asarray(exact.astype(np.float32)).astype(jnp.bfloat16)
    assert (kernel.decode(jnp.bfloat16) == narrow).all()


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow), 8, 70])
@pytest.mark.parametrize(
    "outputs", [(3, 4, 11), (64,), (5,), pytest.param((2, 64), marks=pytest.mark.slow)]
)
def test_a_product_is_that_with_the_decoded_kernel(rows: int, outputs: tuple[int, ...]):
    kernel = random_kernel(outputs, (3, 13))
    rng = np.random.default_rng(1)
    decoded = np.asarray(kernel.decode(), np.float64).reshape(-1, 39)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-8)):
        x = jnp.asarray(rng.standard_normal((rows, 3, 13)), dtype)
        y = jax.jit(functools.partial(linear, bias=None, inputs=2))(x, kernel)
        exact = np.asarray(x, np.float64).reshape(rows, 39) @ decoded.T
        assert y.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(y, np.float64), exact.reshape(rows, *outputs), atol=2e-5, rtol=tolerance
        )


def test_a_bias_is_added_to_the_product():
    kernel = random_kernel((3, 4), (7,))
    x, bias = jnp.ones((2, 7)), jnp.arange(12.0).reshape(3, 4)
    difference = linear(x, kernel, bias) - linear(x, kernel, None)
    np.testing.assert_allclose(difference, np.broadcast_to(bias, (2, 3, 4)), atol=1e-5)


@pytest.mark.parametrize("variants", [("gelu_new",), ("n_inner", "untied", "no_bias")])
def test_logits_are_those_of_the_decoded_kernels(variants: tuple[str, ...]):
    variant = functools.reduce(operator.or_, (tiny.VARIANTS[name] for name in variants))
    model, params, dense, dense_params = pair(**variant)
    tokens_BT = tiny.tokens(model.config, 3, 17)
    ours, theirs = jax.jit(model.apply), jax.jit(dense.apply)
    expected_BTV = theirs(dense_params, tokens_BT)
    np.testing.assert_allclose(ours(params, tokens_BT), expected_BTV, atol=2e-5, rtol=1e-5)


def test_greedy_tokens_are_those_of_the_decoded_kernels():
    model, params, dense, dense_params = pair()
    prompts = [np.asarray(tiny.tokens(model.config, n, seed=n)).tolist() for n in (3, 9)]
    requests = [Request(p, Sampling(temperature=0, max_new_tokens=40)) for p in prompts]
    apply = jax.jit(dense.apply)
    for prompt, found in zip(
        prompts, Engine(model, params, slots=2).complete(requests), strict=True
    ):
        assert isinstance(found, Completion)
        assert len(found.tokens) == 40
        whole = [*prompt, *found.tokens, *range(20)][: model.config.context_length]
        likeliest_T = apply(dense_params, jnp.asarray([whole]))[0].argmax(-1)
        assert likeliest_T[len(prompt) - 1 :][:40].tolist() == list(found.tokens)


def test_the_rounded_model_says_nearly_the_same():
    """KL divergence from the float32 model, in nats a token, on weights with which logits depend on the prompt."""
    model, params, dense, _ = pair()
    tokens_BT = tiny.tokens(model.config, 8, 40)
    pairs = ((dense, tiny.params(dense)), (model, params))
    logits = [jax.jit(m.apply)(weights, tokens_BT) for m, weights in pairs]
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in logits)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    print(f"KL {kl:.2e}")
    assert 0 < kl < 1e-4


def test_a_new_model_is_the_size_of_a_dense_one():
    config = tiny.config(quantization="int8", n_layer=1)
    params = models.build(config).init(jax.random.key(0))
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    assert flat.keys() == config.tensors().keys()
    again: dict[str, Any] = traverse_util.flatten_dict(dense_again(flat, config), sep=".")
    assert np.isclose(again["blocks.0.attn.qkv.kernel"].std(), 0.02, rtol=0.05)
    assert config.parameter_count == config.dense.parameter_count


def test_activations_have_the_gradient_of_the_decoded_kernel_and_integers_have_none():
    kernel = random_kernel((70,), (12,))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 12)), jnp.float32)
    ours = jax.jit(jax.grad(lambda x: jnp.sin(linear(x, kernel, None)).sum()))(x)
    theirs = jax.jit(jax.grad(lambda x: jnp.sin(linear(x, kernel.decode().T, None)).sum()))(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda kernel: linear(x, kernel, None).sum())(kernel)


def test_a_folder_keeps_it_and_opens_without_a_copy(tmp_path: Path):
    model, params, _, _ = pair()
    checkpoint.save(tmp_path / "model", model.config, params)
    folder = checkpoint.open(tmp_path / "model")
    assert folder.config == model.config
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    assert all(np.array_equal(x, flat[name]) for name, x in folder.tensors.items())
    narrow: dict[str, Any] = traverse_util.flatten_dict(folder.params(jnp.bfloat16), sep=".")
    kinds = {name.rpartition(".")[2]: x.dtype.name for name, x in narrow.items()}
    assert (kinds["values"], kinds["scales"], kinds["bias"]) == ("int8", "float32", "bfloat16")
    aligned = [n for n, x in folder.tensors.items() if x.nbytes % checkpoint.ALIGNMENT == 0]
    assert any(name.endswith(".values") for name in aligned)
    assert all(folder.tensors[n].ctypes.data % checkpoint.ALIGNMENT == 0 for n in aligned)


def test_another_quantisation_is_refused():
    with pytest.raises(ConfigError, match="int8 is"):
        tiny.config(quantization="mxfp4")


def test_hugging_faces_config_does_not_know_of_it():
    config = tiny.config(quantization="int8")
    assert GPT2Config.from_hf(config.to_hf()) == config.dense
    assert GPT2Config.from_dict(config.to_dict()) == config
