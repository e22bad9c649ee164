"""Each of nanoGPT's 33 keys does something: set from the command line's point of view, run, and looked for."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from core import checkpoint as model_folder
from nanogpt_keys import NANOGPT_DEFAULTS
from recorder import Recorder
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.prepare import prepare

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run leaves for others to see."""

    rows: list[dict[str, Any]]
    said: str
    files: set[str]
    checkpoints: list[int]
    shape: dict[str, Any]
    wandb: list[dict[str, Any]]
    updates: int

    def column(self, name: str) -> dict[int, float]:
        return {row["iter"]: row[name] for row in self.rows if name in row}


def losses(seen: Seen) -> Any:
    return seen.column("train_loss")


def weights(seen: Seen) -> Any:
    """Evaluations depend on the weights alone."""
    return seen.column("val_loss")


def rates(seen: Seen) -> Any:
    return seen.column("lr")


def shape(name: str) -> Callable[[Seen], Any]:
    return lambda seen: seen.shape.get(name)


# Key: another value, where that shows, and what else has to be set for it to show.
EFFECTS: dict[str, tuple[Any, Callable[[Seen], Any], dict[str, Any]]] = {
    "out_dir": ("elsewhere", lambda seen: seen.said.split("out_dir ")[1].split("\n")[0], {}),
    "eval_interval": (1, lambda seen: sorted(seen.column("val_loss")), {}),
    "log_interval": (3, lambda seen: sorted(seen.column("train_loss")), {}),
    "eval_iters": (5, lambda seen: seen.column("val_loss")[0], {}),
    "eval_only": (True, lambda seen: (seen.files, seen.updates), {}),
    "always_save_checkpoint": (
        False,
        lambda seen: seen.checkpoints,
        {"learning_rate": 0.0, "min_lr": 0.0},
    ),
    "init_from": ("MODEL", lambda seen: seen.column("val_loss")[0], {}),
    "wandb_log": (True, lambda seen: len(seen.wandb), {}),
    "wandb_project": ("mill", lambda seen: seen.wandb[0]["project"], {"wandb_log": True}),
    "wandb_run_name": ("first", lambda seen: seen.wandb[0]["name"], {"wandb_log": True}),
    "dataset": ("other", losses, {}),
    "gradient_accumulation_steps": (2, losses, {}),
    "batch_size": (5, losses, {}),
    "block_size": (6, shape("n_positions"), {}),
    "n_layer": (2, shape("n_layer"), {}),
    "n_head": (4, shape("n_head"), {}),
    "n_embd": (16, shape("n_embd"), {}),
    "dropout": (0.5, losses, {}),
    "bias": (True, shape("use_bias"), {}),
    "learning_rate": (0.02, rates, {}),
    "max_iters": (4, lambda seen: seen.updates, {}),
    "weight_decay": (10.0, weights, {}),
    "beta1": (0.1, weights, {}),
    "beta2": (0.5, weights, {}),
    "grad_clip": (0.01, weights, {"eps": 1e-2}),  # Adam undoes a scale, all but its epsilon
    "decay_lr": (False, rates, {}),
    "warmup_iters": (3, rates, {}),
    "lr_decay_iters": (8, rates, {}),
    "min_lr": (5e-3, rates, {}),
    "dtype": ("bfloat16", lambda seen: (losses(seen), "bfloat16" in seen.said), {}),
    "compile": (
        False,
        lambda seen: seen.said.count("operation by operation"),
        {"max_iters": 0, "eval_iters": 1},
    ),
}
# On one CPU these can only be asked for what is there; what is not there is refused by name.
REFUSED = {"device": "cuda:99", "backend": "horovod"}


@pytest.fixture(scope="module")
def base(
    smallest_config: TrainConfig,
    text: str,
    data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainConfig:
    from core.tokenizer import Tokenizer

    prepare([text[::-1]], data_dir / "other", tokenizer=Tokenizer.characters(text), overwrite=True)
    return smallest_config


@pytest.fixture(scope="module")
def observe(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory):
    """Runs the smallest run with changes; each set of changes once."""
    done: dict[str, Seen] = {}

    def of(changes: dict[str, Any]) -> Seen:
        name = repr(sorted(changes.items()))
        if name not in done:
            folder = tmp_path_factory.mktemp("keys")
            done[name] = _run(base, folder, changes)
        return done[name]

    return of


def _run(base: TrainConfig, folder: Path, changes: dict[str, Any]) -> Seen:
    out_dir = folder / changes.get("out_dir", "out")
    wandb = Recorder("wandb")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setitem(sys.modules, "wandb", wandb)
        config = TrainConfig.from_dict(base.to_dict() | changes | {"out_dir": str(out_dir)})
        result = train.run(config)
    checkpoints: list[int] = []
    if (out_dir / "checkpoints").exists():
        with Checkpoints(out_dir / "checkpoints") as saved:
            checkpoints = saved.iterations()
    model = out_dir / "model"
    return Seen(
        rows=result.rows(),
        said=said.getvalue(),
        files={path.name for path in out_dir.iterdir()} if out_dir.exists() else set(),
        checkpoints=checkpoints,
        shape=model_folder.open(model).config.to_dict() if model.exists() else {},
        wandb=wandb.calls("init"),
        updates=result.iteration,
    )


def test_the_table_is_nanogpts_list():
    assert EFFECTS.keys() | REFUSED.keys() == NANOGPT_DEFAULTS.keys()


@pytest.mark.parametrize("key", EFFECTS)
def test_a_key_has_its_effect(key: str, observe, base: TrainConfig):
    import jax

    value, effect, others = EFFECTS[key]
    with jax.numpy_dtype_promotion("standard"):
        plain = observe(others)
        if value == "MODEL":
            trained = observe({"max_iters": 2})
            value = trained.said.split("out_dir ")[1].split("\n")[0] + "/model"
        changed = observe(others | {key: value})
    assert effect(changed) != effect(plain)


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_cannot_be_honoured_here_is_refused(key: str, base: TrainConfig, tmp_path: Path):
    with pytest.raises(train.TrainError if key == "device" else ValueError, match=REFUSED[key]):
        train.run(
            dataclasses.replace(base, out_dir=str(tmp_path / "out"), **{key: REFUSED[key]}),
            progress=False,
        )
