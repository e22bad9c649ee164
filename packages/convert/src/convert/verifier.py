"""Is a model folder what its manifest says, and what its source holds: everything is hashed and derived again.

All that differs is found before any of it is told; with torch, the logits are compared too (`convert.logits`).
"""

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import importer, mapping, progress
from convert.errors import ConvertError
from convert.sources import COMPANIONS
from core import axes, checkpoint, workers
from core.checkpoint import ModelFolder, TensorSpec

if TYPE_CHECKING:
    from convert.logits import Comparison


@dataclasses.dataclass(frozen=True)
class Report:
    """What was looked at, and in `problems` everything that is not in order; printed, it says that nothing is not.

    `change` says in what the tensors are not those of `against` bit for bit: a cast, unpacked experts, rounded
    kernels. `notes` are for
    the user to hear: what could not be compared.
    """

    model: Path
    tensors: int
    files: int
    nbytes: int
    against: str | None = None
    change: str = ""
    logits: "Comparison | None" = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        same = f", equal to {self.against} {self.change or 'bit for bit'}" if self.against else ""
        line = f"{self.tensors} tensors ({self.nbytes:,} bytes) and {self.files} files as in the manifest{same}"
        return line if self.logits is None else f"{self.logits}\n{line}"

    def check(self) -> None:
        """Raises ConvertError with all the problems, if there are any."""
        if self.problems:
            count = len(self.problems)
            raise ConvertError(
                f"{self.model}: {count} difference{'s' if count > 1 else ''}", self.problems
            )


def verify(
    model: str | Path,
    *,
    against: str | Path | None = None,
    format: str = "auto",
    logits: bool = False,
    quiet: bool | None = None,
) -> Report:
    """Looks at all of the model folder `model` and reports; see `convert.verify`.

    Raises:
      ConvertError: the folder or the source cannot be opened, or `logits` cannot be compared at all. What differs is
        in the report instead, whose `check` raises it.
    """
    folder = _open(model)
    if logits:
        from convert import logits as logits_lib

        logits_lib.check_possible(folder.config)
    plan = _plan(folder, against, format) if against is not None else None
    problems = [*_differing_files(folder), *(_foreign(folder, plan) if plan is not None else ())]
    notes = list(_notes(folder, plan)) if plan is not None else []
    problems += _differing_tensors(folder, plan, quiet)
    comparison = None
    if logits:
        from convert import logits as logits_lib

        comparison = logits_lib.compare(folder, plan, quiet=quiet)
        notes += comparison.notes
        problems = [*comparison.problems, *problems]
    return Report(
        folder.path,
        tensors=len(folder.tensors),
        files=len(folder.manifest["files"]),
        nbytes=_nbytes(folder),
        against=str(against) if against is not None else None,
        change=_change(folder, plan) if plan is not None else "",
        logits=comparison,
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _open(model: str | Path) -> ModelFolder:
    try:
        return checkpoint.open(model)
    except checkpoint.CheckpointError as error:
        raise ConvertError(str(error)) from error


def _plan(folder: ModelFolder, against: str | Path, format: str) -> importer.Plan:
    """Returns the plan that makes such a folder of the source: experts are unpacked, kernels rounded, as there."""
    plan = importer.plan_source(against, format=format)
    theirs, ours = (getattr(c, "quantization", None) for c in (plan.config, folder.config))
    if theirs == ours or plan.config.family != folder.config.family:
        return plan
    if theirs == "mxfp4":
        return importer.plan_source(against, format=format, experts="bfloat16")
    if ours == "int8":
        return importer.plan_source(against, format=format, quantization="int8")
    return plan


def _differing_files(folder: ModelFolder) -> Iterator[str]:
    listed = folder.manifest["files"]
    for name, entry in listed.items():
        path = folder.path / name
        try:
            if not path.is_file():
                yield f"{name} is missing"
            elif checkpoint.sha256(path) != entry["sha256"]:
                yield f"{name} has another hash than in the manifest"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
    for name in COMPANIONS:
        if name not in listed and (folder.path / name).exists():
            yield f"{name} is not in the manifest"


def _foreign(folder: ModelFolder, plan: importer.Plan) -> Iterator[str]:
    """Yields what the source says otherwise than the folder, the values of the tensors apart."""
    ours, theirs = folder.config.to_dict(), plan.config.to_dict()
    against = plan.source.path
    if ours["family"] != theirs["family"]:
        yield f"config.json: it is a {ours['family']}, {against} is a {theirs['family']}"
    else:
        for key in ours:
            if ours[key] != theirs[key]:
                yield f"config.json: {key} is {ours[key]!r}, {against} has {theirs[key]!r}"
    here, there = folder.config.tensors().keys(), plan.config.tensors().keys()
    for names, state in ((here - there, f"not in {against}"), (there - here, f"only in {against}")):
        if names:
            yield f"{len(names)} tensors are {state}: {_some(names)}"
    for name, content in plan.source.companions.items():
        if name not in folder.manifest["files"]:
            yield f"{name} is only in {against}"
        elif (path := folder.path / name).is_file() and path.read_bytes() != _bytes(content):
            yield f"{name} is not that of {against}"


def _notes(folder: ModelFolder, plan: importer.Plan) -> Iterator[str]:
    yield from plan.source.notes
    kept = folder.manifest["files"].keys() - plan.source.companions.keys() - {checkpoint.CONFIG}
    if kept:
        yield f"not compared, because {plan.source.path} has none: {', '.join(sorted(kept))}"


def _change(folder: ModelFolder, plan: importer.Plan) -> str:
    """Returns how the folder's tensors were made from others than they are, or nothing where they were not."""
    casts, unpacked, rounded = set(), False, False
    for name, array in folder.tensors.items():
        if plan.rounds(name):
            rounded = True
            continue
        stored = {plan.source.tensors[found].dtype for found in plan.found(name)}
        unpacked |= "uint8" in stored and array.dtype.name in mapping.FLOATS
        if stored - {"uint8", array.dtype.name}:
            casts.add(array.dtype.name)
    made = ["with its experts unpacked"] if unpacked else []
    made += ["with its kernels rounded to int8"] if rounded else []
    made += [f"cast to {' and '.join(sorted(casts))}"] if casts else []
    return ", ".join(made)


def _differing_tensors(
    folder: ModelFolder, plan: importer.Plan | None, quiet: bool | None
) -> list[str]:
    """Returns what is wrong with each tensor, in order; several are hashed and compared at a time."""
    lock = threading.Lock()
    total = _nbytes(folder) * (1 if plan is None else 2)  # hashed, then compared
    with progress.bar("verifying", total, quiet) as advance:

        def told(nbytes: int) -> None:
            with lock:
                advance(nbytes)

        def work(name: str, stop: threading.Event) -> list[str]:
            def passed(part: np.ndarray) -> None:
                if stop.is_set():
                    raise workers.Stopped
                told(part.nbytes)

            return [*_against_manifest(folder, name, passed), *_against(folder, name, plan, passed)]

        found = workers.each(work, list(folder.tensors), threads=workers.COUNT)
    return [problem for problems in found for problem in problems]


Passed = Callable[[np.ndarray], None]
"""Told of every part of a tensor that has been gone through; raises when it is of no use to go on."""


def _against_manifest(folder: ModelFolder, name: str, passed: Passed) -> Iterator[str]:
    array, entry = folder.tensors[name], folder.manifest["tensors"].get(name)
    if entry is None:
        yield f"{name} is not in the manifest"
        return
    # The shard's header says the type, and no hash covers it.
    if entry.get("dtype") != array.dtype.name:
        yield f"{name} is {array.dtype.name}, {entry.get('dtype')} in the manifest"
    digest = hashlib.sha256()
    for part in checkpoint.parts(array):
        digest.update(part.reshape(-1).view(np.uint8).data)
        passed(part)
    if digest.hexdigest() != entry["sha256"]:
        yield f"{name} has another hash than in the manifest"


def _against(
    folder: ModelFolder, name: str, plan: importer.Plan | None, passed: Passed
) -> Iterator[str]:
    """Yields how a tensor differs from what the source gives, cast as the folder's is."""
    word = plan.config.tensors().get(name) if plan is not None else None
    if plan is None or word is None:
        return
    array, against = folder.tensors[name], plan.source.path
    if array.shape != (shape := axes.shape(word, plan.config.axes)):
        yield f"{name} is {list(array.shape)}, {against} has {list(shape)}"
        return
    spec = TensorSpec(name, array.shape, array.dtype.name)
    try:
        difference = _difference(array, plan.parts(spec), passed)
    except ConvertError as error:
        yield f"{name} cannot be compared: {error}"
        return
    if difference:
        yield f"{name} is not what {against} holds: {difference}"


def _difference(array: np.ndarray, parts: Iterable[np.ndarray], passed: Passed) -> str:
    """Returns how many values of `array` are others than in its consecutive `parts`, and by how much; "" if none."""
    flat, begin, count, largest = array.reshape(-1), 0, 0, 0.0
    for part in parts:
        theirs = np.ascontiguousarray(part).reshape(-1)
        ours = flat[begin : begin + theirs.size]
        begin += theirs.size
        differ = np.flatnonzero(_bits(ours) != _bits(theirs))
        if differ.size:
            count += differ.size
            largest = max(largest, _largest_gap(ours[differ], theirs[differ]))
        passed(part)
    return f"{count:,} of {array.size:,} values differ, by up to {largest:.3g}" if count else ""


def _bits(values: np.ndarray) -> np.ndarray:
    """Returns the same memory as integers, in which a NaN equals itself and -0 is not 0."""
    return values.view(f"u{values.itemsize}")


def _largest_gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        gaps = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return float(np.where(np.isnan(gaps), np.inf, gaps).max())


def _nbytes(folder: ModelFolder) -> int:
    return sum(array.nbytes for array in folder.tensors.values())


def _bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
