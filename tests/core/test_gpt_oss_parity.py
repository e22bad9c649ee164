"""GPT-OSS against transformers' eager GptOssForCausalLM: logits, gradients, greedy tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import tiny_gpt_oss as tiny
from core import axes
from core.config import GptOssConfig
from core.engine import Completion, Engine, Request
from core.sampling import Sampling

pytestmark = pytest.mark.parity

T = 47  # more than two windows, and not a multiple of one

# Ours, theirs, and the axes as theirs are stored.
NAMES = {
    "wte.embedding": ("model.embed_tokens.weight", "VD"),
    "norm_f.scale": ("model.norm.weight", "D"),
    "lm_head.kernel": ("lm_head.weight", "VD"),
}
BLOCK_NAMES = {
    "norm_1.scale": ("input_layernorm.weight", "D"),
    "attn.q.kernel": ("self_attn.q_proj.weight", "(NH)D"),
    "attn.q.bias": ("self_attn.q_proj.bias", "(NH)"),
    "attn.k.kernel": ("self_attn.k_proj.weight", "(KH)D"),
    "attn.k.bias": ("self_attn.k_proj.bias", "(KH)"),
    "attn.v.kernel": ("self_attn.v_proj.weight", "(KH)D"),
    "attn.v.bias": ("self_attn.v_proj.bias", "(KH)"),
    "attn.out.kernel": ("self_attn.o_proj.weight", "D(NH)"),
    "attn.out.bias": ("self_attn.o_proj.bias", "D"),
    "attn.sinks": ("self_attn.sinks", "N"),
    "norm_2.scale": ("post_attention_layernorm.weight", "D"),
    "moe.router.kernel": ("mlp.router.weight", "ED"),
    "moe.router.bias": ("mlp.router.bias", "E"),
    "moe.gate_up.kernel": ("mlp.experts.gate_up_proj", "ED(F2)"),
    "moe.gate_up.bias": ("mlp.experts.gate_up_proj_bias", "E(F2)"),
    "moe.down.kernel": ("mlp.experts.down_proj", "EFD"),
    "moe.down.bias": ("mlp.experts.down_proj_bias", "ED"),
}


def names(config: GptOssConfig) -> dict[str, tuple[str, str]]:
    layers = {
        f"blocks.{i}.{ours}": (f"model.layers.{i}.{theirs}", word)
        for i in range(config.num_hidden_layers)
        for ours, (theirs, word) in BLOCK_NAMES.items()
    }
    tied = {"lm_head.kernel"} if config.tie_word_embeddings else set()
    return {ours: x for ours, x in (NAMES | layers).items() if ours not in tied}


def theirs(config: GptOssConfig, flat: dict[str, np.ndarray], dtype: str = "float32") -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hf = transformers.GptOssConfig(**{**config.to_hf(), "attn_implementation": "eager"})
    model = transformers.GptOssForCausalLM(hf).eval()
    model.set_experts_implementation("eager")
    state = {
        name: torch.tensor(
            axes.relayout(flat[ours], f"{config.tensors()[ours]} -> {word}", config.axes).copy()
        )
        for ours, (name, word) in names(config).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] * config.tie_word_embeddings, [])
    return model.to(getattr(torch, dtype))


def tokens(config: GptOssConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, config.vocab_size, shape)


@pytest.mark.parametrize(("amplify", "atol"), [(1, 2e-5), (20, 2e-4)])
@pytest.mark.parametrize("variant", tiny.VARIANTS.values(), ids=tiny.VARIANTS)
def test_logits_are_transformers(variant: dict[str, Any], amplify: float, atol: float):
    torch = pytest.importorskip("torch")
    config = tiny.config(**variant)
    flat = tiny.weights(config, amplify)
    ids = tokens(config, 2, T)
    with torch.no_grad():
        expected = theirs(config, flat)(torch.tensor(ids)).logits.numpy()
    found = np.asarray(core.build(config).apply(tiny.params(flat), jnp.asarray(ids)))
    np.testing.assert_allclose(found, expected, atol=atol, rtol=1e-4)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    assert expected.std() > (0.5 if amplify > 1 else 0.01)


def test_positions_far_beyond_the_original_context_and_the_window_are_transformers():
    """Published angles, 1,200 positions on an original context of 128: what YaRN is for."""
    torch = pytest.importorskip("torch")
    published = {"rope_theta": 150000.0, "head_dim": 64, "num_hidden_layers": 2}
    config = tiny.config(**published, initial_context_length=128, layer_types=None)
    flat, ids = tiny.weights(config, 10), tokens(config, 1, 1200)
    with torch.no_grad():
        expected = theirs(config, flat)(torch.tensor(ids)).logits.numpy()
    found = np.asarray(jax.jit(core.build(config).apply)(tiny.params(flat), jnp.asarray(ids)))
    # float32 angles of position p are wrong by p * 6e-8 on both sides.
    np.testing.assert_allclose(found, expected, atol=5e-4, rtol=1e-3)


@pytest.mark.slow
def test_positions_beyond_the_published_original_context_are_transformers():
    """4,300 tokens of a model of the published angles: uncached, and the last of them from a cache of rings."""
    torch = pytest.importorskip("torch")
    published = {"rope_theta": 150000.0, "head_dim": 64, "initial_context_length": 4096}
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 128}
    sizes = {"num_hidden_layers": 2, "layer_types": None, "max_position_embeddings": 8192}
    config = tiny.config(**published, **few, **sizes)
    flat, ids = tiny.weights(config, 10), tokens(config, 1, 4300)
    with torch.no_grad():
        expected_TV = theirs(config, flat)(torch.tensor(ids)).logits.numpy()[0]
    model, params = core.build(config), tiny.params(flat)
    found_TV = np.asarray(jax.jit(model.apply)(params, jnp.asarray(ids)))[0]
    # float32 angles of position p are wrong by p * 6e-8 on both sides.
    np.testing.assert_allclose(found_TV, expected_TV, atol=5e-4, rtol=1e-3)
    prompt = ids[0, :4200].tolist()
    (found,) = Engine(model, params, slots=1, top_logprobs=101).complete(
        [Request(prompt, Sampling(temperature=0, max_new_tokens=1, logprobs=101))]
    )
    assert isinstance(found, Completion)
    assert found.logprobs is not None
    ours = np.array([value for _, value in sorted(found.logprobs[0].top)])
    last_V = expected_TV[4199] - expected_TV[4199].max()
    np.testing.assert_allclose(ours, last_V - np.log(np.exp(last_V).sum()), atol=1e-3)


def test_two_hundred_greedy_tokens_are_transformers():
    torch = pytest.importorskip("torch")
    config = tiny.config()
    flat, prompt = tiny.weights(config), tokens(config, 9)
    engine = Engine(core.build(config), tiny.params(flat), slots=1)
    greedy = Sampling(temperature=0, max_new_tokens=200, ignore_eos=True)
    (found,) = engine.complete([Request(prompt.tolist(), greedy)])
    with torch.no_grad():
        expected = theirs(config, flat).generate(
            torch.tensor(prompt[None]), do_sample=False, max_new_tokens=200, eos_token_id=None
        )
    assert isinstance(found, Completion)
    assert list(found.tokens) == expected[0, 9:].tolist()
    assert len(set(found.tokens)) > 10


def test_bfloat16_is_no_further_from_float32_than_torch_s():
    """Router ties fall to either side in bfloat16, so the means are compared and not the maxima."""
    torch = pytest.importorskip("torch")
    config = tiny.config()
    flat, ids = tiny.weights(config, 5), tokens(config, 4, T)
    rounded = {n: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for n, x in flat.items()}
    with torch.no_grad():
        exact = theirs(config, rounded)(torch.tensor(ids)).logits.numpy()
        torch_s = theirs(config, rounded, "bfloat16")(torch.tensor(ids)).logits.float().numpy()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(rounded))
    found = np.asarray(core.build(config).apply(narrow, jnp.asarray(ids), dtype=jnp.bfloat16))
    ours, torchs = (np.abs(x - exact).mean() for x in (found, torch_s))
    assert 0 < ours <= 1.5 * torchs


def test_packed_kernels_are_decoded_as_transformers_decodes_them():
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    from core.quant import MXFP4

    rng = np.random.default_rng(0)
    scales = np.arange(2, 253, dtype=np.uint8).reshape(1, 251, 1)
    blocks = rng.integers(0, 256, (1, 251, 1, 16), np.uint8)
    expected = mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    found = MXFP4(jnp.asarray(blocks), jnp.asarray(scales)).decode(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found, np.float32)[0].T, expected[0].float().numpy())


def test_gradients_are_torch_s():
    torch = pytest.importorskip("torch")
    config = tiny.config()
    flat, ids = tiny.weights(config, 10), tokens(config, 2, T + 1)
    model = theirs(config, flat)
    logits = model(torch.tensor(ids[:, :-1])).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[:, 1:]).flatten()).backward()
    batch = core.Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]))
    loss = functools.partial(core.loss, auxiliary=False)  # which transformers adds when asked
    found = jax.grad(loss)(tiny.params(flat), core.build(config), batch)
    gradients = {name: x.grad.numpy() for name, x in model.named_parameters()}
    for ours, (name, word) in names(config).items():
        node: Any = found
        for part in ours.split("."):
            node = node[part]
        layout = f"{word} -> {config.tensors()[ours]}"
        expected = axes.relayout(gradients[name], layout, config.axes)
        scale = np.abs(expected).max()
        assert scale > 1e-6
        np.testing.assert_allclose(node, expected, atol=2e-4 * scale, rtol=1e-3, err_msg=ours)


def test_the_loss_is_transformers_with_its_router_logits():
    torch = pytest.importorskip("torch")
    config = tiny.config(router_aux_loss_coef=0.3)
    flat, ids = tiny.weights(config), tokens(config, 2, T + 1)
    with torch.no_grad():
        out = theirs(config, flat)(torch.tensor(ids[:, :-1]), output_router_logits=True)
        entropy = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
        )
    batch = core.Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]))
    found = jax.jit(core.loss, static_argnums=1)(tiny.params(flat), core.build(config), batch)
    np.testing.assert_allclose(found, (entropy + 0.3 * out.aux_loss).item(), rtol=1e-5)
