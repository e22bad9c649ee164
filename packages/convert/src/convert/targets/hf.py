"""Hugging Face's folder: what transformers' `from_pretrained` opens, with nothing missing and nothing unexpected."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import mapping, tables
from convert.sources import CONFIG, safetensors
from core import axes, checkpoint, workers
from core.checkpoint import ModelFolder, TensorSpec
from core.config import Config, GPT2Config

IS_FILE = False
SHARD_BYTES = 5_000_000_000


def check(folder: ModelFolder) -> list[str]:
    """Returns nothing: it holds every model."""
    return []


def nbytes(folder: ModelFolder) -> int:
    """Returns the size of the weights."""
    return sum(array.nbytes for array in tensors(folder.config, folder.tensors).values())


def write(
    folder: ModelFolder,
    out: Path,
    on_bytes: Callable[[int], None],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes config.json, the weights (shards and an index above `shard_bytes`), and copies the tokenizer's files."""
    weights = tensors(folder.config, folder.tensors)
    _write_weights(out, weights, shard_bytes, on_bytes)
    _write_json(out / CONFIG, _config(folder.config, weights))
    for name in folder.manifest["files"].keys() - {checkpoint.CONFIG}:
        (out / name).write_bytes((folder.path / name).read_bytes())
    if _lacks_biases(folder.config):
        return ["the model has no biases; the export has zeros, as GPT2LMHeadModel needs them"]
    return []


def is_own(path: Path) -> bool:
    """Tells whether a model as Hugging Face stores it lies at `path`, and no training run around one."""
    weights = (safetensors.SINGLE, safetensors.INDEX)
    return (
        (path / CONFIG).is_file()
        and any((path / name).is_file() for name in weights)
        and not any((path / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    )


def tensors(config: Config, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a model's parameters under Hugging Face's names and in its layouts, as views where possible.

    A GPT-2 without biases gets zeros for them, because GPT2LMHeadModel always has biases; it computes the same.
    """
    complete = config
    if isinstance(config, GPT2Config):
        complete = dataclasses.replace(config, use_bias=True)
    dtype = params["wte.embedding"].dtype
    zeros = {
        name: np.broadcast_to(np.zeros((), dtype), axes.shape(word, config.axes))
        for name, word in complete.tensors().items()
        if name not in params
    }
    return {
        move.source: axes.relayout(
            (zeros | dict(params))[move.target], axes.inverse(move.layout), config.axes
        )
        for move in mapping.moves(tables.HF.table(complete), complete)
    }


def _lacks_biases(config: Config) -> bool:
    return isinstance(config, GPT2Config) and not config.use_bias


def _config(config: Config, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns config.json, with the type that most weights have as the type to load them in."""
    kinds = collections.Counter(
        array.dtype.name for array in weights.values() if array.dtype != np.uint8
    )
    return {**config.to_hf(), "dtype": kinds.most_common(1)[0][0]}


def _write_weights(
    out: Path,
    weights: Mapping[str, np.ndarray],
    shard_bytes: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Writes one file, or shards and their index where one file would pass `shard_bytes`."""
    specs = [TensorSpec(name, x.shape, x.dtype.name) for name, x in weights.items()]
    shards = checkpoint.split(specs, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        checkpoint.write_shard(
            out / (safetensors.SINGLE if single else name),
            # The reference writer's order and alignment: wide types first, then by name, on 8 bytes.
            sorted(shard, key=lambda spec: (-weights[spec.name].itemsize, spec.name)),
            lambda spec: checkpoint.parts(weights[spec.name]),
            on_bytes,
            kind="pt",
            alignment=8,
            threads=workers.COUNT,
        )
        weight_map |= dict.fromkeys((spec.name for spec in shard), name)
    if len(shards) > 1:
        total = sum(array.nbytes for array in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(out / safetensors.INDEX, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
