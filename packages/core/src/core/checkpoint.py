"""The model folder: what every stage hands to the next.

    config.json                          family and architecture
    model-0000k-of-0000n.safetensors     canonical names and layouts, at most 4 GB a shard, tensors on 64 bytes
    manifest.json                        where everything came from and what it hashes to; written last
    tokenizer.json ...                   copied beside

A tensor's name is its path in the parameter tree. Opening maps the files: a tensor that starts on 64 bytes becomes a
JAX array on the CPU without a copy. Writing streams parts of a few megabytes (`core.shards`) into a sibling folder that
takes the final name only when it is whole (`core.folders`), so a folder has a manifest that is true or does not exist.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core import axes, folders, shards, workers
from core import config as config_lib
from core.config import Config
from core.errors import CheckpointError as CheckpointError
from core.errors import ConfigError
from core.journal import Journal
from core.shards import ALIGNMENT as ALIGNMENT
from core.shards import DTYPES, NUMPY_DTYPES
from core.shards import Read as Read
from core.shards import TensorSpec as TensorSpec
from core.shards import parts as parts
from core.shards import split as split
from core.tokenizer import GENERATION_CONFIG, Tokenizer

if TYPE_CHECKING:
    import jax
    from jax.sharding import Sharding

SHARD_BYTES = 4 * 10**9
CONFIG = "config.json"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """An opened model folder; `tensors` are read-only views of the mapped files."""

    path: Path
    config: Config
    manifest: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    def config_with_stop_ids(self) -> Config:
        """Returns the configuration with every id that ends a text.

        That is config.json's eos, and generation_config.json's: a chat model ends a turn, or calls a tool, with tokens
        that only the latter names.

        Raises:
          CheckpointError: generation_config.json cannot be read, or has an eos_token_id that is no token's.
        """
        path = self.path / GENERATION_CONFIG
        stated = _read_json(path).get("eos_token_id") if path.exists() else None
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        for id_ in ids:
            if type(id_) is not int or not 0 <= id_ < self.config.vocab_size:
                raise CheckpointError(
                    f"{path}: eos_token_id {id_!r} is no id of the vocabulary of {self.config.vocab_size}; "
                    "correct the file or remove it"
                )
        known = self.config.eos_token_ids
        more = tuple(id_ for id_ in dict.fromkeys(ids) if id_ not in known)
        return dataclasses.replace(self.config, eos_token_id=known + more) if more else self.config

    def params(
        self, dtype: Any = None, *, shardings: Mapping[str, "Sharding"] | None = None
    ) -> dict[str, Any]:
        """Returns the nested parameter dict as JAX arrays, cast to `dtype` if given and they are not quantised.

        On a CPU the arrays share the file's pages and cost no memory: never donate them. With `shardings`, by name (see
        `core.sharding`), each device gets its part of a tensor, and of the files this process reads only the parts of
        its own devices, each once.
        """
        from flax import traverse_util  # not above: conversion reads and writes folders without it

        arrays = {
            name: _on_devices(
                x, None if is_quantised(name) else dtype, shardings[name] if shardings else None
            )
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
    source: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 1,
    identity: Any = None,
    resume: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Writes a model folder and returns its manifest; the output is the same bytes for the same input.

    What survives: without `identity`, nothing but the whole folder. With it, every finished tensor survives the end of
    this process, whatever ends it, kill -9 too: its bytes and then its line in the journal have been handed to the
    system. A power cut may lose what the system had not yet put on the disk, in any order, which is why a later run
    hashes what it finds. Everything is on the disk before the folder takes its name, and the name before this returns.

    Args:
      path: where the folder will be; it appears when it is whole.
      config: what the tensors belong to; written as config.json, and hashed in the manifest like `files`.
      specs: every tensor of `config`, in any order.
      read: gives a spec's parts; called once for each spec, and one part for each thread is in memory at a time.
      files: what to put beside, by name: contents, or a file to copy.
      source: noted in the manifest: where the weights come from; a function is called when the tensors are written.
      overwrite: replaces a folder that is already there (by renaming, so readers see the old or the new).
      on_bytes: told how many bytes have just been written.
      shard_bytes: no shard is larger, unless one tensor is.
      threads: how many tensors are read and written at a time.
      identity: what the tensors are made of and how (JSON): two writes with all the same arguments and this one write
        the same bytes. Makes the write resumable, see `core.folders.resumable`; None does not.
      resume: takes over what a process that ended in such a write has left, and writes only what is not there.
      on_note: told what the user should hear.

    Raises:
      CheckpointError: `path` exists and is not to be replaced; the specs are not the configuration's; the disk is
        full; another process is in the same resumable write.
      KeyboardInterrupt: in a resumable write with a message that tells how to go on.
    """
    path = Path(path)
    check_replaceable(path, overwrite=overwrite)
    _check_specs(path, config, specs)
    plan = _lay_out(specs, shard_bytes)
    contents = _contents({**(files or {}), CONFIG: _json(config.to_dict())})
    with _place(path, plan, contents, identity, resume, on_note or (lambda note: None)) as (
        folder,
        journal,
    ):
        entries = shards.write(
            folder, plan, read, on_bytes=on_bytes, threads=threads, journal=journal
        )
        for name, data in contents.items():
            _write_file(folder / name, data)
        manifest = {
            "format_version": FORMAT_VERSION,
            "tool": _tool(),
            "source": dict((source() if callable(source) else source) or {}),
            "parameters": config.parameter_count,
            "shards": {shard.name: shard.nbytes for shard in plan},
            "files": {name: _file_entry(data) for name, data in contents.items()},
            "tensors": {spec.name: entries[spec.name] for spec in specs},
        }
        _write_file(folder / MANIFEST, _json(manifest))
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
    """Tells whether a tensor holds packed numbers or their scales, which no cast may touch."""
    return name.endswith((".blocks", ".values", ".scales"))


def quantised_dtype(config: Config, name: str) -> str | None:
    """Returns the type that a tensor of `config` has whatever the others have; None if it is not quantised."""
    if not is_quantised(name):
        return None
    if config.family == "gpt_oss":
        return "uint8"
    return "float32" if name.endswith(".scales") else "int8"


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


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Returns a file's SHA-256, in hex; ends with `core.workers.Stopped` soon after `stop` is set."""
    digest, block = hashlib.sha256(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            if stop is not None and stop.is_set():
                raise workers.Stopped
    return digest.hexdigest()


def write_shard(
    path: Path,
    specs: Sequence[TensorSpec],
    read: Read,
    on_bytes: Callable[[int], None] | None,
    *,
    kind: str = "flax",
    alignment: int = ALIGNMENT,
    threads: int = 1,
) -> dict[str, dict[str, Any]]:
    """Writes one safetensors file and returns its manifest entries; see `core.shards.lay_out` and `write`."""
    shard = shards.lay_out(path.name, specs, kind=kind, alignment=alignment)
    return shards.write(path.parent, [shard], read, on_bytes=on_bytes, threads=threads)


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


def _on_devices(x: np.ndarray, dtype: Any, sharding: "Sharding | None") -> "jax.Array":
    import jax  # not above: conversion does without it

    def cast(part: np.ndarray) -> np.ndarray:
        return part if dtype is None else part.astype(dtype)

    if sharding is None:
        return jax.device_put(cast(x))
    parts: dict[tuple[Any, ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        """Asked for by every device, also by those that hold the same."""
        key = tuple((along.start, along.stop) for along in index)
        if key not in parts:
            parts[key] = np.ascontiguousarray(cast(x[index]))
        return parts[key]

    return jax.make_array_from_callback(x.shape, sharding, part)


def _view(mapped: mmap.mmap, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = NUMPY_DTYPES[entry["dtype"]], entry["shape"]
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
        f"{name} should be {quantised_dtype(config, name) or 'floating point'}, is {x.dtype}"
        for name, x in found.items()
        if not _is_right_type(x.dtype, quantised_dtype(config, name))
    ]
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    wrong += [f"missing {_some(missing)}"] * bool(missing)
    wrong += [f"not expected {_some(extra)}"] * bool(extra)
    if wrong:
        raise CheckpointError(
            f"{path}: the tensors are not those of config.json: {'; '.join(sorted(wrong)[:5])}"
        )


def _is_right_type(dtype: Any, quantised: str | None) -> bool:
    return dtype == quantised if quantised else dtype not in ("uint8", "int8")


def _check_specs(path: Path, config: Config, specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path}: a tensor is planned twice")
    if unknown := [s.name for s in specs if s.dtype not in DTYPES]:
        raise CheckpointError(f"{path}: {_some(unknown)} would not be {', '.join(DTYPES)}")
    _check_names(path, config, {spec.name: spec for spec in specs})


def _contents(files: Mapping[str, Path | bytes]) -> dict[str, bytes]:
    return {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in sorted(files.items())
    }


def _write_file(path: Path, data: bytes) -> None:
    with shards.named(path):
        path.write_bytes(data)


def _file_entry(data: bytes) -> dict[str, Any]:
    return {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _tool() -> dict[str, str]:
    return {"name": "flaxmill", "version": importlib.metadata.version("flaxmill-core")}


def _lay_out(specs: Sequence[TensorSpec], shard_bytes: int) -> list[shards.Shard]:
    plan = shards.split(specs, shard_bytes)
    return [
        shards.lay_out(
            f"model-{number:05d}-of-{len(plan):05d}.safetensors",
            # Sizes divisible by 64 first: then all of those start on 64 bytes, and opening copies none of them.
            sorted(shard, key=lambda spec: spec.nbytes % ALIGNMENT != 0),
        )
        for number, shard in enumerate(plan, start=1)
    ]


@contextlib.contextmanager
def _place(
    path: Path,
    plan: Sequence[shards.Shard],
    contents: Mapping[str, bytes],
    identity: Any,
    resume: bool,
    on_note: Callable[[str], None],
) -> Iterator[tuple[Path, Journal | None]]:
    """Gives a folder to write to, after checking that there is room; and the journal of a resumable write."""
    nbytes = sum(shard.nbytes for shard in plan)
    if identity is None:
        folders.check_space(path, nbytes)
        with folders.fresh(path) as folder:
            yield folder, None
        return
    work = _fingerprint(plan, contents, identity)
    folders.check_space(path, nbytes - folders.allocated(folders.partial_of(path, work)))
    with folders.resumable(path, work, resume=resume) as partial:
        journal = Journal(partial.notes) if partial.notes is not None else None
        if resume:
            others = folders.others(path, partial.folder)
            on_note(_found(plan, journal if partial.is_resumed else None, others))
        folders.keep_only(partial.folder, [shard.name for shard in plan])
        yield partial.folder, journal


def _fingerprint(plan: Sequence[shards.Shard], contents: Mapping[str, bytes], identity: Any) -> str:
    """Returns a hash, short enough for a name, of all that decides what is written."""
    decides = {
        "format_version": FORMAT_VERSION,
        "tool": _tool(),
        "shards": [
            (
                shard.name,
                [place.entry("") for place in shard.places],
                hashlib.sha256(shard.header).hexdigest(),
            )
            for shard in plan
        ],
        "files": {name: _file_entry(data) for name, data in contents.items()},
        "identity": identity,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _found(plan: Sequence[shards.Shard], journal: Journal | None, others: Sequence[Path]) -> str:
    """Returns what to tell whoever asked to resume: `journal` is an earlier write's, `others` are unfinished too."""
    if journal is not None:
        total = sum(len(shard.places) for shard in plan)
        return f"resuming: {len(journal.entries())} of {total} tensors were written, and are checked first"
    why = f" ({others[0].name} is of another source, plan or version)" if others else ""
    return f"there is nothing to resume{why}; starting from the beginning"


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
