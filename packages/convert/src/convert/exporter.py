"""From a model folder to somebody else's format: the tables of `convert.tables` read from right to left."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import destination, mapping, progress, tables
from convert.errors import ConvertError
from convert.sources import safetensors
from core import axes, checkpoint, folders
from core.checkpoint import TensorSpec
from core.config import GPT2Config

FORMATS = ("hf",)
SHARD_BYTES = 5_000_000_000


def export(
    model: str | Path,
    *,
    to: str,
    out: str | Path,
    overwrite: bool,
    shard_bytes: int = SHARD_BYTES,
    quiet: bool | None = None,
) -> Path:
    """Writes the model folder `model` at `out`; see `convert.export`."""
    if to not in FORMATS:
        raise ConvertError(f"format {to!r} is not one of {', '.join(FORMATS)}")
    model = Path(model)
    destination.check_apart(Path(out), model)
    out = destination.for_export(out, overwrite=overwrite)
    try:
        folder = checkpoint.open(model)
        tensors = hf_tensors(folder.config, folder.tensors)
        total = sum(array.nbytes for array in tensors.values())
        folders.check_space(out, total)
        with (
            folders.fresh(out) as fresh,
            progress.bar("exporting", total, quiet) as advance,
        ):
            _write_weights(fresh, tensors, shard_bytes, advance)
            _write_json(fresh / safetensors.CONFIG, _hf_config(folder.config, tensors))
            for name in folder.manifest["files"].keys() - {checkpoint.CONFIG}:
                (fresh / name).write_bytes((model / name).read_bytes())
    except (checkpoint.CheckpointError, OSError) as error:
        raise ConvertError(str(error)) from error
    return out


def hf_tensors(config: GPT2Config, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a model's parameters under Hugging Face's names and in its layouts, as views where possible.

    A model without biases gets zeros for them, because GPT2LMHeadModel always has biases; it computes the same.
    """
    complete = dataclasses.replace(config, use_bias=True)
    shapes = {name: axes.shape(word, config.axes) for name, word in complete.tensors().items()}
    dtype = tensors["wte.embedding"].dtype
    return {
        move.source: axes.relayout(
            tensors[move.target]
            if move.target in tensors
            else np.zeros(shapes[move.target], dtype),
            axes.inverse(move.layout),
            config.axes,
        )
        for move in mapping.moves(tables.HF[config.family], complete)
    }


def _hf_config(config: GPT2Config, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns config.json, with the type that most weights have as the type to load them in."""
    kinds = collections.Counter(array.dtype.name for array in tensors.values())
    return {**config.to_hf(), "dtype": kinds.most_common(1)[0][0]}


def _write_weights(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    shard_bytes: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Writes one file, or shards and their index where one file would pass `shard_bytes`."""
    specs = [TensorSpec(name, x.shape, x.dtype.name) for name, x in tensors.items()]
    shards = checkpoint.split(specs, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        checkpoint.write_shard(
            folder / (safetensors.SINGLE if single else name),
            # The reference writer's order and alignment: wide types first, then by name, on 8 bytes.
            sorted(shard, key=lambda spec: (-tensors[spec.name].itemsize, spec.name)),
            lambda spec: tensors[spec.name],
            on_bytes,
            kind="pt",
            alignment=8,
        )
        weight_map |= dict.fromkeys((spec.name for spec in shard), name)
    if len(shards) > 1:
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / safetensors.INDEX, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
