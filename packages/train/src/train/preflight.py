"""Everything about a run that can be refused before jax starts, which takes longer than all of this."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import checkpoint as model_folder
from core.checkpoint import CheckpointError, ModelFolder
from core.config import PRESETS, Config, GPT2Config, GptOssConfig
from core.errors import FlaxmillError
from core.tokenizer import Tokenizer
from train.config import TrainConfig, keys_without_effect
from train.data import GPT2_VOCAB_SIZE, Dataset, open_dataset

METRICS_FILE = "metrics.jsonl"
# In the order of removal: a folder with metrics.jsonl in it is a run.
RUN_FILES = (
    "config.json",
    "environment.json",
    "checkpoints",
    "model",
    "loss.png",
    "tensorboard",
    "wandb",
    "profile",
    METRICS_FILE,
)
# In checkpoints/, until the first of them is whole: tells a run that was killed early from one that was tidied up.
NONE_YET = ".none_yet"
PADDED_GPT2_VOCAB_SIZE = 50304  # the next multiple of 64 (nanoGPT); products of odd width are slow


class TrainError(FlaxmillError):
    """A run that cannot begin or go on; says what to change."""


@dataclass(frozen=True)
class Plan:
    """What a run begins with: its data, and the folder of the weights unless they are fresh or a checkpoint's."""

    dataset: Dataset
    resumes: bool
    folder: ModelFolder | None


def check(config: TrainConfig) -> Plan:
    """Opens what `config` names and returns it.

    Raises:
      DataError: the data folder is missing or corrupt.
      TrainError: `out_dir` holds another run, or the weights do not fit.
      CheckpointError: the model folder to start from cannot be read.
    """
    dataset = open_dataset(Path(config.data_dir) / config.dataset, block_size=config.block_size)
    if config.sample_tokens:
        _check_prompt(config, dataset)
    resumes = _check_out_dir(config, Path(config.out_dir))
    has_weights = not resumes and config.init_from not in ("scratch", "auto")
    folder = _open_weights(config, dataset) if has_weights else None
    if folder is not None and config.overwrite and not (config.eval_only or config.dry_run):
        _check_is_elsewhere(folder.path, Path(config.out_dir))
    return Plan(dataset, resumes, folder)


def iterations(checkpoints: Path) -> list[int]:
    """Returns the iterations of which a checkpoint is there; Orbax gives one its name when it is whole."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())


def check_shape(config: TrainConfig, found: Config, path: Path) -> None:
    """Refuses a shape key that was set to something else than the weights have; at its default, the weights decide."""
    default = TrainConfig()
    wrong = [
        f"{name}={getattr(config, name)} but the weights have {value}"
        for name, value in _shape(found).items()
        if getattr(config, name) not in (value, getattr(default, name))
    ]
    wrong += [
        f"{name}={getattr(config, name)} has no effect on the weights' family, {found.family}"
        for name in keys_without_effect(config, found.family)
    ]
    if wrong:
        raise TrainError(f"{path}: {'; '.join(wrong)}; set the same or leave the key out")


def check_vocabulary(path: Path, found: Config, dataset: Dataset) -> None:
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


def _check_prompt(config: TrainConfig, dataset: Dataset) -> None:
    prompt = config.sample_prompt
    if dataset.tokenizer is None:
        raise TrainError(
            f"sample_tokens={config.sample_tokens}: {dataset.path} has no tokenizer to write text with; "
            "copy one there, or use sample_tokens=0"
        )
    try:
        count = len(dataset.tokenizer.encode(prompt))
    except FlaxmillError as error:
        raise TrainError(f"sample_prompt={prompt!r}: {error}") from error
    if not 0 < count <= config.block_size - config.sample_tokens:
        raise TrainError(
            f"sample_prompt has {count} tokens, and sample_tokens={config.sample_tokens} more; expected "
            f"at least one, and together at most block_size={config.block_size}"
        )


def _open_weights(config: TrainConfig, dataset: Dataset) -> ModelFolder:
    path = _weights(config)
    try:
        folder = model_folder.open(path)
    except CheckpointError as error:
        if not path.exists() or model_folder.is_model_folder(path):
            raise
        if model_folder.is_model_folder(path / "model"):
            raise TrainError(
                f"init_from={path}: a run's folder; its best weights are init_from={path / 'model'}"
            ) from error
        raise TrainError(
            f"init_from={path}: not a model folder; make one of it with: "
            f"python -m convert --source={path} --out=models/{path.stem}, then init_from=models/{path.stem}"
        ) from error
    found = folder.config
    if (packed := getattr(found, "quantization", None)) is not None:
        how = "python -m convert --experts=bfloat16" if packed == "mxfp4" else "the original"
        raise TrainError(
            f"{path}: its kernels are {packed}, which has no gradients; "
            f"start from the model that it was converted from ({how})"
        )
    check_shape(config, found, path)
    check_vocabulary(path, found, dataset)
    if config.block_size > found.context_length:
        raise TrainError(
            f"{path}: has {found.context_length} positions; block_size={config.block_size} "
            f"is more, lower it"
        )
    return folder


def _check_is_elsewhere(weights: Path, out_dir: Path) -> None:
    """A new run removes the old one first: stopped early, it would leave neither."""
    if weights.resolve().is_relative_to(out_dir.resolve()):
        raise TrainError(
            f"init_from={weights}: overwrite=True would remove it with {out_dir}; choose another out_dir"
        )


def _weights(config: TrainConfig) -> Path:
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


def _shape(found: Config) -> dict[str, Any]:
    sizes = {"n_layer": found.axes["L"], "n_head": found.axes["N"], "n_embd": found.axes["D"]}
    sizes |= {"family": found.family}
    if isinstance(found, GPT2Config):
        return sizes | {"bias": found.use_bias}
    assert isinstance(found, GptOssConfig)
    return sizes | {
        "n_kv_head": found.axes["K"],
        "n_expert": found.axes["E"],
        "experts_per_token": found.num_experts_per_tok,
        "sliding_window": found.sliding_window,
    }


def _check_out_dir(config: TrainConfig, out_dir: Path) -> bool:
    """Returns whether the run in `out_dir` is to be resumed; refuses to harm what is there."""
    if out_dir.exists() and not out_dir.is_dir():
        raise TrainError(f"{out_dir}: exists and is not a folder; choose another out_dir")
    found = [name for name in RUN_FILES if (out_dir / name).exists()]
    if found and METRICS_FILE not in found:
        raise TrainError(
            f"{out_dir}: has {found[0]} but no {METRICS_FILE}, so it is not a training run's; "
            "choose another out_dir"
        )
    if config.init_from in ("resume", "auto"):
        folder = out_dir / "checkpoints"
        if iterations(folder):
            return True
        if config.init_from == "resume":
            raise TrainError(
                f"{folder}: no checkpoint to resume from; use init_from=scratch or auto"
            )
        # Killed before its first checkpoint was whole, a run begins anew.
        if "model" in found and not (folder / NONE_YET).exists() and not config.overwrite:
            raise TrainError(
                f"{out_dir}: has a model but no checkpoint to resume from; continue from the weights "
                f"with init_from={out_dir / 'model'} and another out_dir, "
                "or start anew with overwrite=True"
            )
    elif found and not config.overwrite and not (config.eval_only or config.dry_run):
        raise TrainError(
            f"{out_dir}: holds an earlier run; continue it with init_from=auto, "
            "replace it with overwrite=True, or choose another out_dir"
        )
    return False


def _tokens(tokenizer: Tokenizer) -> Any:
    """Which text has which id. The rest of tokenizer.json depends on the program that wrote it."""
    return json.loads(tokenizer.files()["tokenizer.json"])["model"]["vocab"]
