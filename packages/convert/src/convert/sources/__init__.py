"""What a checkpoint on disk is, whatever wrote it: a config, named tensors that are read one by one, and files to copy.

A source knows names, shapes and bytes. It never knows what a tensor means: that is the mapping's business.
"""

import dataclasses
import importlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from convert.errors import ConvertError
from core.tokenizer import TOKENIZER_FILES

CONFIG = "config.json"
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
"""What is copied beside the weights, where it is there."""

GENUINE_BYTES = 64
"""As much of a file as `check_genuine` looks at."""

_JSON_LIMIT = 1 << 27  # bytes; an index of a thousand shards has a hundredth of that


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

    `format` is a key of `READERS`. `config` says what the tensors are, in the words of whoever wrote it. `files` are
    all that decide what the model is (config, index, weights), `companions` the tokenizer and generation files, by the
    name they shall have: a file to copy, or its content. `notes` are for the user to hear. `origin` is what is known of
    where the weights were before they were here.
    """

    path: Path
    format: str
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: tuple[Path, ...]
    companions: Mapping[str, Path | bytes]
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Reader(Protocol):
    """What a module of this package offers.

    `recognizes` looks at what lies at a path, cheaply, and never raises; `open` raises ConvertError for whatever is
    wrong there; `EXPECTED` says in a few words what it opens.
    """

    EXPECTED: str

    def recognizes(self, path: Path) -> bool: ...

    def open(self, path: Path) -> Source: ...


READERS = {
    "model_folder": "convert.sources.model_folder",
    "safetensors": "convert.sources.safetensors",
    "nanogpt": "convert.sources.nanogpt",
    "torch": "convert.sources.torch_zip",
    "tensorflow": "convert.sources.tf_bundle",
    "llmc": "convert.sources.llmc",
    "tensorport": "convert.sources.tensorport",
    "npz": "convert.sources.npz",
    "flax_msgpack": "convert.sources.flax_msgpack",
    "orbax": "convert.sources.orbax",
}
"""The module that reads each format, in the order in which they are tried."""


def open_source(path: str | Path, *, format: str = "auto") -> Source:
    """Opens the checkpoint at `path`, a folder or a file, by what it contains, or as the format that is named.

    Raises:
      ConvertError: nothing there, nothing that is understood, or a file that is damaged.
    """
    if format not in ("auto", *READERS):
        raise ConvertError(f"format {format!r} is not one of auto, {', '.join(READERS)}")
    path = Path(path)
    try:
        if not path.exists():
            raise ConvertError(f"{path}: no such file or folder")
        if not (path.is_file() or path.is_dir()):
            raise ConvertError(f"{path}: neither a file nor a folder; expected a checkpoint")
        formats = READERS if format == "auto" else [format]
        for name in formats:
            if format != "auto":
                return _open_as(name, path)
            if _reader(name).recognizes(path):
                return _with_others_noted(_reader(name).open(path), name, path)
    except OSError as error:
        raise ConvertError(f"{path}: {error}") from error
    expected = "; ".join(_reader(format).EXPECTED for format in formats)
    raise ConvertError(f"{path}: {_seen(path)}; expected one of: {expected}")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`."""
    if path.exists() and not path.is_file():
        raise ConvertError(f"{path}: not a file; expected JSON")
    try:
        with path.open("rb") as file:
            text = file.read(_JSON_LIMIT)
        check_genuine(path, text[:GENUINE_BYTES])
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


def check_genuine(path: Path, start: bytes) -> None:
    """Raises ConvertError if the file at `path`, beginning with `start`, is what downloads leave in its place."""
    if start.startswith(b"version https://git-lfs"):
        raise ConvertError(
            f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` there, or download it again"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConvertError(f"{path}: a web page, not the file itself; download it again")


def map_file(path: Path) -> mmap.mmap | bytes:
    """Returns a file's bytes, mapped and not read; an empty file cannot be mapped and is b""."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""


def reader(
    buffer: mmap.mmap | bytes, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> Callable[[], np.ndarray]:
    """Returns the `read` of a tensor whose numbers lie in C order at a byte of `buffer`."""
    return lambda: np.ndarray(shape, dtype, buffer=buffer, offset=offset)


def companions(folder: Path) -> dict[str, Path | bytes]:
    """Returns the tokenizer and generation files that lie in `folder`."""
    return {name: folder / name for name in COMPANIONS if (folder / name).is_file()}


def _open_as(format: str, path: Path) -> Source:
    try:
        return _reader(format).open(path)
    except OSError as error:
        expected = _reader(format).EXPECTED
        raise ConvertError(f"{path}: {error}; as {format} expected {expected}") from error


def _with_others_noted(source: Source, format: str, path: Path) -> Source:
    """Adds a note if the folder holds other formats too, of which nobody could tell which was meant."""
    rest = list(READERS)[list(READERS).index(format) + 1 :]
    if format == "model_folder" or not path.is_dir():
        return source
    others = [name for name in rest if _reader(name).recognizes(path)]
    if not others:
        return source
    note = f"{path} holds {' and '.join(others)} too; {format} is read, --format={others[0]} reads the other"
    return dataclasses.replace(source, notes=(*source.notes, note))


def _reader(format: str) -> Reader:
    return cast(Reader, importlib.import_module(READERS[format]))


def _seen(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            check_genuine(path, file.read(GENUINE_BYTES))
        return f"a file of {path.stat().st_size:,} bytes that begins as none of the formats does"
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder"
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"no weights that are understood among {listed}"
