import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.config import GPT2Config
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
