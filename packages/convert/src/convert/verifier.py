"""Is a model folder what its manifest says, and what its source holds: everything is hashed or derived again."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from convert import importer, progress
from convert.errors import ConvertError
from core import checkpoint


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found to be in order; `cast` is the types that tensors of `against` were cast to."""

    tensors: int
    files: int
    nbytes: int
    against: str | None
    cast: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = f"cast to {' and '.join(self.cast)}" if self.cast else "bit for bit"
        same = f", equal to {self.against} {how}" if self.against else ""
        return f"{self.tensors} tensors ({self.nbytes:,} bytes) and {self.files} files as in the manifest{same}"


def verify(
    model: str | Path, *, against: str | Path | None = None, quiet: bool | None = None
) -> Report:
    """Checks the model folder `model`; see `convert.verify`."""
    try:
        folder = checkpoint.open(model)
    except checkpoint.CheckpointError as error:
        raise ConvertError(str(error)) from error
    plan = importer.plan_source(against) if against is not None else None
    problems = list(_differing_files(folder))
    if plan is not None and plan.match.config.to_dict() != folder.config.to_dict():
        problems.append(f"config.json describes another model than {against}")
    hashes = folder.manifest["tensors"]
    total = sum(array.nbytes for array in folder.tensors.values())
    with progress.bar("verifying", total, quiet) as advance:
        for name, array in folder.tensors.items():
            if _sha256([array]) != hashes.get(name, {}).get("sha256"):
                problems.append(f"{name} has another hash than in the manifest")
            if plan is not None and not _holds(plan, name, array):
                problems.append(f"{name} is not what {against} holds")
            advance(array.nbytes)
    if problems:
        raise ConvertError(f"{model}: {len(problems)} differences", problems)
    return Report(
        len(folder.tensors),
        len(folder.manifest["files"]),
        total,
        str(against) if against else None,
        tuple(sorted(_casts(plan, folder))) if plan is not None else (),
    )


def _casts(plan: importer.Plan, folder: checkpoint.ModelFolder) -> set[str]:
    """Returns the types that tensors have here and not in the source."""
    return {
        folder.tensors[name].dtype.name
        for name, move in plan.moves.items()
        if folder.tensors[name].dtype.name != plan.source.tensors[move.found].dtype
    }


def _differing_files(folder: checkpoint.ModelFolder) -> Iterator[str]:
    for name, entry in folder.manifest["files"].items():
        path = folder.path / name
        if not path.is_file():
            yield f"{name} is missing"
        elif checkpoint.sha256(path) != entry["sha256"]:
            yield f"{name} has another hash than in the manifest"


def _holds(plan: importer.Plan, name: str, array: np.ndarray) -> bool:
    """Tells whether the source gives just these bytes for parameter `name`, cast as it was cast."""
    if name not in plan.moves:
        return False
    spec = checkpoint.TensorSpec(name, array.shape, array.dtype.name)
    return _sha256(plan.parts(spec)) == _sha256([array])


def _sha256(parts: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
