"""The model folder: what every stage hands to the next.

    config.json                          family and architecture
    model-0000k-of-0000n.safetensors     canonical names and layouts, at most 4 GB a shard, tensors on 64 bytes
    manifest.json                        where everything came from and what it hashes to; written last
    tokenizer.json ...                   copied beside

A tensor's name is its path in the parameter tree. Opening maps the files: a tensor that starts on 64 bytes becomes a
JAX array on the CPU without a copy. Writing streams one tensor at a time into a sibling folder that takes the final
name only when it is whole (`core.folders`), so a folder either has a manifest that is true or does not exist.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from core import axes, folders
from core import config as config_lib
from core.config import Config
from core.errors import CheckpointError as CheckpointError
from core.errors import ConfigError
from core.tokenizer import Tokenizer

SHARD_BYTES = 4 * 10**9
ALIGNMENT = 64  # jax.device_put shares pages from here on
CONFIG = "config.json"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1

PART_BYTES = (
    16 * 2**20
)  # what a tensor is cut into on its way: large enough to cost no time, small enough to hold

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
_NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written: `dtype` by its numpy name ("uint8": quantised); its origin is for the manifest."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...] = ()
    layout: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _NUMPY_DTYPES[_SAFETENSORS_DTYPES[self.dtype]].itemsize


Read = Callable[[TensorSpec], Iterable[np.ndarray]]
"""Gives a tensor's consecutive parts, of its dtype: joined in C order they are the tensor (see `parts`)."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """An opened model folder; `tensors` are read-only views of the mapped files."""

    path: Path
    config: Config
    manifest: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    def params(self, dtype: Any = None) -> dict[str, Any]:
        """Returns the nested parameter dict as JAX arrays, cast to `dtype` if given and they are not quantised.

        On a CPU the arrays share the file's pages and cost no memory: never donate them.
        """
        import jax  # not above: conversion reads and writes folders without it
        from flax import traverse_util

        arrays = {
            name: jax.device_put(x if dtype is None or is_quantised(name) else x.astype(dtype))
            for name, x in self.tensors.items()
        }
        return traverse_util.unflatten_dict(arrays, sep=".")


def open(path: str | Path) -> ModelFolder:
    """Opens the model folder at `path` after checking that it is whole.

    Raises:
      CheckpointError: no folder, no manifest, a shard of another size, or tensors that are not the configuration's.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such model folder; make one with `python -m convert` or `python -m train`"
        )
    manifest = _read_manifest(path / MANIFEST)
    try:
        config = config_lib.from_dict(_read_json(path / CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    tensors = {}
    for shard, size in manifest["shards"].items():
        tensors |= _map_shard(path / shard, size)
    _check_names(path, config, tensors)
    return ModelFolder(path, config, manifest, {n: tensors[n] for n in config.tensors()})


def write(
    path: str | Path,
    *,
    config: Config,
    specs: Sequence[TensorSpec],
    read: Read,
    files: Mapping[str, Path | bytes] | None = None,
    source: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes a model folder and returns its manifest; the output is the same bytes for the same input.

    Args:
      path: where the folder will be; it appears when it is whole.
      config: what the tensors belong to; written as config.json, and hashed in the manifest like `files`.
      specs: every tensor of `config`, in any order.
      read: gives a spec's parts; called once for each spec, and one part is in memory at a time.
      files: what to put beside, by name: contents, or a file to copy.
      source: noted in the manifest: where the weights come from.
      overwrite: replaces a folder that is already there (by renaming, so readers see the old or the new).
      on_bytes: told how many bytes have just been written.
      shard_bytes: no shard is larger, unless one tensor is.

    Raises:
      CheckpointError: `path` exists and is not to be replaced; the specs are not the configuration's; the disk is full.
    """
    path = Path(path)
    check_replaceable(path, overwrite=overwrite)
    _check_specs(path, config, specs)
    folders.check_space(path, sum(spec.nbytes for spec in specs))
    with folders.fresh(path) as partial:
        entries, shards = {}, {}
        plan = split(specs, shard_bytes)
        for number, shard in enumerate(plan, start=1):
            name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            # Sizes divisible by 64 first: then all of those start on 64 bytes, and opening copies none of them.
            aligned_first = sorted(shard, key=lambda spec: spec.nbytes % ALIGNMENT != 0)
            entries |= write_shard(partial / name, aligned_first, read, on_bytes)
            shards[name] = (partial / name).stat().st_size
        version = importlib.metadata.version("flaxmill-core")
        manifest = {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "flaxmill", "version": version},
            "source": dict(source or {}),
            "parameters": config.parameter_count,
            "shards": shards,
            "files": _copy_files(partial, {**(files or {}), CONFIG: _json(config.to_dict())}),
            "tensors": {spec.name: entries[spec.name] for spec in specs},
        }
        (partial / MANIFEST).write_bytes(_json(manifest))
    return manifest


def save(
    path: str | Path,
    config: Config,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    source: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a nested parameter dict as a model folder and returns the manifest; see `write`."""
    from flax import traverse_util

    flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep=".")
    missing, extra = config.tensors().keys() - flat.keys(), flat.keys() - config.tensors().keys()
    if missing or extra:
        raise CheckpointError(
            f"the parameters are not the configuration's: missing {_some(missing)}; not expected {_some(extra)}"
        )
    specs = [
        TensorSpec(name, tuple(flat[name].shape), np.dtype(flat[name].dtype).name)
        for name in config.tensors()
    ]
    return write(
        path,
        config=config,
        specs=specs,
        read=lambda spec: parts(np.asarray(flat[spec.name])),
        files=tokenizer.files() if tokenizer is not None else {},
        source=source,
        overwrite=overwrite,
    )


def is_quantised(name: str) -> bool:
    """Tells whether a tensor holds packed numbers or their scales, in bytes, which no cast may touch."""
    return name.endswith((".blocks", ".scales"))


def is_model_folder(path: Path) -> bool:
    """Tells whether a model folder lies at `path`, of any format version and perhaps damaged."""
    try:
        config, manifest = _read_json(path / CONFIG), _read_json(path / MANIFEST)
    except (CheckpointError, OSError):
        return False
    return "family" in config and "format_version" in manifest


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Checks that a model folder may be written at `path`: nothing is there, or with `overwrite` a model folder.

    Raises:
      CheckpointError: something else is there.
    """
    folders.check_replaceable(
        path, overwrite=overwrite, is_own=is_model_folder, kind="a model folder"
    )


def sha256(path: Path) -> str:
    """Returns a file's SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Returns `specs` in shards, in order, none above `shard_bytes` unless one tensor alone is."""
    shards: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def parts(array: np.ndarray, part_bytes: int = PART_BYTES) -> Iterator[np.ndarray]:
    """Gives `array` in consecutive parts of at most `part_bytes`: views where its memory is in C order, else copies.

    >>> [part.tolist() for part in parts(np.arange(6, dtype=np.uint8).reshape(2, 3).T, part_bytes=4)]
    [[[0, 3], [1, 4]], [[2, 5]]]
    """
    if array.nbytes <= part_bytes or array.ndim == 0:
        yield np.ascontiguousarray(array).reshape(array.shape)
    elif (row_bytes := array.nbytes // len(array)) > part_bytes and array.ndim > 1:
        for row in array:
            yield from parts(row, part_bytes)
    else:
        step = max(part_bytes // row_bytes, 1)
        for start in range(0, len(array), step):
            yield np.ascontiguousarray(array[start : start + step])


def write_shard(
    path: Path,
    specs: Sequence[TensorSpec],
    read: Read,
    on_bytes: Callable[[int], None] | None,
    *,
    kind: str = "flax",
    alignment: int = ALIGNMENT,
) -> dict[str, dict[str, Any]]:
    """Writes one safetensors file, tensor by tensor in the order of `specs`, and returns its manifest entries.

    Args:
      path: the file.
      specs: what is in it.
      read: gives a spec's parts.
      on_bytes: told how many bytes have just been written.
      kind: the "format" of the file's metadata; older transformers read nothing but "pt".
      alignment: what the place of the first tensor is a multiple of.

    Raises:
      CheckpointError: the parts are not what the spec says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": kind}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    entries = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            start, digest = file.tell(), hashlib.sha256()
            for data in _checked(spec, read(spec)):
                digest.update(data)
                file.write(data)
                if on_bytes is not None:
                    on_bytes(len(data))
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "shard": path.name,
                "offset": start,
                "nbytes": spec.nbytes,
                "sha256": digest.hexdigest(),
                "sources": list(spec.sources),
                "layout": spec.layout,
            }
        file.flush()
        os.fsync(file.fileno())
    return entries


def _checked(spec: TensorSpec, parts: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """Gives the bytes of the parts that make up `spec`; CheckpointError if they are of another type or number."""
    left = spec.nbytes
    for part in parts:
        left -= part.nbytes
        if part.dtype.name != spec.dtype or left < 0:
            break
        yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
    else:
        if not left:
            return
        part = np.empty(0, spec.dtype)
    raise CheckpointError(
        f"{spec.name}: expected {spec.dtype}{list(spec.shape)}, {spec.nbytes} bytes, "
        f"was given {part.dtype.name}, {spec.nbytes - left} bytes"
    )


def _map_shard(path: Path, expected_bytes: int) -> dict[str, np.ndarray]:
    """Returns a shard's tensors as read-only views of one memory map."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; convert or copy the model again") from None
    if found != expected_bytes:
        raise CheckpointError(
            f"{path}: expected {expected_bytes} bytes, found {found}; convert or copy the model again"
        )
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        return {
            name: _view(mapped, start, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error


def _view(mapped: mmap.mmap, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = _NUMPY_DTYPES[entry["dtype"]], entry["shape"]
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} of {dtype.name} do not fill {end - begin} bytes")
    return np.frombuffer(mapped, dtype, math.prod(shape), start + begin).reshape(shape)


def _check_names(
    path: Path, config: Config, tensors: Mapping[str, np.ndarray | TensorSpec]
) -> None:
    expected = {name: axes.shape(word, config.axes) for name, word in config.tensors().items()}
    found = {name: tensors[name] for name in expected.keys() & tensors.keys()}
    wrong = [
        f"{name} should be {list(expected[name])}, is {list(x.shape)}"
        for name, x in found.items()
        if expected[name] != x.shape
    ]
    wrong += [
        f"{name} should be {'uint8' if is_quantised(name) else 'floating point'}, is {x.dtype}"
        for name, x in found.items()
        if is_quantised(name) != (x.dtype == "uint8")
    ]
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    wrong += [f"missing {_some(missing)}"] * bool(missing)
    wrong += [f"not expected {_some(extra)}"] * bool(extra)
    if wrong:
        raise CheckpointError(
            f"{path}: the tensors are not those of config.json: {'; '.join(sorted(wrong)[:5])}"
        )


def _check_specs(path: Path, config: Config, specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path}: a tensor is planned twice")
    if unknown := [s.name for s in specs if s.dtype not in _SAFETENSORS_DTYPES]:
        raise CheckpointError(
            f"{path}: {_some(unknown)} would not be {', '.join(_SAFETENSORS_DTYPES)}"
        )
    _check_names(path, config, {spec.name: spec for spec in specs})


def _copy_files(folder: Path, files: Mapping[str, Path | bytes]) -> dict[str, dict[str, Any]]:
    entries = {}
    for name, content in sorted(files.items()):
        data = content if isinstance(content, bytes) else content.read_bytes()
        (folder / name).write_bytes(data)
        entries[name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return entries


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {manifest.get('format_version')!r}, "
            f"this version reads {FORMAT_VERSION}"
        )
    for part in ("shards", "tensors", "files"):
        if not isinstance(manifest.get(part), dict):
            raise CheckpointError(f"{path} names no {part}; convert or copy the model again")
    for entry in (*manifest["tensors"].values(), *manifest["files"].values()):
        if not isinstance(entry, dict) or "sha256" not in entry:
            raise CheckpointError(
                f"{path}: {str(entry)[:60]} is no entry of a tensor or file; convert or copy the model again"
            )
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: {path.parent} is not a model folder; "
            "make one with `python -m convert --source=...`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object")
    return content


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) or "nothing"
