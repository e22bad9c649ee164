"""Where a run begins: fresh weights, a model folder, or its own last checkpoint."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from core import checkpoint as model_folder
from core.config import PRESETS, GPT2Config
from core.errors import FlaxmillError
from core.models import Model, Params, build
from core.tokenizer import Tokenizer
from train.checkpoint import Checkpoints, Device, owned
from train.config import TrainConfig
from train.data import GPT2_VOCAB_SIZE, Dataset
from train.step import State, initial_state

PADDED_GPT2_VOCAB_SIZE = 50304  # the next multiple of 64 (nanoGPT); products of odd width are slow


class TrainError(FlaxmillError):
    """A run that cannot begin or go on; says what to change."""


@dataclass(frozen=True)
class Origin:
    """The model, its state, how many updates made it, and the best validation loss on the way."""

    model: Model
    state: State
    iteration: int
    best_val_loss: float
    description: str


def begin(
    config: TrainConfig,
    dataset: Dataset,
    checkpoints: Checkpoints | None,
    *,
    key: jax.Array,
    device: Device,
) -> Origin:
    """Returns the beginning that `init_from` asks for; `checkpoints`, if given, holds at least one."""
    if checkpoints is not None:
        return _from_checkpoint(config, dataset, checkpoints, device)
    if config.init_from in ("scratch", "auto"):
        model = build(model_config(config, dataset))
        params, description = model.init(key), "fresh weights"
    else:
        model, params = _from_folder(config, dataset)
        description = f"the weights of {_folder(config)}"
    return Origin(model, initial_state(params, config), 0, math.inf, description)


def model_config(config: TrainConfig, dataset: Dataset) -> GPT2Config:
    """The model that nanoGPT would build from scratch for this data: GELU in its erf form, tied embeddings."""
    vocab_size = dataset.vocab_size
    eos_id = dataset.tokenizer.eos_id if dataset.tokenizer else None
    shape = GPT2Config(
        vocab_size=PADDED_GPT2_VOCAB_SIZE if vocab_size == GPT2_VOCAB_SIZE else vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu",
        use_bias=config.bias,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
    )
    return _with_dropout(shape, config.dropout)


def _from_checkpoint(
    config: TrainConfig, dataset: Dataset, checkpoints: Checkpoints, device: Device
) -> Origin:
    iteration = checkpoints.latest()
    assert iteration is not None
    progress = checkpoints.progress(iteration)
    saved = GPT2Config.from_dict(progress.model)
    path = checkpoints.path(iteration)
    _check_shape(config, saved, path)
    _check_vocabulary(Path(config.out_dir) / "model", saved, dataset)
    if saved.n_positions != config.block_size:
        raise TrainError(
            f"{path}: trained with block_size={saved.n_positions}, the config says "
            f"{config.block_size}; to change it start from the model folder with init_from"
        )
    model = build(_with_dropout(saved, config.dropout))
    like = jax.eval_shape(lambda k: initial_state(model.init(k), config), jax.random.key(0))
    state = checkpoints.restore(iteration, like, device)
    return Origin(model, state, iteration, progress.best_val_loss, f"checkpoint {path}")


def _from_folder(config: TrainConfig, dataset: Dataset) -> tuple[Model, Params]:
    path = _folder(config)
    folder = model_folder.open(path)
    found = folder.config
    if not isinstance(found, GPT2Config):
        raise TrainError(f"{path}: a {found.family}; {GPT2Config.family} is what can be trained")
    if found.quantization is not None:
        raise TrainError(
            f"{path}: its kernels are {found.quantization}, which has no gradients; "
            "start from the model that it was converted from"
        )
    _check_shape(config, found, path)
    _check_vocabulary(path, found, dataset)
    if config.block_size > found.n_positions:
        raise TrainError(
            f"{path}: has {found.n_positions} positions; block_size={config.block_size} "
            f"is more, lower it"
        )
    shape = dataclasses.replace(found, n_positions=config.block_size)
    params = owned(folder.params(jnp.float32))
    params["wpe"]["embedding"] = params["wpe"]["embedding"][: config.block_size]
    return build(_with_dropout(shape, config.dropout)), params


def _folder(config: TrainConfig) -> Path:
    """The model folder that `init_from` names; a released model's is where `convert` is told to put it."""
    if config.init_from not in PRESETS:
        return Path(config.init_from)
    folder = Path("models") / config.init_from
    if not folder.is_dir():
        raise TrainError(
            f"init_from={config.init_from}: {folder} is missing; make it with: "
            f"python -m convert --model={config.init_from} --out={folder}"
        )
    return folder


def _check_shape(config: TrainConfig, found: GPT2Config, path: Path) -> None:
    """Refuses a shape key that was set to something else than the weights have; at its default, the weights decide."""
    shape = {
        "n_layer": found.n_layer,
        "n_head": found.n_head,
        "n_embd": found.n_embd,
        "bias": found.use_bias,
    }
    default = TrainConfig()
    wrong = [
        f"{name}={getattr(config, name)} but the weights have {value}"
        for name, value in shape.items()
        if getattr(config, name) not in (value, getattr(default, name))
    ]
    if wrong:
        raise TrainError(f"{path}: {'; '.join(wrong)}; set the same or leave the key out")


def _check_vocabulary(path: Path, found: GPT2Config, dataset: Dataset) -> None:
    """Refuses ids that mean something else to the model: 65 characters would fit into GPT-2's 50,257 unnoticed."""
    tokenizer, size = Tokenizer.find(path), found.vocab_size
    if tokenizer is not None:
        size = tokenizer.vocab_size
    elif size == PADDED_GPT2_VOCAB_SIZE:
        size = GPT2_VOCAB_SIZE
    advice = (
        f"prepare the text again with --tokenizer={path}" if tokenizer else "use another dataset"
    )
    if dataset.vocab_size != size or size > found.vocab_size:
        raise TrainError(
            f"{dataset.path}: written with a vocabulary of {dataset.vocab_size}, {path} has {size}; "
            f"{advice}"
        )
    if tokenizer and dataset.tokenizer and _tokens(tokenizer) != _tokens(dataset.tokenizer):
        raise TrainError(
            f"{dataset.path}: written with another tokenizer than {path} has; {advice}"
        )


def _tokens(tokenizer: Tokenizer) -> Any:
    """Which text has which id. The rest of tokenizer.json depends on the program that wrote it."""
    return json.loads(tokenizer.files()["tokenizer.json"])["model"]["vocab"]


def _with_dropout(shape: GPT2Config, rate: float) -> GPT2Config:
    return dataclasses.replace(shape, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
