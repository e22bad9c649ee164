"""What a checkpoint on disk is, whatever wrote it: a config, named tensors that are read one by one, and files to copy.

A source knows names, shapes and bytes. It never knows what a tensor means: that is the mapping's business.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from core import checkpoint


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor where it lies; `read` maps it into memory and copies nothing.

    `dtype` is numpy's name (or ml_dtypes'), and the array may start at any byte: old files do not align theirs.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that has been opened and checked, with nothing read but its headers.

    `config` is its config.json as it stands, `files` are all that decide what the model is (config, index, weights),
    `companions` the tokenizer and generation files beside them, by name.
    """

    path: Path
    format: str
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: tuple[Path, ...]
    companions: Mapping[str, Path]


def open_source(path: str | Path, *, format: str = "auto") -> Source:
    """Opens the checkpoint at `path`, a folder or a weights file, by what it contains.

    Raises:
      ConvertError: nothing there, nothing that is understood, or a file that is damaged.
    """
    if format not in ("auto", "hf"):
        raise ConvertError(f"format {format!r} is not one of auto, hf")
    try:
        return _open(Path(path))
    except OSError as error:
        raise ConvertError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


def _open(path: Path) -> Source:
    from convert.sources import safetensors

    if not path.exists():
        raise ConvertError(f"{path}: no such file or folder")
    if checkpoint.is_model_folder(path if path.is_dir() else path.parent):
        raise ConvertError(
            f"{path}: already a model folder; use it as it is, or write another format with convert.export"
        )
    if safetensors.recognizes(path):
        return safetensors.open_folder(path)
    raise ConvertError(f"{path}: {_seen(path)}; expected {safetensors.EXPECTED}")


def _seen(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes that does not begin as safetensors does"
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder"
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"no safetensors weights among {listed}"
