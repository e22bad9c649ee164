"""Against torch and transformers, in their environment (`make parity`).

Weights go over by name, not through `convert`, so that a mistake there cannot hide one here.
"""

from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

import core
import tiny
from core.config import Config, GPT2Config
from core.engine import Completion, Engine, Request
from core.sampling import Sampling

pytestmark = pytest.mark.parity

# Two float32 implementations differ by their order of summation. The bounds are for GPT-2's own widths, where they
# differ by 3.5e-6 and 3.6e-5; the smallest wrong formula moves a logit by 9e-4 and 2e-3 there.
ATOL = {1: 2e-5, 5: 2e-4}
RTOL = 1e-4


@pytest.fixture(scope="module")
def torch() -> Any:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # two threads wait for each other where a step takes microseconds
    return torch


@pytest.fixture(scope="module")
def transformers(torch) -> Any:
    return pytest.importorskip("transformers")


HF_NAMES = {
    "wte.embedding": "transformer.wte.weight",
    "wpe.embedding": "transformer.wpe.weight",
    "ln_f.scale": "transformer.ln_f.weight",
    "ln_f.bias": "transformer.ln_f.bias",
    "lm_head.kernel": "lm_head.weight",
}
HF_PARTS = {
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "ln_1": "ln_1",
    "ln_2": "ln_2",
}


def hf_name(name: str) -> str:
    if name in HF_NAMES:
        return HF_NAMES[name]
    _, layer, *part, kind = name.split(".")
    kind = "bias" if kind == "bias" else "weight"
    return f"transformer.h.{layer}.{HF_PARTS['.'.join(part)]}.{kind}"


def hf_model(torch: Any, config: Config, params: Any) -> Any:
    """GPT2LMHeadModel with these parameters; Conv1D stores [in, out], so a reshape to its shape is all."""
    transformers = pytest.importorskip("transformers")
    settings = {k: v for k, v in config.to_hf().items() if k not in ("model_type", "architectures")}
    hf_config = transformers.GPT2Config(**settings, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(hf_config).eval()
    state, filled = model.state_dict(), set()
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    for name, x in flat.items():
        target = state[hf_name(name)]
        target.copy_(torch.from_numpy(np.array(x)).reshape(target.shape))
        filled.add(hf_name(name))
    if config.tie_word_embeddings:
        filled.add("lm_head.weight")
    assert filled == set(state)
    return model


def as_torch(torch: Any, x: Any) -> Any:
    return torch.from_numpy(np.array(x, np.int64))


HF_VARIANTS = {name: v for name, v in tiny.VARIANTS.items() if v.get("use_bias", True)}


@pytest.mark.parametrize("amplify", ATOL)
@pytest.mark.parametrize("variant", HF_VARIANTS.values(), ids=HF_VARIANTS.keys())
def test_logits_are_those_of_transformers(torch, variant, amplify):
    model = core.build(tiny.config(**variant))
    params = tiny.params(model, amplify)
    tokens_BT = tiny.tokens(model.config, 3, 57)
    with torch.no_grad():
        expected_BTV = hf_model(torch, model.config, params)(
            as_torch(torch, tokens_BT)
        ).logits.numpy()
    found_BTV = np.asarray(jax.jit(model.apply)(params, tokens_BT))
    np.testing.assert_allclose(found_BTV, expected_BTV, atol=ATOL[amplify], rtol=RTOL)
    np.testing.assert_array_equal(found_BTV.argmax(-1), expected_BTV.argmax(-1))


def test_logits_of_freshly_initialised_parameters_are_those_of_transformers(torch):
    model = core.build(tiny.config(n_embd=72, n_head=6))
    params = model.init(jax.random.key(0))
    tokens_BT = tiny.tokens(model.config, 2, 61)
    with torch.no_grad():
        expected_BTV = hf_model(torch, model.config, params)(
            as_torch(torch, tokens_BT)
        ).logits.numpy()
    found_BTV = jax.jit(model.apply)(params, tokens_BT)
    np.testing.assert_allclose(found_BTV, expected_BTV, atol=ATOL[1], rtol=RTOL)


def test_gradients_are_those_of_torch(torch, model, params):
    """The same bound as for logits, relative to each tensor: a gradient is a sum over all 33 positions."""
    inputs_BT, targets_BT = tiny.tokens(model.config, 2, 3, 11)
    targets_BT = targets_BT.at[0, 1].set(-1).at[2, 5:].set(-1)
    batch = core.Batch(inputs_BT, targets_BT)
    value, grads = jax.jit(jax.value_and_grad(core.loss), static_argnums=1)(params, model, batch)

    theirs = hf_model(torch, model.config, params)
    logits_BTV = theirs(as_torch(torch, inputs_BT)).logits
    expected = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), as_torch(torch, targets_BT).flatten(), ignore_index=-1
    )
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    named = dict(theirs.named_parameters())
    flat: dict[str, Any] = traverse_util.flatten_dict(grads, sep=".")
    assert len(flat) == len(named)
    for name, grad in flat.items():
        expected_grad = named[hf_name(name)].grad.numpy().reshape(grad.shape)
        bound = 1e-5 * np.abs(expected_grad).max()
        assert bound > 0
        np.testing.assert_allclose(grad, expected_grad, atol=bound, rtol=RTOL, err_msg=name)


@pytest.fixture(scope="module")
def long_engine() -> Engine:
    """Room for 128 tokens after a prompt; amplified until greedy text has some twenty different tokens."""
    model = core.build(tiny.config(n_positions=173))
    return Engine(model, tiny.params(model, amplify=25), slots=5)


RAGGED = [1, 2, 5, 11, 16, 3, 45]


def test_128_greedy_tokens_are_those_of_transformers_generate(torch, long_engine):
    """The shortest and the longest alone, and all of them as one left-padded batch, against one batch of ours."""
    config = long_engine.model.config
    prompts = [np.asarray(tiny.tokens(config, n, seed=n)).tolist() for n in RAGGED]
    sampling = Sampling(temperature=0, max_new_tokens=128)
    results = long_engine.complete([Request(prompt, sampling) for prompt in prompts])
    found = [list(result.tokens) for result in results if isinstance(result, Completion)]
    assert all(len(set(tokens)) > 12 for tokens in found)

    theirs = hf_model(torch, config, long_engine.params)
    settings = {"max_new_tokens": 128, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for row in (RAGGED.index(min(RAGGED)), RAGGED.index(max(RAGGED))):
        ids = as_torch(torch, [prompts[row]])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert found[row] == out[0, ids.shape[1] :].tolist()

    width = max(RAGGED)
    padded = as_torch(torch, [[0] * (width - len(p)) + p for p in prompts])
    mask = as_torch(torch, [[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(padded, attention_mask=mask, **settings)
    assert found == out[:, width:].tolist()


def test_greedy_tokens_with_a_repetition_penalty_are_those_of_transformers_generate(
    torch, long_engine
):
    config = long_engine.model.config
    prompt = np.asarray(tiny.tokens(config, 11)).tolist()
    sampling = Sampling(temperature=0, repetition_penalty=1.3, max_new_tokens=40)
    (result,) = long_engine.complete([Request(prompt, sampling)])
    assert isinstance(result, Completion)
    theirs = hf_model(torch, config, long_engine.params)
    ids = as_torch(torch, [prompt])
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert list(result.tokens) == out[0, 11:].tolist()


def test_a_configuration_that_transformers_wrote_is_understood_whole(transformers):
    theirs = transformers.GPT2Config(
        n_embd=24, n_head=4, n_layer=2, vocab_size=97, eos_token_id=3, bos_token_id=4
    )
    for written in (theirs.to_dict(), theirs.to_diff_dict()):
        ours = GPT2Config.from_hf(written)
        assert ours == tiny.config(n_positions=1024, eos_token_id=3, bos_token_id=4)
