import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import core
import reference
import tiny
from core import axes
from core.kv_cache import KVCache
from core.models.gpt2 import GPT2

# Two float32 summation orders of these sizes differ by 5e-7 here; the smallest mistake below moves a logit by 3e-5.
ATOL = 5e-6


def assert_logits(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=1e-5)
    np.testing.assert_array_equal(np.argmax(found, -1), np.argmax(expected, -1))


@pytest.mark.parametrize("variant", tiny.VARIANTS.values(), ids=tiny.VARIANTS.keys())
def test_logits_are_the_numpy_reference_s(variant):
    layers = 2 if not variant or "scale_attn_by_inverse_layer_idx" in variant else 1
    model = core.build(tiny.config(n_layer=layers, **variant))
    apply = jax.jit(model.apply)
    tokens_BT = tiny.tokens(model.config, 3, 57)
    for amplify in (1, 5):
        params = tiny.params(model, amplify)
        expected_BTV = reference.logits(model.config, params, tokens_BT)
        assert_logits(apply(params, tokens_BT), expected_BTV)


@pytest.mark.parametrize(
    "mistake",
    [
        {"activation_function": "gelu"},
        {"activation_function": "quick_gelu"},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_a_wrong_formula_exceeds_the_tolerance(model, params, apply, mistake):
    tokens_BT = tiny.tokens(model.config, 3, 57)
    wrong = dataclasses.replace(model.config, **mistake)
    wrong_BTV = reference.logits(wrong, params, tokens_BT)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logits(apply(params, tokens_BT), wrong_BTV)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)], ids=["k q v", "q v k"])
def test_a_wrong_order_of_q_k_and_v_exceeds_the_tolerance(model, params, apply, order):
    tokens_BT = tiny.tokens(model.config, 2, 11)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    for name, x in flat.items():
        if ".qkv." in name:
            flat[name] = jnp.take(x, np.array(order), axis=x.ndim - 3)
    wrong = traverse_util.unflatten_dict(flat, sep=".")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logits(apply(params, tokens_BT), reference.logits(model.config, wrong, tokens_BT))


def test_extending_a_cache_gives_the_logits_of_the_whole_at_every_position(model, params, apply):
    """A prompt of 7 for one row, 4 (padded with junk) for the other, then token by token to the context's end."""
    tokens_BT = tiny.tokens(model.config, 2, model.config.n_positions)
    full_BTV = np.asarray(apply(params, tokens_BT))
    extend = jax.jit(model.extend)
    lengths = np.array([7, 4])
    prompt_BT = tokens_BT[:, :7].at[1, 4:].set(96)
    positions_BT = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    cache = KVCache.zeros(model.config, 2, model.config.n_positions)

    logits_BTV, cache = extend(params, prompt_BT, positions_BT, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits_BTV[row, :length], full_BTV[row, :length], atol=ATOL)
    for _ in range(model.config.n_positions - 7):
        next_B1 = jnp.asarray(np.asarray(tokens_BT)[[0, 1], lengths][:, None])
        logits_B1V, cache = extend(params, next_B1, jnp.asarray(lengths[:, None]), cache)
        np.testing.assert_allclose(logits_B1V[:, 0], full_BTV[[0, 1], lengths], atol=ATOL)
        lengths += 1


def test_only_one_position_a_row_can_be_asked_for(model, params):
    tokens_BT = tiny.tokens(model.config, 3, 7)
    positions_BT = jnp.broadcast_to(jnp.arange(7)[None], (3, 7))
    cache = KVCache.zeros(model.config, 3, 7)
    all_BTV, _ = jax.jit(model.extend)(params, tokens_BT, positions_BT, cache)
    lengths_B = jnp.array([1, 7, 3])
    ask = jax.jit(model.extend, static_argnames="only_last")
    one_B1V, _ = ask(params, tokens_BT, positions_BT, cache, lengths_B=lengths_B, only_last=True)
    np.testing.assert_allclose(one_B1V[:, 0], all_BTV[np.arange(3), lengths_B - 1], atol=ATOL)


def test_a_later_token_changes_no_earlier_logit(model, params, apply):
    tokens_BT = tiny.tokens(model.config, 1, 57)
    before = apply(params, tokens_BT)
    after = apply(params, tokens_BT.at[0, 40].add(1))
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert (np.asarray(before[:, 40:]) != after[:, 40:]).any(-1).all()


def test_bfloat16_activations_stay_close_and_logits_are_float32(model, params, apply):
    tokens_BT = tiny.tokens(model.config, 3, 57)
    exact_BTV = np.asarray(apply(params, tokens_BT))
    rough_BTV = jax.jit(functools.partial(model.apply, dtype=jnp.bfloat16))(params, tokens_BT)
    assert rough_BTV.dtype == jnp.float32
    assert np.abs(rough_BTV - exact_BTV).mean() < 0.03 * exact_BTV.std()


def test_fresh_parameters_are_drawn_as_gpt2_s_were():
    config = tiny.config(n_embd=64, n_layer=2, tie_word_embeddings=False)
    params = core.build(config).init(jax.random.key(1))
    flat = {n: np.asarray(x) for n, x in traverse_util.flatten_dict(params, sep=".").items()}
    for name, word in config.tensors().items():
        x = flat.pop(name)
        assert x.dtype == np.float32
        assert x.shape == axes.shape(word, config.axes)
        if name.endswith(".bias"):
            assert (x == 0).all()
        elif name.endswith(".scale"):
            assert (x == 1).all()
        else:
            residual = ".out." in name or ".down." in name
            std = 0.02 / (2 * config.n_layer) ** 0.5 if residual else 0.02
            assert x.std() == pytest.approx(std, rel=5 / (2 * x.size) ** 0.5), name
            assert abs(x.mean()) < 5 * std / x.size**0.5, name
    assert flat == {}


def test_dropout_depends_on_its_key_alone_and_on_nothing_at_rate_zero(model, params, apply):
    tokens_BT = tiny.tokens(model.config, 1, 9)
    noisy = jax.jit(lambda key: model.apply(params, tokens_BT, dropout_key=key))
    keys = jax.random.split(jax.random.key(0), 2)
    assert (np.asarray(noisy(keys[0])) == noisy(keys[0])).all()
    assert (np.asarray(noisy(keys[0])) != noisy(keys[1])).all()
    assert (np.asarray(noisy(keys[0])) != apply(params, tokens_BT)).all()
    still = core.build(tiny.config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    with_key = jax.jit(still.apply)(params, tokens_BT, dropout_key=keys[0])
    np.testing.assert_array_equal(with_key, apply(params, tokens_BT))


@pytest.mark.parametrize(
    ("rate", "silenced"),
    [("embd_pdrop", ""), ("attn_pdrop", ""), ("resid_pdrop", "mlp"), ("resid_pdrop", "attn")],
    ids=["embeddings", "attention weights", "after attention", "after the MLP"],
)
def test_dropout_is_in_each_of_its_four_places(rate, silenced):
    """With one rate at work and the other branch's output zero, two keys give two results."""
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} | {rate: 0.5}
    model = core.build(tiny.config(n_layer=1, **rates))
    flat: dict[str, Any] = traverse_util.flatten_dict(tiny.params(model), sep=".")
    for name in (f"blocks.0.{silenced}.{part}" for part in ("out", "down")):
        for kind in ("kernel", "bias"):
            if f"{name}.{kind}" in flat:
                flat[f"{name}.{kind}"] *= 0
    params = traverse_util.unflatten_dict(flat, sep=".")
    tokens_BT = tiny.tokens(model.config, 1, 9)
    noisy = jax.jit(lambda key: model.apply(params, tokens_BT, dropout_key=key))
    one, other = (np.asarray(noisy(jax.random.key(seed))) for seed in (0, 1))
    assert (one[0, -1] != other[0, -1]).mean() > 0.9


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    from core.layers import dropout

    x = jnp.ones((400, 500))
    y = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.005)
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    assert dropout(x, 0.3, None) is x


def test_more_tokens_than_the_context_are_refused(model, params):
    with pytest.raises(ValueError, match="62 tokens do not fit the context of 61"):
        model.apply(params, tiny.tokens(model.config, 1, 62))


def test_functional_and_flax_parameters_are_the_same_dict(model, params, apply):
    tokens_BT = tiny.tokens(model.config, 2, 9)
    positions_BT = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    variables = jax.eval_shape(GPT2(model.config).init, jax.random.key(0), tokens_BT, tokens_BT)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(params)
    flax_BTV, _ = jax.jit(GPT2(model.config).apply)({"params": params}, tokens_BT, positions_BT)
    np.testing.assert_allclose(flax_BTV, apply(params, tokens_BT), atol=ATOL)


def test_layer_norm_survives_a_mean_far_from_zero():
    """mean(x**2) - mean(x)**2 would lose every digit here."""
    from core.layers import layer_norm

    x = np.float32(np.random.default_rng(0).standard_normal((5, 64)) + 3000).astype(np.float64)
    exact = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    found = layer_norm(jnp.asarray(x, jnp.float32), jnp.ones(64), jnp.zeros(64), 1e-5)
    # The mean is good to a unit in the last place of 3000, which is 2.4e-4.
    np.testing.assert_allclose(found, exact, atol=5e-4)


@pytest.mark.parametrize("wrong", [97, -1])
def test_an_id_outside_the_vocabulary_makes_its_sequence_nan_and_no_other(wrong):
    config = tiny.config(vocab_size=97)
    model = core.build(config)
    tokens_BT = jnp.array([[1, wrong, 3], [1, 2, 3]])
    logits_BTV = jax.jit(model.apply)(tiny.params(model), tokens_BT)
    assert jnp.isnan(logits_BTV[0]).all()
    assert jnp.isfinite(logits_BTV[1]).all()
