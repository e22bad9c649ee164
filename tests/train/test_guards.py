import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import train
from train import guards
from train.config import TrainConfig
from train.data import open_dataset
from train.devices import open_devices
from train.step import next_tokens


def history(*norms: float) -> guards.Norms:
    found = guards.no_norms()
    for norm in norms:
        found = guards.remembered(found, jnp.float32(norm))
    return found


@pytest.fixture(scope="module")
def full() -> guards.Norms:
    """A full window around 1, of standard deviation 0.1."""
    wave = np.tile([0.9, 1.1], guards.WINDOW // 2).astype(np.float32)
    return guards.Norms(jnp.asarray(wave), jnp.int32(guards.WINDOW))


@pytest.mark.parametrize(("norm", "expected"), [(1.5, False), (1.7, True), (0.0, False)])
def test_a_spike_is_so_many_deviations_above_the_mean(full, norm: float, expected: bool):
    assert bool(guards.is_spike(full, jnp.float32(norm), 6.0)) is expected


def test_nothing_is_a_spike_before_the_window_is_full(full):
    assert not guards.is_spike(full._replace(seen=full.seen - 1), jnp.float32(1e9), 6.0)


def test_the_window_forgets_the_oldest_and_takes_no_infinity():
    norms = history(3.0, float("inf"), 4.0, float("nan"))
    np.testing.assert_array_equal(norms.norms_W[:3], [3.0, 4.0, 0.0])
    assert norms.seen == 2
    again = guards.remembered(norms._replace(seen=jnp.int32(guards.WINDOW)), jnp.float32(5.0))
    assert again.norms_W[0] == 5.0


def test_the_first_bad_leaf_is_found_and_named():
    tree = {"b": {"bias": jnp.ones(3)}, "a": jnp.ones((2, 2)), "c": jnp.ones(1)}
    assert guards.first_bad(tree) == -1
    tree["b"]["bias"] = jnp.array([0.0, jnp.nan, 0.0])
    tree["c"] = jnp.array([jnp.inf])
    assert guards.names(tree)[int(guards.first_bad(tree))] == "b.bias"


@pytest.fixture(scope="module")
def guarded(smallest_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory):
    """Four updates with both guards on, and the state they leave."""
    from training_runs import last_state

    out_dir = tmp_path_factory.mktemp("guarded") / "out"
    config = dataclasses.replace(
        smallest_config, out_dir=str(out_dir), ema_decay=0.75, skip_spikes=6.0
    )
    with jax.numpy_dtype_promotion("standard"):  # as in conftest, for what is made before it
        return train.run(config, progress=False), config, last_state(out_dir)


def test_a_spiking_update_is_left_out_and_the_run_goes_on(guarded):
    from train import step
    from train.origin import begin
    from train.preflight import check

    _, config, state = guarded
    calm = guards.Norms(jnp.full(guards.WINDOW, 1e-3), jnp.int32(guards.WINDOW))
    plan = check(dataclasses.replace(config, init_from="scratch", overwrite=True))
    model = begin(config, plan, None, key=jax.random.key(0), devices=open_devices(config)).model
    tokens = plan.dataset.batch("train", seed=1, step=0, rows=3, length=13)[None]
    update = jax.jit(step.update, static_argnames=("model", "config", "dtype"))
    after, numbers = update(
        state._replace(norms=calm),
        tokens,
        jnp.float32(0.1),
        None,
        model=model,
        config=config,
        dtype=jnp.float32,
    )
    assert not numbers["kept"]
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))
    assert after.norms.seen == guards.WINDOW + 1


def test_the_average_of_the_weights_is_what_is_evaluated(guarded):
    result, config, state = guarded
    looked = train.run(
        dataclasses.replace(config, init_from="resume", eval_only=True), progress=False
    )
    dataset = open_dataset(Path(config.data_dir) / config.dataset, block_size=12)
    model, kept, _ = core.load(result.model_dir)
    loss = jax.jit(core.loss, static_argnums=1)
    draw = {"seed": config.seed, "rows": 3, "length": 13}
    batches = [dataset.batch("eval_val", step=step, **draw) for step in range(2)]
    averaged, plain, best = (
        np.mean([loss(params, model, next_tokens(jnp.asarray(batch))) for batch in batches])
        for params in (state.ema, state.params, kept)
    )
    assert looked.losses["val_loss"] == pytest.approx(float(averaged), abs=1e-6)
    assert abs(averaged - plain) > 1e-4
    assert result.best_val_loss == pytest.approx(float(best), abs=1e-6)


def test_with_guards_too_a_run_in_two_parts_is_the_run_in_one(guarded, tmp_path: Path):
    from training_runs import different_arrays, last_arrays, timeless_rows

    result, config, _ = guarded
    parts = dataclasses.replace(config, out_dir=str(tmp_path / "out"))
    train.run(dataclasses.replace(parts, max_iters=1), progress=False)
    train.run(dataclasses.replace(parts, init_from="resume"), progress=False)
    assert different_arrays(tmp_path / "out", result.out_dir) == []
    saved = last_arrays(tmp_path / "out")
    assert any(".ema" in name for name in saved)
    assert any(".norms" in name for name in saved)
    last = timeless_rows(tmp_path / "out")[-1]
    assert last == timeless_rows(result.out_dir)[-1]
