import dataclasses
import json
import logging
import math
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import train
from core import checkpoint as model_folder
from core.checkpoint import CheckpointError
from core.config import GPT2Config, GptOssConfig
from core.tokenizer import Tokenizer
from train import dry_run, loop, preflight
from train import origin as origin_lib
from train.checkpoint import Checkpoints, Progress
from train.config import TrainConfig
from train.data import DataError, open_dataset
from train.devices import open_devices
from train.metrics import read_rows
from train.prepare import prepare
from train.step import State, next_tokens
from training_runs import different_arrays, last_arrays, last_state, timeless_rows

mean_loss = jax.jit(core.loss, static_argnums=1)


def run(config: TrainConfig, **changes) -> train.Result:
    return train.run(dataclasses.replace(config, **changes), progress=False)


def assert_same_run(one: train.Result, other: train.Result) -> None:
    assert different_arrays(one.out_dir, other.out_dir) == []
    assert timeless_rows(one.out_dir) == timeless_rows(other.out_dir)
    assert one.best_val_loss == other.best_val_loss


@pytest.fixture(scope="module")
def finished(base_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> train.Result:
    """The run of `config`, uninterrupted."""
    with jax.numpy_dtype_promotion("standard"):
        return run(base_config, out_dir=str(tmp_path_factory.mktemp("finished") / "out"))


def test_the_loss_falls(finished: train.Result):
    evaluations = [row for row in finished.rows() if "val_loss" in row]
    assert evaluations[-1]["train_eval_loss"] < evaluations[0]["train_eval_loss"] - 0.5


def test_max_iters_makes_one_update_more_as_in_nanogpt(finished: train.Result):
    assert finished.iteration == 41
    counts = [array for name, array in last_arrays(finished.out_dir).items() if "count" in name]
    assert counts == [41]


def test_metrics_have_the_documented_keys(finished: train.Result):
    rows = finished.rows()
    training = [row for row in rows if "train_loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    assert len(training) + len(evaluations) == len(rows)
    keys = {"iter", "train_loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert {frozenset(row) for row in training} == {frozenset(keys)}
    losses = {"val_loss", "train_eval_loss", "val_bits_per_byte"}
    assert {frozenset(row) for row in evaluations} == {frozenset({"iter", "goodput"} | losses)}
    assert [row["iter"] for row in training] == list(range(41))
    assert [row["iter"] for row in evaluations] == [0, 10, 20, 30, 40]
    assert {row["mfu"] for row in training} == {None}  # nobody publishes a CPU's peak
    assert all(row["tokens_per_s"] > 0 for row in training)
    shares = [row["goodput"] for row in evaluations]
    assert shares[0] == 0 < min(shares[1:]) <= max(shares) < 1
    for row in evaluations:  # a token is a character, and a character a byte but for a few
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2), rel=5e-3)


def test_out_dir_holds_what_architecture_promises(finished: train.Result, base_config: TrainConfig):
    names = {path.name for path in finished.out_dir.iterdir()}
    files = {"metrics.jsonl", "config.json", "environment.json", "loss.png"}
    assert names == files | {"checkpoints", "model"}
    saved = json.loads((finished.out_dir / "config.json").read_text())
    assert TrainConfig.from_dict(saved) == dataclasses.replace(
        base_config, out_dir=str(finished.out_dir)
    )
    assert (finished.out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_two_checkpoints_and_the_best_are_kept(finished: train.Result):
    evaluations = {row["iter"]: row["val_loss"] for row in finished.rows() if "val_loss" in row}
    best = min(evaluations, key=evaluations.__getitem__)
    with Checkpoints(finished.out_dir / "checkpoints") as checkpoints:
        assert set(checkpoints.iterations()) == {40, 41, best}


@pytest.mark.slow
def test_the_best_is_kept_also_where_its_checkpoint_was_written_before_it_was_evaluated(
    smallest: TrainConfig,
):
    """A run that ends, or is stopped, on an evaluation's iteration; going on, it evaluates there first."""
    run(smallest, max_iters=3, eval_interval=4)
    worse = {"learning_rate": 5.0, "decay_lr": False, "grad_clip": 0.0}
    again = run(smallest, max_iters=12, eval_interval=4, keep_last=1, init_from="resume", **worse)
    evaluations = {row["iter"]: row["val_loss"] for row in again.rows() if "val_loss" in row}
    assert min(evaluations, key=evaluations.__getitem__) == 4
    with Checkpoints(again.out_dir / "checkpoints") as checkpoints:
        assert checkpoints.iterations() == [4, 13]
        assert checkpoints.progress(13).best_iteration == 4
    run(smallest, max_iters=16, eval_interval=4, keep_last=1, init_from="resume", **worse)
    assert preflight.iterations(again.out_dir / "checkpoints") == [4, 17]


def test_the_model_folder_has_the_best_weights_and_the_tokenizer(
    finished: train.Result, base_config: TrainConfig, text: str
):
    model, params, tokenizer = core.load(finished.model_dir)
    evaluations = [row["val_loss"] for row in finished.rows() if "val_loss" in row]
    assert finished.best_val_loss == min(evaluations) < evaluations[-1]
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(text[:99])) == text[:99]
    dataset = open_dataset(Path(base_config.data_dir) / "small", block_size=16)
    losses = [
        mean_loss(params, model, next_tokens(jnp.asarray(batch_BS)))
        for batch_BS in (
            dataset.batch("eval_val", seed=base_config.seed, step=step, rows=5, length=17)
            for step in range(4)
        )
    ]
    assert np.mean(losses) == pytest.approx(finished.best_val_loss, abs=1e-5)


def test_a_run_in_two_parts_is_the_run_in_one(finished: train.Result, config: TrainConfig):
    run(config, max_iters=20)
    assert_same_run(run(config, init_from="resume"), finished)


def test_looking_more_often_does_not_change_the_training(
    finished: train.Result, config: TrainConfig
):
    other = run(config, eval_interval=7, eval_iters=1, log_interval=3, ckpt_interval=4)
    assert different_arrays(finished.out_dir, other.out_dir) == []
    losses = {row["iter"]: row.get("train_loss") for row in finished.rows() if "lr" in row}
    logged = {row["iter"]: row.get("train_loss") for row in other.rows() if "lr" in row}
    assert logged == {i: losses[i] for i in range(0, 41, 3)}


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_stops_with_a_checkpoint_from_which_the_run_goes_on(
    config: TrainConfig, tmp_path: Path, number: signal.Signals
):
    def interrupt() -> None:
        while len(read_rows(Path(config.out_dir) / "metrics.jsonl")) < 15:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    former = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = run(config, max_iters=10**6)
    thread.join()
    assert stopped.stopped_by is number
    assert signal.getsignal(number) is former
    last = stopped.iteration + 13 - stopped.iteration % 10  # both runs end on an odd iteration
    again = run(config, init_from="auto", max_iters=last)
    assert_same_run(again, run(config, out_dir=str(tmp_path / "whole"), max_iters=last))


def test_a_finished_run_resumed_does_nothing(finished: train.Result, config: TrainConfig):
    before = (finished.out_dir / "metrics.jsonl").read_bytes()
    again = run(config, out_dir=str(finished.out_dir), init_from="auto")
    assert again == finished
    assert (finished.out_dir / "metrics.jsonl").read_bytes() == before


def test_the_state_to_begin_with_can_be_donated(finished: train.Result, config: TrainConfig):
    """jax#18617: otherwise the first update needs the state twice, and does not fit."""
    tuning = dataclasses.replace(config, init_from=str(finished.model_dir))
    origin = origin_lib.begin(
        tuning,
        preflight.check(tuning),
        None,
        key=jax.random.key(0),
        devices=open_devices(tuning),
    )
    for state in (last_state(finished.out_dir), origin.state):
        before = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
        add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
        after = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(add_one(state))}
        assert after == before


def test_update_i_sees_batch_i(config: TrainConfig):
    still = run(config, learning_rate=0.0, min_lr=0.0, dropout=0.0)
    model, params, _ = core.load(still.model_dir)
    dataset = open_dataset(Path(config.data_dir) / config.dataset, block_size=16)
    logged = {row["iter"]: row["train_loss"] for row in still.rows() if "train_loss" in row}
    for i in (0, 7, 33):
        batch_BS = dataset.batch("train", seed=config.seed, step=i, rows=15, length=17)
        expected = mean_loss(params, model, next_tokens(jnp.asarray(batch_BS)))
        assert logged[i] == pytest.approx(float(expected), abs=1e-5)


def test_a_second_signal_takes_effect_at_once():
    # Whoever starts a process in the background may have it ignore this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with loop._stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(config: TrainConfig):
    run(config, max_iters=10)
    blown_up = {"learning_rate": 1e38, "decay_lr": False, "init_from": "resume"}
    with pytest.raises(
        train.TrainError, match=r"iteration 1[12]: .* is (nan|inf).*checkpoints/11\. Try"
    ):
        run(config, **blown_up)
    assert run(config, init_from="resume", max_iters=10).iteration == 11
    rows = read_rows(Path(config.out_dir) / "metrics.jsonl")
    assert all(np.isfinite(value) for row in rows for value in row.values() if value is not None)


def test_an_earlier_run_is_not_overwritten_unless_told(config: TrainConfig):
    run(config, max_iters=0)
    with pytest.raises(train.TrainError, match="holds an earlier run; continue it with"):
        run(config, max_iters=0)
    again = run(config, max_iters=1, overwrite=True)
    assert [row["iter"] for row in again.rows()] == [0, 0, 1, 1]


def test_weights_that_a_new_run_would_remove_are_not_begun_from(
    finished: train.Result, config: TrainConfig
):
    places = {"out_dir": str(finished.out_dir), "init_from": str(finished.model_dir)}
    with pytest.raises(train.TrainError, match="overwrite=True would remove it"):
        run(config, **places, overwrite=True)
    core.load(finished.model_dir)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"sliding_window": 64}, GptOssConfig()),
        ({"experts_per_token": 3}, GptOssConfig()),
        ({"family": "gpt_oss"}, GPT2Config()),
        ({"n_expert": 4}, GPT2Config()),
        ({"bias": True}, GptOssConfig()),
    ],
)
def test_what_only_experts_have_is_not_overridden_in_silence(changes: dict[str, Any], found: Any):
    ((key, value),) = changes.items()
    with pytest.raises(train.TrainError, match=f"{key}={value} (but the weights|has no effect on)"):
        preflight.check_shape(TrainConfig(**changes, init_from="model"), found, Path("model"))
    preflight.check_shape(TrainConfig(), found, Path("model"))


def test_a_dry_run_is_of_the_shape_that_would_be_trained(
    finished: train.Result, config: TrainConfig
):
    """Not of the keys' defaults, where the weights decide."""
    resumed = TrainConfig(
        data_dir=config.data_dir,
        dataset=config.dataset,
        block_size=config.block_size,
        out_dir=str(finished.out_dir),
        init_from="resume",
    )
    tuned = dataclasses.replace(resumed, init_from=str(finished.model_dir), block_size=8)
    tuned = dataclasses.replace(tuned, out_dir=config.out_dir)
    for asked in (resumed, tuned):
        shape = dry_run._shape(asked, preflight.check(asked))
        assert (shape.axes["L"], shape.axes["D"]) == (config.n_layer, config.n_embd)
        assert shape.context_length == asked.block_size


def test_an_out_dir_that_is_a_file_is_refused(config: TrainConfig):
    Path(config.out_dir).write_text("mine")
    with pytest.raises(train.TrainError, match="is not a folder"):
        run(config, overwrite=True)


def test_a_folder_that_is_no_run_is_never_touched(finished: train.Result, config: TrainConfig):
    with pytest.raises(train.TrainError, match=r"has config\.json but no metrics\.jsonl"):
        run(config, out_dir=str(finished.model_dir), overwrite=True)
    core.load(finished.model_dir)


def test_auto_begins_anew_what_died_before_its_first_checkpoint(config: TrainConfig):
    out_dir = Path(config.out_dir)
    out_dir.mkdir()
    (out_dir / "metrics.jsonl").write_text(
        '{"iter": 0, "val_loss": 1.0, "train_eval_loss": 1.0}\n{"it'
    )
    result = run(config, init_from="auto", max_iters=1)
    assert [row["iter"] for row in result.rows()] == [0, 0, 1, 1]


def test_auto_begins_anew_what_left_a_model_but_no_checkpoint(config: TrainConfig):
    with pytest.raises(train.TrainError, match="none was written yet"):
        run(config, learning_rate=1e38, decay_lr=False)
    core.load(Path(config.out_dir) / "model")
    result = run(config, init_from="auto", max_iters=1)
    assert [row["iter"] for row in result.rows()] == [0, 0, 1, 1]


@pytest.mark.parametrize("removed", ["checkpoints", "checkpoints/*"])
@pytest.mark.parametrize("was_killed", [True, False])
def test_auto_keeps_the_model_of_a_run_whose_checkpoints_were_removed(
    smallest: TrainConfig, removed: str, was_killed: bool
):
    first = run(smallest, max_iters=1)
    for path in list(first.out_dir.glob(removed)):
        shutil.rmtree(path)
    if was_killed:
        (first.out_dir / "loss.png").unlink()
    with pytest.raises(train.TrainError, match=r"has a model but .* init_from=.*out/model and"):
        run(smallest, init_from="auto", max_iters=1)
    core.load(first.model_dir)
    assert len(first.rows()) == 4
    again = run(smallest, init_from="auto", max_iters=0, overwrite=True)
    assert [row["iter"] for row in again.rows()] == [0, 0]


def test_resume_without_a_checkpoint_says_so(config: TrainConfig):
    with pytest.raises(train.TrainError, match="no checkpoint to resume from"):
        run(config, init_from="resume")


def test_resume_with_another_shape_says_so(finished: train.Result, config: TrainConfig):
    where = {"out_dir": str(finished.out_dir), "init_from": "resume"}
    with pytest.raises(train.TrainError, match="n_layer=3 but the weights have 2"):
        run(config, **where, n_layer=3)
    with pytest.raises(train.TrainError, match="trained with block_size=16, the config says 8"):
        run(config, **where, block_size=8)


def test_a_model_folder_is_where_fine_tuning_begins(finished: train.Result, config: TrainConfig):
    start = {"init_from": str(finished.model_dir), "dropout": 0.0}
    default = TrainConfig()
    shape = {name: getattr(default, name) for name in ("n_layer", "n_head", "n_embd", "bias")}
    looked = run(config, **start, **shape, eval_only=True)
    assert looked.losses["val_loss"] == pytest.approx(finished.best_val_loss, abs=1e-6)
    assert not Path(config.out_dir).exists()
    tuned = run(config, **start, **shape, block_size=8, max_iters=10)
    assert core.load(tuned.model_dir)[0].config.context_length == 8
    assert tuned.rows()[0]["val_loss"] == pytest.approx(finished.best_val_loss, abs=0.1)


def test_a_folder_that_does_not_fit_is_refused(
    finished: train.Result, config: TrainConfig, tmp_path: Path
):
    folder = str(finished.model_dir)
    with pytest.raises(train.TrainError, match="has 16 positions; block_size=17 is more"):
        run(config, init_from=folder, block_size=17)
    with pytest.raises(train.TrainError, match="n_head=2 but the weights have 3"):
        run(config, init_from=folder, n_head=2)
    other = Tokenizer.characters("ab")
    prepare(["ab" * 200], tmp_path / "ab", tokenizer=other)
    with pytest.raises(train.TrainError, match="written with a vocabulary of 2"):
        run(config, init_from=folder, data_dir=str(tmp_path), dataset="ab")


def test_kernels_in_int8_are_no_beginning(
    finished: train.Result, config: TrainConfig, tmp_path: Path
):
    import convert

    rounded = convert.convert(finished.model_dir, out=tmp_path / "int8", quantization="int8")
    with pytest.raises(train.TrainError, match="its kernels are int8, which has no gradients"):
        run(config, init_from=str(rounded))


@pytest.fixture
def swapped(config: TrainConfig, text: str, tmp_path: Path) -> dict[str, str]:
    """Another dataset whose vocabulary has the size of the first, but other characters in it."""
    other = text.replace("e", "\N{LATIN SMALL LETTER E WITH ACUTE}")
    prepare([other], tmp_path / "swapped", tokenizer=Tokenizer.characters(other))
    return {"data_dir": str(tmp_path), "dataset": "swapped"}


def test_a_vocabulary_of_the_same_size_is_compared(
    finished: train.Result, config: TrainConfig, swapped: dict[str, str]
):
    with pytest.raises(train.TrainError, match=r"swapped: written with another tokenizer than .*"):
        run(config, init_from=str(finished.model_dir), **swapped)


def test_a_model_folder_with_settings_but_no_tokenizer_is_where_fine_tuning_begins(
    finished: train.Result, config: TrainConfig, tmp_path: Path
):
    folder = shutil.copytree(finished.model_dir, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert (folder / "tokenizer_config.json").exists()
    assert run(config, init_from=str(folder), eval_only=True).losses


def test_a_run_is_resumed_on_other_text_in_the_same_characters_only(
    config: TrainConfig, text: str, tmp_path: Path, swapped: dict[str, str]
):
    run(config, max_iters=0)
    again = {"init_from": "resume", "max_iters": 1}
    with pytest.raises(train.TrainError, match="swapped: written with another tokenizer than"):
        run(config, **again, **swapped)
    prepare(["ab" * 200], tmp_path / "ab", tokenizer=Tokenizer.characters("ab"))
    with pytest.raises(train.TrainError, match=r"ab: written with a vocabulary of 2, .*out/model"):
        run(config, **again, data_dir=str(tmp_path), dataset="ab")
    prepare([text[::-1]], tmp_path / "same", tokenizer=Tokenizer.characters(text))
    resumed = run(config, **again, data_dir=str(tmp_path), dataset="same")
    assert resumed.iteration == 2


def test_a_folder_that_is_not_there_is_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no such model folder"):
        run(config, init_from="nowhere")
    with pytest.raises(
        train.TrainError, match="python -m convert --model=gpt2-xl --out=models/gpt2-xl"
    ):
        run(config, init_from="gpt2-xl")


def test_missing_data_is_found_before_anything_is_written(config: TrainConfig, tmp_path: Path):
    with pytest.raises(DataError, match="no such folder; make it with"):
        run(config, dataset="nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_named(config: TrainConfig):
    with pytest.raises(train.TrainError, match="device=cuda:99: not there; jax sees"):
        run(config, device="cuda:99")


def test_gpt2s_vocabulary_is_padded_and_a_characters_is_not(config: TrainConfig):
    small = open_dataset(Path(config.data_dir) / config.dataset, block_size=16)
    gpt2 = dataclasses.replace(small, vocab_size=50257)
    assert origin_lib.model_config(config, small).vocab_size == small.vocab_size
    assert origin_lib.model_config(config, gpt2).vocab_size == 50304


@pytest.mark.slow
def test_op_by_op_is_the_same_mathematics(config: TrainConfig):
    short = {"n_layer": 1, "gradient_accumulation_steps": 1, "dropout": 0.0, "max_iters": 0}
    rows = [
        run(config, **short, overwrite=True, eval_iters=1, compile=compiled).rows()[1]
        for compiled in (True, False)
    ]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_model_without_a_tokenizer_goes_on_with_gpt2s_ids(config: TrainConfig, tmp_path: Path):
    """nanoGPT's token files have none beside them, and their model's vocabulary is padded."""
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(200, dtype=np.uint16).tofile(folder / name)
    raw = dataclasses.replace(
        config, data_dir=str(tmp_path), dataset="openwebtext", n_layer=1, eval_iters=1
    )
    run(raw, max_iters=0)
    assert run(raw, max_iters=1, init_from="resume").iteration == 2


@pytest.mark.slow
def test_only_improvements_are_saved_when_asked(config: TrainConfig):
    rising = {"learning_rate": 0.5, "decay_lr": False, "grad_clip": 0.0}
    result = run(config, **rising, always_save_checkpoint=False)
    evaluations = {row["iter"]: row["val_loss"] for row in result.rows() if "val_loss" in row}
    with Checkpoints(result.out_dir / "checkpoints") as checkpoints:
        kept = set(checkpoints.iterations()) - {41}
    best_so_far = [
        i
        for i in evaluations
        if i and evaluations[i] < min(loss for j, loss in evaluations.items() if j < i)
    ]
    assert kept == set(best_so_far[-2:])


@pytest.fixture
def smallest(smallest_config: TrainConfig, tmp_path: Path) -> TrainConfig:
    return dataclasses.replace(smallest_config, out_dir=str(tmp_path / "out"))


def test_every_kth_checkpoint_is_kept_for_good(smallest: TrainConfig):
    many = {"max_iters": 9, "eval_interval": 20, "ckpt_interval": 2}
    run(smallest, **many, keep_last=1, keep_every=4)
    with Checkpoints(Path(smallest.out_dir) / "checkpoints") as checkpoints:
        kept = set(checkpoints.iterations())
    evaluated = {9}
    assert kept - evaluated == {4, 8, 10}


def test_a_weight_that_is_not_finite_is_named(smallest: TrainConfig, tmp_path: Path):
    """The gradient is then nan everywhere, which says nothing."""
    first = run(smallest, max_iters=0)
    model, params, tokenizer = core.load(first.model_dir)
    params["blocks"]["0"]["mlp"]["up"]["kernel"] = jnp.full((8, 32), jnp.inf)
    model_folder.save(tmp_path / "sick", model.config, params, tokenizer=tokenizer)
    with pytest.raises(
        train.TrainError,
        match=r"iteration 0: .*val_loss is nan.*, blocks\.0\.mlp\.up\.kernel is not",
    ):
        run(smallest, init_from=str(tmp_path / "sick"), out_dir=str(tmp_path / "other"))


def test_a_full_evaluation_is_every_window_once(smallest: TrainConfig):
    done = run(smallest, max_iters=0, eval_mode="full", batch_size=7)
    model, params, _ = core.load(done.model_dir)
    tokens = open_dataset(Path(smallest.data_dir) / "small", block_size=12).tokens["val"][:]
    count = (len(tokens) - 1) // 12
    windows_BS = np.stack([tokens[12 * i : 12 * i + 13] for i in range(count)]).astype(np.int32)
    assert count % 7  # the last batch is a shorter one
    expected = mean_loss(params, model, next_tokens(jnp.asarray(windows_BS)))
    assert done.best_val_loss == pytest.approx(float(expected), abs=2e-6)


@pytest.mark.slow
def test_in_epochs_every_window_is_learned_from_once(smallest: TrainConfig):
    """With a learning rate of zero the mean loss over an epoch is the mean over the windows."""
    still = {"learning_rate": 0.0, "min_lr": 0.0, "data_order": "epoch"}
    dataset = open_dataset(Path(smallest.data_dir) / "small", block_size=12)
    tokens = dataset.tokens["train"][:]
    count = (len(tokens) - 1) // 12
    rows = next(r for r in range(40, 400) if count % r == 0 or r > 300)
    done = run(smallest, **still, batch_size=rows, max_iters=count // rows - 1)
    if count % rows:
        pytest.skip("no batch divides the text's windows")
    model, params, _ = core.load(done.model_dir)
    windows_BS = np.stack([tokens[12 * i : 12 * i + 13] for i in range(count)]).astype(np.int32)
    expected = mean_loss(params, model, next_tokens(jnp.asarray(windows_BS)))
    losses = [row["train_loss"] for row in done.rows() if "train_loss" in row]
    assert np.mean(losses) == pytest.approx(float(expected), abs=1e-5)


def test_one_batch_is_seen_again_and_again_when_asked(smallest: TrainConfig):
    still = run(smallest, learning_rate=0.0, min_lr=0.0, overfit_batch=True)
    assert len({row["train_loss"] for row in still.rows() if "train_loss" in row}) == 1


def test_what_is_no_model_folder_is_told_how_to_become_one(smallest: TrainConfig, tmp_path: Path):
    (tmp_path / "ckpt.pt").write_bytes(b"PK\3\4")
    with pytest.raises(
        train.TrainError,
        match=r"not a model folder; make one .* python -m convert --source=.*/ckpt\.pt --out=models/ckpt,",
    ):
        run(smallest, init_from=str(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"iter": 1', "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"iter": "1"}', "line 2: expected an object"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / "metrics.jsonl").write_text(f'{{"iter": 0}}\n{line}\n{{"iter": 2')
    with pytest.raises(train.TrainError, match=rf"metrics\.jsonl, {message}"):
        read_rows(tmp_path / "metrics.jsonl")


def test_a_runs_folder_is_told_where_its_model_is(finished: train.Result, config: TrainConfig):
    with pytest.raises(train.TrainError, match=r"a run's folder; its .* init_from=.*/model$"):
        run(config, init_from=str(finished.out_dir))


def test_an_update_is_compiled_once_and_once_more_after_resuming(
    smallest: TrainConfig, caplog: pytest.LogCaptureFixture
):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run(smallest, max_iters=9)
        run(smallest, max_iters=19, init_from="resume")
    compiled = re.findall(
        r"Compiling jit\((update|loss_of)\)|Compiling (update|loss_of) ", caplog.text
    )
    assert sorted("".join(names) for names in compiled) == ["loss_of"] * 2 + ["update"] * 2


@pytest.mark.slow
def test_twenty_saves_leave_no_memory_behind(tmp_path: Path):
    """orbax#2090 and marin#6774: host memory that grows with every save."""
    state = State({"w": jnp.ones((4_000_000,))}, {"m": jnp.ones((4_000_000,))})
    progress = Progress(model={}, best_val_loss=1.0)
    pages = []
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for i in range(20):
            checkpoints.save(i, state, progress)
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert pages[19] < 1.15 * pages[3]


# Orbax leaves coroutines behind when a read fails; they complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["_CHECKPOINT_METADATA", "state", "d", "everything"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(smallest: TrainConfig, damage: str):
    run(smallest)
    folder = Path(smallest.out_dir) / "checkpoints" / "4"
    files = [p for p in folder.rglob("*") if p.is_file()]
    for path in files:
        if damage == "everything" or damage in path.parts or path.name == damage:
            path.write_bytes(b"\xff" * 7)
    with pytest.raises(
        train.TrainError, match=r"checkpoints/4: not a checkpoint .* continue from 3$"
    ):
        run(smallest, init_from="auto")
    shutil.rmtree(folder)
    assert run(smallest, init_from="auto").iteration == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema_decay": 0.9}, "ema_decay was 'off' and is 'on', and a state"),
        ({"skip_spikes": 6.0}, "skip_spikes was 'off' and is 'on', and a state"),
        ({"optimizer": "muon"}, "optimizer was 'adamw' and is 'muon', and a state"),
        ({"dtype": "float16"}, "dtype was 'another' and is 'float16', and a state"),
    ],
)
def test_a_resumed_run_keeps_what_its_state_consists_of(
    finished: train.Result, config: TrainConfig, change: dict, message: str
):
    with pytest.raises(train.TrainError, match=message):
        run(config, out_dir=str(finished.out_dir), init_from="resume", **change)


@pytest.mark.slow
def test_muon_learns_and_goes_on(smallest: TrainConfig, tmp_path: Path):
    by_muon = dataclasses.replace(smallest, optimizer="muon", eval_interval=20)
    run(by_muon, max_iters=4)
    parts = run(by_muon, init_from="resume", max_iters=19)
    whole = run(by_muon, out_dir=str(tmp_path / "whole"), max_iters=19)
    assert different_arrays(parts.out_dir, whole.out_dir) == []
    losses = [row["train_loss"] for row in whole.rows() if "train_loss" in row]
    assert np.mean(losses[-3:]) < losses[0] - 0.1


@pytest.mark.slow
def test_a_tiny_gpt_oss_learns_and_goes_on(smallest: TrainConfig, tmp_path: Path):
    sparse = dataclasses.replace(
        smallest, family="gpt_oss", n_kv_head=1, n_expert=3, experts_per_token=2, sliding_window=5
    )
    run(sparse, max_iters=1)
    parts = run(sparse, init_from="resume", max_iters=19, eval_interval=20)
    whole = run(sparse, out_dir=str(tmp_path / "whole"), max_iters=19, eval_interval=20)
    assert different_arrays(parts.out_dir, whole.out_dir) == []
    losses = [row["train_loss"] for row in whole.rows() if "train_loss" in row]
    assert np.mean(losses[-3:]) < losses[0] - 0.1
    tuned = run(sparse, init_from=str(whole.model_dir), out_dir=str(tmp_path / "t"), max_iters=0)
    assert tuned.rows()[0]["val_loss"] == pytest.approx(whole.best_val_loss, abs=1e-6)
