"""From a checkpoint to a model folder: everything is planned and checked first, then the tensors stream through.

A plan has opened the source and found every parameter in it; writing reads a few megabytes at a time.
"""

import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import destination, int8, mapping, mxfp4, progress, sources, tables
from convert.errors import ConvertError
from core import axes, workers
from core.checkpoint import TensorSpec, quantised_dtype
from core.checkpoint import parts as in_parts
from core.config import Config, GPT2Config, GptOssConfig

DTYPES = ("keep", *mapping.FLOATS)
EXPERTS = ("keep", "mxfp4", *mapping.FLOATS)
QUANTIZATIONS = ("keep", "int8")


_UNTIED = "the config ties the head to the token embedding, but the file holds another head, which is kept"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that will work: what is read, how every parameter is found, and what the manifest says of it.

    `experts` other than "keep" is what the experts' kernels are written as: a dense type where they are packed unpacks.
    `quantization` "int8" rounds the kernels of a GPT-2's blocks to that, whatever `dtype` says of the rest.
    """

    source: sources.Source
    match: mapping.Match
    dtype: str
    origin: Mapping[str, Any]
    experts: str = "keep"
    quantization: str = "keep"

    @property
    def config(self) -> Config:
        """The model that is written."""
        config = self.match.config
        if self.quantization == "int8" and isinstance(config, GPT2Config):
            return dataclasses.replace(config, quantization="int8")
        unpacks = self.experts in mapping.FLOATS
        return config.dense if unpacks and isinstance(config, GptOssConfig) else config

    @functools.cached_property
    def moves(self) -> dict[str, mapping.Move]:
        """Every parameter's way, by the parameter's name."""
        return {move.target: move for move in self.match.moves}

    @functools.cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What is written, in the order of the model's tensors."""
        return tuple(self._spec(name, word) for name, word in self.config.tensors().items())

    @property
    def nbytes(self) -> int:
        """The size of all that is written."""
        return sum(spec.nbytes for spec in self.specs)

    def parts(self, spec: TensorSpec) -> Iterator[np.ndarray]:
        """Yields a parameter in its own layout, in consecutive parts; views of the source's file unless they are cast.

        `spec` may have another type than the plan's: verification derives what a folder holds, as it holds it.
        """
        if self.rounds(spec.name):
            yield from self._rounded(spec)
            return
        for part in self._unpacked(spec.name) if self._is_packed(spec.name) else self._kept(spec):
            yield cast(part, spec.dtype, self.found(spec.name)[0])

    def found(self, name: str) -> tuple[str, ...]:
        """Returns the source's tensors from which a parameter is made; none, if it has no such parameter."""
        if self.rounds(name):
            return (self.moves[_kernel(name)].found,)
        names = (name + part for part in mxfp4.PARTS) if self._is_packed(name) else (name,)
        return tuple(self.moves[name].found for name in names if name in self.moves)

    def rounds(self, name: str) -> bool:
        """Tells whether a parameter is the values or the scales of a kernel that the source has in floating point."""
        return name.endswith(int8.PARTS) and name not in self.moves and _kernel(name) in self.moves

    def _rounded(self, spec: TensorSpec) -> Iterator[np.ndarray]:
        name, words = _kernel(spec.name), self.config.tensors()
        values, scales = (words[name + part] for part in int8.PARTS)
        stored = self.match.config.tensors()[name]
        weights = axes.relayout(self._mapped(name), f"{stored} -> {values}", self.config.axes)
        make = int8.values if spec.name.endswith(int8.PARTS[0]) else int8.scales
        return make(weights, len(scales), self.found(spec.name)[0])

    def _is_packed(self, name: str) -> bool:
        return name + mxfp4.PARTS[0] in self.moves

    def _kept(self, spec: TensorSpec) -> Iterator[np.ndarray]:
        parts = in_parts(self._mapped(spec.name))
        if not spec.name.endswith(mxfp4.PARTS[1]):
            return parts
        return mxfp4.checked(parts, self.found(spec.name)[0], spec.shape)

    def _unpacked(self, name: str) -> Iterator[np.ndarray]:
        blocks, scales = (self._mapped(name + part) for part in mxfp4.PARTS)
        return mxfp4.unpack(blocks, scales, self.found(name)[1])

    def _mapped(self, name: str) -> np.ndarray:
        """Returns a parameter as it is stored, in its own layout: a view of the source's file."""
        move = self.moves[name]
        array = self.source.tensors[move.found].read()
        if move.rows is not None:
            array = array[slice(*move.rows)]
        return axes.relayout(array, move.layout, self.match.config.axes)

    def describe(self) -> str:
        """Returns the plan to read: the source, the model, every tensor's way, and what is left out and why."""
        source = self.source
        stored = sum(path.stat().st_size for path in source.files)
        facts = _lines(
            source=f"{source.path} ({source.format}, {len(source.tensors)} tensors, {stored:,} bytes)",
            model=_summary(self.config),
            writes=f"{len(self.specs)} tensors, {self.nbytes:,} bytes",
            copies=", ".join(source.companions) or "no tokenizer files",
        )
        notes = [f"note    {note}" for note in source.notes]
        return "\n".join([facts, *notes, "", *_rows(self)])

    def _spec(self, name: str, word: str) -> TensorSpec:
        if self.rounds(name):
            return self._rounded_spec(name, word)
        first = self.moves[name + mxfp4.PARTS[0] if self._is_packed(name) else name]
        stored = self.source.tensors[first.found].dtype
        wanted = self.dtype
        if name.endswith(mxfp4.KERNELS) and self.experts in mapping.FLOATS:
            wanted = self.experts
        elif wanted == "keep" or quantised_dtype(self.config, name):
            wanted = stored
        return TensorSpec(
            name=name,
            shape=axes.shape(word, self.config.axes),
            dtype=wanted,
            sources=self.found(name),
            layout=first.layout if first.target == name else f"mxfp4 {first.layout} -> {word}",
        )

    def _rounded_spec(self, name: str, word: str) -> TensorSpec:
        layout = self.moves[_kernel(name)].layout
        return TensorSpec(
            name=name,
            shape=axes.shape(word, self.config.axes),
            dtype=quantised_dtype(self.config, name) or "",
            sources=self.found(name),
            layout=f"int8 {layout} -> {word}",
        )


def plan_source(
    path: str | Path,
    *,
    dtype: str = "keep",
    experts: str = "keep",
    quantization: str = "keep",
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
    if experts not in EXPERTS:
        raise ConvertError(f"experts {experts!r} is not one of {', '.join(EXPERTS)}")
    if quantization not in QUANTIZATIONS:
        raise ConvertError(
            f"quantization {quantization!r} is not one of {', '.join(QUANTIZATIONS)}"
        )
    if revision is not None and origin is None:
        raise ConvertError(f"revision {revision!r} pins a download, but {path} is a local folder")
    source = sources.open_source(path, format=format)
    config = tables.read_config(source.path, source.config, source.tensors)
    _check_experts(path, config, experts)
    _check_quantization(path, config, quantization)
    try:
        match = mapping.match(tables.table(source, config), config, source.tensors)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error.summary}", error.problems) from error
    notes = (*source.notes, *tables.notes(source))
    if config.tie_word_embeddings and not match.config.tie_word_embeddings:
        notes = (*notes, _UNTIED)
    if quantization == "int8":
        notes = (*notes, _ROUNDED)
    source = dataclasses.replace(source, notes=notes)
    return Plan(source, match, dtype, origin or {"path": str(path)}, experts, quantization)


@dataclasses.dataclass(frozen=True)
class _Remote:
    """A model found by name, whose small files are here in `folder` and whose weights are not fetched yet."""

    folder: Path
    config: Config
    source: str
    origin: Mapping[str, Any]
    sizes: Callable[[], Mapping[str, int | None]]
    fetch: Callable[[], None]


def _find(name: str, revision: str | None, quiet: bool | None) -> _Remote:
    """Finds a model at OpenAI or on the hub, and reads its config."""
    from convert import hub, openai

    if name in openai.MODELS:
        openai.check_revision(name, revision)
        folder = openai.fetch_companions(name, quiet=quiet)
        origin = openai.origin(name)
        return _Remote(
            folder,
            tables.read_config(folder, sources.read_json(folder / openai.HPARAMS)),
            origin["url"],
            origin,
            lambda: {openai.WEIGHTS: openai.weights_size(name)},
            lambda: openai.fetch_weights(name, quiet=quiet),
        )
    snapshot = hub.resolve(name, revision)
    folder = hub.fetch_companions(snapshot, quiet=quiet)
    return _Remote(
        folder,
        tables.read_config(folder, sources.read_json(folder / sources.CONFIG)),
        f"{snapshot.repo} at {snapshot.revision}",
        snapshot.origin,
        lambda: {file: snapshot.sizes[file] for file in hub.weight_names(snapshot)},
        lambda: hub.fetch_weights(snapshot, quiet=quiet),
    )


def plan_model(
    name: str,
    *,
    dtype: str = "keep",
    experts: str = "keep",
    quantization: str = "keep",
    revision: str | None = None,
    quiet: bool | None = None,
) -> Plan:
    """Returns the plan for a model known by name: from its folder in `models/src`, else from the hub or from OpenAI.

    The config is read before the weights are fetched, so a model that cannot be converted costs no download.
    """
    from convert import hub

    types: dict[str, Any] = {"dtype": dtype, "experts": experts, "quantization": quantization}
    if (local := hub.local_folder(name)) is not None:
        return plan_source(local, **types, revision=revision)
    remote = _find(name, revision, quiet)
    _check_experts(remote.folder, remote.config, experts)
    _check_quantization(remote.folder, remote.config, quantization)
    remote.fetch()
    return plan_source(remote.folder, **types, origin=remote.origin)


def describe_model(
    name: str,
    *,
    dtype: str = "keep",
    experts: str = "keep",
    quantization: str = "keep",
    revision: str | None = None,
) -> str:
    """Returns what `plan_model` would do, without fetching weights."""
    from convert import hub

    if (local := hub.local_folder(name)) is not None:
        types: dict[str, Any] = {"dtype": dtype, "experts": experts, "quantization": quantization}
        return plan_source(local, **types, revision=revision).describe()
    remote = _find(name, revision, quiet=True)
    sizes = remote.sizes()
    _check_experts(remote.folder, remote.config, experts)
    _check_quantization(remote.folder, remote.config, quantization)
    return _lines(
        source=remote.source,
        fetches=", ".join(f"{file} ({size:,} bytes)" for file, size in sizes.items()),
        model=_summary(remote.config),
        writes=f"every tensor as {'it is stored' if dtype == 'keep' else dtype}"
        + (f", the experts as {experts}" if experts != "keep" else "")
        + (f", the blocks' kernels as {quantization}" if quantization != "keep" else ""),
    )


def write(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """Writes the model folder of `plan` at `out` and returns that path.

    After a kill or an interrupt, the same plan with `resume` goes on where that ended, to the same bytes; see
    `core.checkpoint.write`. `on_note` is told whether there was something to go on with.

    Raises:
      ConvertError: a value does not survive the cast, the source changes meanwhile, or the disk refuses; nothing is
        left at `out`.
      KeyboardInterrupt: with a message that tells how to go on.
    """
    from core import checkpoint

    out = Path(out)
    destination.check_apart(out, plan.source.path)
    files = plan.source.files
    identity = {"origin": _origin(plan, {}), "files": _identity(files)}

    def origin() -> dict[str, Any]:
        digests = hashes()
        if _identity(files) != identity["files"]:
            raise ConvertError(f"{plan.source.path} changed while it was read; convert it again")
        return _origin(plan, digests)

    try:
        with (
            workers.beside(functools.partial(_hashes, files)) as hashes,
            progress.bar("converting", plan.nbytes, quiet) as advance,
        ):
            checkpoint.write(
                out,
                config=plan.config,
                specs=plan.specs,
                read=plan.parts,
                files=plan.source.companions,
                source=origin,
                overwrite=overwrite,
                on_bytes=advance,
                threads=workers.COUNT,
                identity=identity,
                resume=resume,
                on_note=on_note,
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
    with np.errstate(over="ignore"):
        result = array.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    if _has_infinity(result) and (lost := np.isinf(result) & np.isfinite(array)).any():
        largest = np.abs(array[lost].astype(np.float64)).max()
        raise ConvertError(
            f"{name}: {largest:.6g} does not fit in {dtype} (at most {ml_dtypes.finfo(dtype).max:.6g}); "
            "keep the type, or cast to bfloat16 or float32"
        )
    return result


def _check_experts(path: str | Path, config: Config, experts: str) -> None:
    if experts == "keep":
        return
    if not isinstance(config, GptOssConfig):
        raise ConvertError(f"{path}: a {config.family} has no experts to write as {experts}")
    if experts == "mxfp4" and config.quantization != "mxfp4":
        raise ConvertError(
            f"{path}: the experts are stored dense, and packing them as mxfp4 would round them; keep them"
        )


_ROUNDED = "the blocks' kernels are rounded to int8, each weight by at most 1/254 of its output channel's largest"


def _check_quantization(path: str | Path, config: Config, quantization: str) -> None:
    if quantization == "keep":
        return
    if not isinstance(config, GPT2Config):
        raise ConvertError(
            f"{path}: a {config.family} is not written as {quantization}; that is for gpt2"
        )
    if config.quantization is not None:
        raise ConvertError(
            f"{path}: the kernels are {config.quantization} already; leave --quantization away"
        )


def _kernel(name: str) -> str:
    """Returns the name of the kernel whose values or scales are called `name`."""
    return name.rpartition(".")[0]


def _has_infinity(x: np.ndarray) -> bool:
    """Tells whether one of `x` is infinite; of 16-bit types by their bits, which is twice as fast."""
    if x.itemsize != 2:
        return bool(np.isinf(x).any())
    infinity = np.full((), np.inf, x.dtype).view(np.uint16)
    return bool((x.view(np.uint16) & 0x7FFF == infinity).any())


def _summary(config: Config) -> str:
    return f"{config.family}: {config.parameter_count:,} parameters ({mapping.sizes(config)})"


def _rows(plan: Plan) -> Iterator[str]:
    """Yields a line for every kind of tensor written, its layers counted, and for every kind left out."""

    def kind(name: str) -> str:
        return re.sub(r"(?<=[./h])\d+(?=[./]|$)", "*", name)

    def described(spec: TensorSpec) -> tuple[str, ...]:
        size = f"{spec.dtype}{list(spec.shape)}"
        return (kind(spec.name), size, " + ".join(map(kind, spec.sources)), spec.layout)

    rows: list[tuple[str, ...]] = []
    order = dict.fromkeys(map(described, plan.specs))
    for row in order:
        group = [spec for spec in plan.specs if described(spec) == row]
        name, size, found, layout = row
        rows.append(
            (f"{len(group)} x {name}", size, f"{group[0].nbytes:,} bytes", f"{found}  {layout}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        name, size, nbytes, found = row
        yield f"{name:<{widths[0]}}  {size:<{widths[1]}}  {nbytes:>{widths[2]}}  <- {found}"
    reasons = [(kind(name), why) for name, why in plan.match.dropped.items()]
    for name, why in dict.fromkeys(reasons):
        yield f"{reasons.count((name, why))} x {name} left out: {why}"


def _lines(**facts: str) -> str:
    return "\n".join(f"{name:<7} {text}" for name, text in facts.items())


def _identity(files: Sequence[Path]) -> list[list[Any]]:
    """Returns what tells, without reading them, that files are those that were there before."""
    stats = [(path, path.stat()) for path in files]
    return [
        [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats
    ]


def _hashes(files: Sequence[Path], stop: threading.Event) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of every file."""
    from core import checkpoint

    return {
        path.name: {"nbytes": path.stat().st_size, "sha256": checkpoint.sha256(path, stop)}
        for path in files
    }


def _origin(plan: Plan, files: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the manifest says of the source: where it is from, its files' sizes and hashes, what was noted.

    "origin" is the same of what the source itself was made from.
    """
    notes = {"notes": list(plan.source.notes)} if plan.source.notes else {}
    before = {"origin": dict(plan.source.origin)} if plan.source.origin else {}
    return {**plan.origin, "format": plan.source.format, "files": dict(files), **notes, **before}
