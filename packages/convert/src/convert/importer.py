"""From a checkpoint to a model folder: everything is planned and checked first, then the tensors stream through.

A plan has opened the source and found every parameter in it; writing reads one tensor at a time and never holds two.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import destination, mapping, progress, sources, tables
from convert.errors import ConvertError
from core import axes
from core.config import GPT2Config

DTYPES = ("keep", *mapping.FLOATS)
_CHUNK = 1 << 22  # elements cast at a time: the temporaries of a cast stay at tens of megabytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that will work: what is read, how every parameter is found, and what the manifest says of it."""

    source: sources.Source
    match: mapping.Match
    dtype: str
    origin: Mapping[str, Any]

    @functools.cached_property
    def moves(self) -> dict[str, mapping.Move]:
        """Every parameter's way, by the parameter's name, in the order of the model's tensors."""
        return {move.target: move for move in self.match.moves}

    def dtype_of(self, move: mapping.Move) -> str:
        """Returns the type in which the parameter is written."""
        return self.source.tensors[move.found].dtype if self.dtype == "keep" else self.dtype

    def read(self, name: str, *, dtype: str) -> np.ndarray:
        """Returns parameter `name` in its own layout; a view of the source's file unless it is cast."""
        move = self.moves[name]
        array = self.source.tensors[move.found].read()
        return cast(axes.relayout(array, move.layout, self.match.config.axes), dtype, move.found)

    def describe(self) -> str:
        """Returns the plan as a few lines to read."""
        config, source = self.match.config, self.source
        stored = sum(path.stat().st_size for path in source.files)
        kinds = collections.Counter(self.dtype_of(move) for move in self.match.moves)
        reasons = collections.Counter(self.match.dropped.values())
        return _lines(
            source=f"{source.path} ({source.format}, {len(source.tensors)} tensors, {stored:,} bytes)",
            model=_summary(config),
            writes=", ".join(f"{count} tensors as {kind}" for kind, count in kinds.items()),
            drops=", ".join(f"{n} ({why})" for why, n in reasons.items()) or "nothing",
            copies=", ".join(source.companions) or "no tokenizer files",
        )


def plan_source(
    path: str | Path,
    *,
    dtype: str = "keep",
    revision: str | None = None,
    format: str = "auto",
    origin: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan for a checkpoint on this machine.

    Raises:
      ConvertError: with everything that does not fit; nothing is written.
    """
    if dtype not in DTYPES:
        raise ConvertError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if revision is not None and origin is None:
        raise ConvertError(f"revision {revision!r} pins a download, but {path} is a local folder")
    source = sources.open_source(path, format=format)
    config = tables.read_config(source.path, source.config)
    try:
        match = mapping.match(tables.HF[config.family], config, source.tensors)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error.summary}", error.problems) from error
    return Plan(source, match, dtype, origin or {"path": str(path)})


def plan_model(
    name: str, *, dtype: str = "keep", revision: str | None = None, quiet: bool | None = None
) -> Plan:
    """Returns the plan for a model known by name: from its folder in `models/src`, else from the hub.

    The config is read before the weights are fetched, so a model that cannot be converted costs no download.
    """
    from convert import hub

    if (local := hub.local_folder(name)) is not None:
        return plan_source(local, dtype=dtype, revision=revision)
    snapshot = hub.resolve(name, revision)
    folder = hub.fetch_companions(snapshot, quiet=quiet)
    tables.read_config(folder, sources.read_json(folder / "config.json"))
    hub.fetch_weights(snapshot, quiet=quiet)
    return plan_source(folder, dtype=dtype, revision=revision, origin=snapshot.origin)


def describe_model(name: str, *, dtype: str = "keep", revision: str | None = None) -> str:
    """Returns what `plan_model` would do, without fetching weights."""
    from convert import hub

    if (local := hub.local_folder(name)) is not None:
        return plan_source(local, dtype=dtype, revision=revision).describe()
    snapshot = hub.resolve(name, revision)
    folder = hub.fetch_companions(snapshot, quiet=True)
    config = tables.read_config(folder, sources.read_json(folder / "config.json"))
    fetched = [f"{file} ({snapshot.sizes[file]:,} bytes)" for file in hub.weight_names(snapshot)]
    return _lines(
        source=f"{snapshot.repo} at {snapshot.revision}",
        fetches=", ".join(fetched),
        model=_summary(config),
        writes=f"every tensor as {'it is stored' if dtype == 'keep' else dtype}",
    )


def write(
    plan: Plan, out: str | Path, *, overwrite: bool = False, quiet: bool | None = None
) -> Path:
    """Writes the model folder of `plan` at `out` and returns that path.

    Raises:
      ConvertError: a value does not survive the cast, or the disk refuses; nothing is left at `out`.
    """
    from core import checkpoint

    out = Path(out)
    destination.check_apart(out, plan.source.path)
    config = plan.match.config
    specs = [
        checkpoint.TensorSpec(
            name=move.target,
            shape=axes.shape(config.tensors()[move.target], config.axes),
            dtype=plan.dtype_of(move),
            sources=(move.found,),
            layout=move.layout,
        )
        for move in plan.match.moves
    ]
    try:
        with progress.bar("converting", sum(spec.nbytes for spec in specs), quiet) as advance:
            checkpoint.write(
                out,
                config=config,
                specs=specs,
                read=lambda spec: plan.read(spec.name, dtype=spec.dtype),
                files=plan.source.companions,
                source={**plan.origin, "files": _hashes(plan.source)},
                overwrite=overwrite,
                on_bytes=advance,
            )
    except (checkpoint.CheckpointError, OSError) as error:
        raise ConvertError(str(error)) from error
    return out


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Returns `array` as `dtype`, itself where it already is.

    Raises:
      ConvertError: a finite value of tensor `name` is beyond the range of `dtype`.
    """
    if array.dtype.name == dtype:
        return array
    flat = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(flat.shape, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            result[start : start + _CHUNK] = part
        lost = np.isinf(result[start : start + _CHUNK]) & np.isfinite(part)
        if lost.any():
            largest = np.abs(part[lost].astype(np.float64)).max()
            raise ConvertError(
                f"{name}: {largest:.6g} does not fit in {dtype} (at most {ml_dtypes.finfo(dtype).max:.6g}); "
                "keep the type, or cast to bfloat16 or float32"
            )
    return result.reshape(array.shape)


def _summary(config: GPT2Config) -> str:
    return (
        f"{config.family}: {config.parameter_count:,} parameters, {config.n_layer} layers, "
        f"width {config.n_embd}, {config.n_head} heads, vocabulary {config.vocab_size}, "
        f"{'tied' if config.tie_word_embeddings else 'untied'} head"
    )


def _lines(**facts: str) -> str:
    return "\n".join(f"{name:<7} {text}" for name, text in facts.items())


def _hashes(source: sources.Source) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of every file that decides what the model is."""
    from core import checkpoint

    return {
        path.name: {"nbytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
        for path in source.files
    }
