import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from core import axes
from core.config import GPT2Config, GptOssConfig
from core.models import build
from train import optimizer
from train.config import TrainConfig


def nanogpt_get_lr(it, *, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """As train.py of nanoGPT at 3adf61e, line for line."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    assert 0 <= decay_ratio <= 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@pytest.mark.parametrize(
    "schedule",
    [
        {"learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 2000, "lr_decay_iters": 600_000},
        {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "lr_decay_iters": 2000},
        {"learning_rate": 1e-3, "min_lr": 0.0, "warmup_iters": 0, "lr_decay_iters": 7},
    ],
)
def test_the_learning_rate_is_nanogpts_at_every_probe(schedule: dict):
    w, d = schedule["warmup_iters"], schedule["lr_decay_iters"]
    probes = [*range(w + 6), (w + d) // 2, *range(d - 1, d + 4), 10 * d]
    ours = [optimizer.learning_rate(TrainConfig(**schedule), it) for it in probes]
    assert ours == [nanogpt_get_lr(it, **schedule) for it in probes]


def test_the_learning_rate_is_constant_without_decay():
    config = TrainConfig(decay_lr=False, learning_rate=3e-4)
    assert {optimizer.learning_rate(config, it) for it in (0, 1000, 10**7)} == {3e-4}


@pytest.mark.parametrize("tied", [True, False])
def test_exactly_kernels_and_embeddings_decay(tied: bool):
    shape = GPT2Config(
        vocab_size=11, n_positions=7, n_embd=6, n_layer=2, n_head=3, tie_word_embeddings=tied
    )
    mask = optimizer.decay_mask(jax.eval_shape(build(shape).init, jax.random.key(0)))
    flat = jax.tree_util.tree_leaves_with_path(mask)
    decayed = {".".join(key.key for key in path) for path, decays in flat if decays}
    layer = ("attn.qkv.kernel", "attn.out.kernel", "mlp.up.kernel", "mlp.down.kernel")
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in layer}
    expected |= {"wte.embedding", "wpe.embedding"} | (set() if tied else {"lm_head.kernel"})
    assert decayed == expected
    assert len(flat) == len(shape.tensors())


def test_weight_decay_is_decoupled_from_the_gradient():
    config = TrainConfig(weight_decay=0.5)
    params = {"a": {"kernel": jnp.full(3, 2.0)}, "b": {"bias": jnp.full(3, 2.0)}}
    tx = optimizer.adamw(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = tx.update(zeros, tx.init(params), params)[0]
    np.testing.assert_array_equal(updates["a"]["kernel"], np.full(3, 1.0, np.float32))
    np.testing.assert_array_equal(updates["b"]["bias"], np.zeros(3, np.float32))


def test_gradients_above_the_limit_are_scaled_to_it_and_others_left_alone():
    grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    clipped, norm = optimizer.clip(grads, 1.0)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["w"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8], rtol=1e-6)
    for limit in (0.0, 5.1):  # 0 disables
        same, norm = optimizer.clip(grads, limit)
        assert norm == 5.0
        np.testing.assert_array_equal(same["w"], grads["w"])


@pytest.fixture(scope="module", params=["gpt2", "gpt_oss"])
def one_muon_step(request: pytest.FixtureRequest):
    """Parameters by name, random gradients, and the first update of Muon and of AdamW for them."""
    shapes = {
        "gpt2": GPT2Config(vocab_size=11, n_positions=5, n_embd=12, n_head=2, n_layer=1),
        "gpt_oss": GptOssConfig(
            vocab_size=11,
            hidden_size=12,
            intermediate_size=10,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=5,
        ),
    }
    shape = shapes[request.param]
    rng = np.random.default_rng(0)
    grads = {
        name: jnp.asarray(rng.standard_normal(axes.shape(word, shape.axes)), jnp.float32)
        for name, word in shape.tensors().items()
    }
    tree = traverse_util.unflatten_dict(grads, sep=".")
    updates = {}
    with jax.numpy_dtype_promotion("standard"):
        for name in ("muon", "adamw"):
            tx = optimizer.steps(TrainConfig(optimizer=name, weight_decay=0.0))
            update, _ = jax.jit(tx.update)(tree, tx.init(tree), tree)
            updates[name] = traverse_util.flatten_dict(update, sep=".")
    return shape.tensors(), updates


def test_muon_makes_the_blocks_matrices_orthogonal_and_leaves_the_rest_to_adamw(one_muon_step):
    """Most singular values are near 1 (0.7 to 1.2, Jordan 2024), times what makes a step as large as AdamW's."""
    words, updates = one_muon_step
    as_matrices = {
        "D3NH": "3D(NH)",
        "DNH": "D(NH)",
        "DKH": "D(KH)",
        "NHD": "(NH)D",
        "EDF2": "E2DF",
    }
    for name, word in words.items():
        update = np.asarray(updates["muon"][name])
        is_matrix = name.startswith("blocks") and name.endswith("kernel") and "router" not in name
        if not is_matrix:
            np.testing.assert_array_equal(update, updates["adamw"][name], err_msg=name)
            continue
        sizes = {letter: update.shape[i] for i, letter in enumerate(word) if letter.isalpha()}
        turned = axes.relayout(update, f"{word} -> {as_matrices.get(word, word)}", sizes)
        values = np.linalg.svd(turned, compute_uv=False) / (0.2 * max(turned.shape[-2:]) ** 0.5)
        assert 0.65 < np.median(values) <= values.max() < 1.3, name
