"""Where a run begins: fresh weights, a model folder, or its own last checkpoint."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from core import config as config_lib
from core import sharding
from core.checkpoint import ModelFolder
from core.config import Config, GPT2Config, GptOssConfig
from core.models import Model, Params, build
from train.checkpoint import Checkpoints, Progress, owned
from train.config import TrainConfig
from train.data import GPT2_VOCAB_SIZE, Dataset
from train.devices import Devices
from train.preflight import PADDED_GPT2_VOCAB_SIZE, Plan, check_shape, check_vocabulary
from train.preflight import TrainError as TrainError
from train.step import State, initial_state


@dataclass(frozen=True)
class Origin:
    """The model, its state, how many updates made it, and what else a checkpoint knows."""

    model: Model
    state: State
    iteration: int
    progress: Progress
    description: str

    @property
    def best_val_loss(self) -> float:
        return self.progress.best_val_loss


def begin(
    config: TrainConfig,
    plan: Plan,
    checkpoints: Checkpoints | None,
    *,
    key: jax.Array,
    devices: Devices,
) -> Origin:
    """Returns the beginning that `init_from` asks for; `checkpoints`, if given, holds at least one."""
    if checkpoints is not None:
        return _from_checkpoint(config, plan.dataset, checkpoints, devices)
    if plan.folder is None:
        model = build(model_config(config, plan.dataset))
        state = devices.make(model.config, lambda: initial_state(model.init(key), config))
        description = "fresh weights"
    else:
        model, params = _from_folder(config, plan.folder, devices)
        state = devices.make(model.config, lambda p: initial_state(p, config), params)
        description = f"the weights of {plan.folder.path}"
    progress = Progress(
        model=model.config.to_dict(), best_val_loss=math.inf, choices=_choices(config)
    )
    return Origin(model, state, 0, progress, description)


def model_config(config: TrainConfig, dataset: Dataset) -> Config:
    """The model that `config` builds from scratch for this data."""
    if config.family == "gpt_oss":
        return _gpt_oss(config, dataset)
    return _gpt2(config, dataset)


def _gpt2(config: TrainConfig, dataset: Dataset) -> GPT2Config:
    """As nanoGPT: GELU in its erf form, tied embeddings."""
    vocab_size, eos_id = dataset.vocab_size, _eos_id(dataset)
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
    return dataclasses.replace(shape, **_dropout(shape, config.dropout))


def _gpt_oss(config: TrainConfig, dataset: Dataset) -> GptOssConfig:
    """Small: experts as wide as the model, dense; positions rotate as they are, without YaRN's stretching."""
    return GptOssConfig(
        vocab_size=dataset.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head or config.n_head,
        head_dim=config.n_embd // config.n_head,
        num_local_experts=config.n_expert,
        num_experts_per_tok=config.experts_per_token,
        max_position_embeddings=config.block_size,
        initial_context_length=config.block_size,
        rope_factor=1.0,
        sliding_window=config.sliding_window,
        attention_dropout=config.dropout,
        eos_token_id=_eos_id(dataset),
    )


def _eos_id(dataset: Dataset) -> int | None:
    return dataset.tokenizer.eos_id if dataset.tokenizer else None


def _from_checkpoint(
    config: TrainConfig, dataset: Dataset, checkpoints: Checkpoints, devices: Devices
) -> Origin:
    iteration = checkpoints.latest()
    assert iteration is not None
    progress = checkpoints.progress(iteration)
    saved = config_lib.from_dict(progress.model)
    path = checkpoints.path(iteration)
    check_shape(config, saved, path)
    check_vocabulary(Path(config.out_dir) / "model", saved, dataset)
    if isinstance(saved, GPT2Config) and saved.n_positions != config.block_size:
        raise TrainError(
            f"{path}: trained with block_size={saved.n_positions}, the config says "
            f"{config.block_size}; to change it start from the model folder with init_from"
        )
    changed = [
        f"{key} was {was!r} and is {is_now!r}"
        for key, is_now in _choices(config).items()
        if (was := progress.choices.get(key, is_now)) != is_now
    ]
    if changed:
        raise TrainError(
            f"{path}: {'; '.join(changed)}, and a state consists of other parts then; to change it "
            "start from the model folder with init_from"
        )
    model = build(dataclasses.replace(saved, **_dropout(saved, config.dropout)))
    key = jax.random.key(0)
    like = devices.like(saved, lambda: initial_state(model.init(key), config))
    state = checkpoints.restore(iteration, like)
    return Origin(model, state, iteration, progress, f"checkpoint {path}")


def _from_folder(
    config: TrainConfig, folder: ModelFolder, devices: Devices
) -> tuple[Model, Params]:
    places = sharding.place(folder.config, devices.mesh).shardings
    params = owned(folder.params(jnp.float32, shardings=places))
    if isinstance(folder.config, GPT2Config):
        params["wpe"]["embedding"] = params["wpe"]["embedding"][: config.block_size]
    shape = cropped(folder.config, config)
    return build(dataclasses.replace(shape, **_dropout(shape, config.dropout))), params


def cropped(shape: Config, config: TrainConfig) -> Config:
    """Returns `shape` with as many positions as are trained; those that rotate need no cropping."""
    if isinstance(shape, GPT2Config):
        return dataclasses.replace(shape, n_positions=config.block_size)
    return shape


def _choices(config: TrainConfig) -> dict[str, Any]:
    return {
        "optimizer": config.optimizer,
        "ema_decay": "on" if config.ema_decay else "off",
        "skip_spikes": "on" if config.skip_spikes else "off",
        "dtype": "float16" if config.dtype == "float16" else "another",
    }


def _dropout(shape: Config, rate: float) -> dict[str, float]:
    if isinstance(shape, GptOssConfig):
        return {"attention_dropout": rate}
    return {"embd_pdrop": rate, "attn_pdrop": rate, "resid_pdrop": rate}
