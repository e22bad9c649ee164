import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from core.config import GPT2Config
from core.models import build
from train import step
from train.config import TrainConfig

V, P, D, N, L = 13, 10, 24, 3, 1
MODEL = build(
    GPT2Config(
        vocab_size=V,
        n_positions=P,
        n_embd=D,
        n_head=N,
        n_layer=L,
        activation_function="gelu",
        embd_pdrop=0.3,
        attn_pdrop=0.3,
        resid_pdrop=0.3,
    )
)


@pytest.fixture(scope="module")
def params():
    return tiny.params(MODEL, amplify=1)


def tokens(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (rows, P + 1), dtype=np.int32)


jitted_gradients = jax.jit(step.gradients, static_argnames=("model", "dtype"))


def gradients(params, tokens_ABS, key=None, dtype=jnp.float32):
    return jitted_gradients(params, tokens_ABS, key, model=MODEL, dtype=dtype)


def update(config: TrainConfig):
    return jax.jit(functools.partial(step.update, model=MODEL, config=config, dtype=jnp.float32))


def relative_difference(left, right) -> float:
    """The norm of the difference over the norm, over all leaves together."""
    left, right = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (left, right))
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def test_accumulation_does_not_change_the_gradient(params):
    whole_loss, whole = gradients(params, tokens(8).reshape(1, 8, -1))
    loss, grads = gradients(params, tokens(8).reshape(4, 2, -1))
    assert loss == pytest.approx(float(whole_loss), rel=1e-6)
    assert relative_difference(grads, whole) < 1e-6


def test_each_micro_batch_has_its_own_dropout(params):
    same_twice = np.stack([tokens(3)] * 2)
    one, _ = gradients(params, same_twice[:1], jax.random.key(5))
    two, _ = gradients(params, same_twice, jax.random.key(5))
    assert one != two


def test_dropout_depends_on_its_key_alone(params):
    losses = [float(gradients(params, tokens(3)[None], jax.random.key(k))[0]) for k in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_half_precision_keeps_float32_parameters_and_about_the_same_gradient(params):
    loss, grads = gradients(params, tokens(8)[None], dtype=jnp.bfloat16)
    exact_loss, exact = gradients(params, tokens(8)[None])
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    assert float(loss) == pytest.approx(float(exact_loss), rel=2e-3)  # bfloat16 has 8 bits
    assert 0 < relative_difference(grads, exact) < 3e-2


def test_one_batch_is_learned_by_heart(params):
    config = TrainConfig(weight_decay=0.0)
    learn = update(config)
    state = step.initial_state(params, config)
    numbers = {}
    for _ in range(300):
        state, numbers = learn(state, tokens(4)[None], np.float32(3e-3), None)
    # The first token of a row has nothing before it, so where rows differ there a little loss must remain.
    assert numbers["train_loss"] < 0.25


def test_an_update_reports_the_norm_before_clipping(params):
    config = TrainConfig(grad_clip=1e-3)
    state = step.initial_state(params, config)
    _, numbers = update(config)(state, tokens(4)[None], np.float32(0), None)
    assert numbers["grad_norm"] > 0.1


@pytest.mark.parametrize(
    ("asked", "batch", "expected"),
    [
        (1, 4, 1),
        (7, 4, 7),  # which does not divide the 10
        (10, 4, None),
        (99, 4, None),
        (0, 4, None),  # few logits: all at once
        (0, 2**20, 4),  # 2**26 logits are 4.9 positions of so many rows, in three pieces
        (0, 3 * 2**19, 3),  # 3.3 positions: four pieces, of which the last has one
        (
            0,
            5 * 2**17,
            5,
        ),  # 7.9 positions: two pieces of 5, not one of 7 and one of 3 that is padded to 7
        (0, 2**24, 1),
    ],
)
def test_logits_of_so_many_positions_are_formed_at_a_time(
    asked: int, batch: int, expected: int | None
):
    config = TrainConfig(loss_chunk=asked, batch_size=batch, block_size=P)
    assert step.loss_chunk(config, MODEL) == expected
