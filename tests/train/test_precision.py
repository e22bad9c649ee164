"""float16 and its loss scale: the trace of torch's GradScaler, and updates that overflow."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
import training_runs
from core.config import GPT2Config
from core.models import build
from train import precision, step
from train.config import TrainConfig
from train.loop import run

V, P, D = 13, 10, 24
MODEL = build(
    GPT2Config(
        vocab_size=V,
        n_positions=P,
        n_embd=D,
        n_head=3,
        n_layer=1,
        activation_function="gelu",
    )
)
CONFIG = TrainConfig(
    dtype="float16", loss_scale_interval=3, batch_size=4, block_size=P, weight_decay=0.0
)


def tokens(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (1, rows, P + 1), dtype=np.int32)


@functools.cache
def update(config: TrainConfig):
    return jax.jit(functools.partial(step.update, model=MODEL, config=config, dtype=jnp.float16))


@pytest.fixture(scope="module")
def params():
    return tiny.params(MODEL, amplify=1)


def test_a_scale_that_overflows_halves_until_updates_are_made_and_doubles_after_three(params):
    state = step.initial_state(params, dataclasses.replace(CONFIG, loss_scale=2.0**40))
    scales, kept, numbers = [], [], {}
    for _ in range(60):
        before, learn = state, update(CONFIG)
        state, numbers = learn(state, tokens(4), np.float32(3e-3), None)
        scales.append(float(numbers["loss_scale"]))
        kept.append(bool(numbers["kept"]))
        if not kept[-1]:  # weights, moments and the optimizer's count are as they were
            jax.tree.map(np.testing.assert_array_equal, state[:2], before[:2])
        assert np.isfinite(numbers["train_loss"])
    first = kept.index(True)
    assert first > 5
    assert scales[:first] == [2.0 ** (39 - i) for i in range(first)]
    assert scales[first : first + 3] == [scales[first], scales[first], 2 * scales[first]]
    assert numbers["train_loss"] < 1.5


def test_the_scale_changes_no_gradient_that_float16_can_hold(params):
    """A power of two: only what would be lost or overflow is different."""
    of = jax.jit(functools.partial(step.gradients, model=MODEL, dtype=jnp.float16))
    few = {"tokens_ABS": tokens(2), "key": None}
    small, large = (of(params, **few, scale=jnp.float32(s))[1] for s in (2.0**10, 2.0**13))
    exact = jax.jit(functools.partial(step.gradients, model=MODEL, dtype=jnp.float32))
    wide = exact(params, **few)[1]
    for a, b, c in zip(*map(jax.tree.leaves, (small, large, wide)), strict=True):
        size = float(jnp.abs(c).max())
        np.testing.assert_allclose(a, b, atol=1e-3 * size)
        np.testing.assert_allclose(b, c, atol=2e-2 * size)


def test_a_scale_that_would_be_infinite_stays():
    state = precision.LossScale(jnp.float32(2.0**127), jnp.int32(0))
    for expected in (2.0**127, 2.0**126):
        state = precision.following(state, jnp.array(expected == 2.0**127), 1)
        assert state.scale == expected


@pytest.mark.slow
def test_a_float16_run_reports_its_scale_and_resumes_to_the_same_bits(config, tmp_path):
    config = dataclasses.replace(
        config,
        dtype="float16",
        loss_scale=2.0**36,
        loss_scale_interval=4,
        max_iters=20,
        eval_interval=10,
        eval_iters=1,
    )
    whole = run(dataclasses.replace(config, out_dir=str(tmp_path / "whole")), progress=False)
    halves = dataclasses.replace(config, out_dir=str(tmp_path / "halves"))
    run(dataclasses.replace(halves, max_iters=9), progress=False)
    run(dataclasses.replace(halves, init_from="auto"), progress=False)
    assert training_runs.different_arrays(tmp_path / "whole", tmp_path / "halves") == []
    rows = [row for row in whole.rows() if "train_loss" in row]
    assert [row["loss_scale"] for row in rows[:2]] == [2.0**35, 2.0**34]
    assert (rows[0]["grad_norm"], rows[0]["skipped"]) == (None, "overflow")
    assert math.isfinite(rows[-1]["grad_norm"])
    assert "skipped" not in rows[-1]


@pytest.mark.slow
def test_metrics_of_a_forward_pass_that_overflows_are_json(smallest_config, tmp_path):
    """The first update makes the weights too large for float16; their average, which is evaluated, is not."""
    config = dataclasses.replace(
        smallest_config,
        out_dir=str(tmp_path / "out"),
        dtype="float16",
        loss_scale=256.0,
        learning_rate=3e4,
        decay_lr=False,
        ema_decay=0.9999,
    )
    run(config, progress=False)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    skipped = [row for row in rows if row.get("skipped")]
    assert [row["iter"] for row in skipped] == [1, 2, 3]
    assert {(row["skipped"], row["train_loss"]) for row in skipped} == {("overflow", None)}


@pytest.mark.parity
@pytest.mark.parametrize("interval", [1, 3])
def test_the_scale_follows_torch_s_grad_scaler(interval: int):
    torch = pytest.importorskip("torch")
    finite = [bool(x) for x in np.random.default_rng(5).random(60) > 0.25] + [
        True
    ] * 200  # the end grows to float32's largest power of two
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=interval)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ours = precision.starting_at(2.0**16)
    for is_finite in finite:
        scaler.scale(torch.zeros(()))  # makes the scale, which is lazy
        weight.grad = torch.tensor([1.0, 1.0 if is_finite else float("inf")])
        scaler.step(optimizer)
        scaler.update()
        ours = precision.following(ours, jnp.array(is_finite), interval)
        theirs = scaler.state_dict()
        assert float(ours.scale) == theirs["scale"]
        assert int(ours.good_steps) == theirs["_growth_tracker"]
    assert ours.scale > 2.0**60
