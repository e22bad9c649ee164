"""Reads our own model folder: what has been converted already is cast, unpacked or verified from there."""

from pathlib import Path

import numpy as np

from convert.errors import ConvertError
from convert.sources import CONFIG, Source, SourceTensor, read_json
from core import checkpoint

EXPECTED = f"a model folder with {checkpoint.MANIFEST}"

_ITS_OWN = (".json", ".safetensors")  # another file that lies there is a checkpoint of its own


def recognizes(path: Path) -> bool:
    """Tells whether a model folder lies at `path`, or around the file of it there."""
    folder = path if path.is_dir() else path.parent
    return (
        (path.is_dir() or path.suffix in _ITS_OWN)
        and all((folder / name).is_file() for name in (CONFIG, checkpoint.MANIFEST))
        and checkpoint.is_model_folder(folder)
    )


def open(path: Path) -> Source:
    """Opens the model folder at `path`, after checking that it is whole; what its manifest says of its source goes on.

    The tensors are hashed by `convert.verify`, not here.
    """
    path = path if path.is_dir() else path.parent
    try:
        folder = checkpoint.open(path)
    except checkpoint.CheckpointError as error:
        raise ConvertError(str(error)) from error
    beside = sorted(folder.manifest["files"].keys() - {CONFIG})
    absent = [f"{name} is missing" for name in beside if not (path / name).is_file()]
    if absent:
        raise ConvertError(f"{path}: not all that the manifest names is there", absent)
    shards = (path / name for name in folder.manifest["shards"])
    source = folder.manifest.get("source")
    return Source(
        path=path,
        format="model_folder",
        config=read_json(path / CONFIG),
        tensors={name: _tensor(name, array) for name, array in folder.tensors.items()},
        files=(path / CONFIG, path / checkpoint.MANIFEST, *shards),
        companions={name: path / name for name in beside},
        origin=source if isinstance(source, dict) else {},
    )


def _tensor(name: str, array: np.ndarray) -> SourceTensor:
    return SourceTensor(name, array.dtype.name, array.shape, lambda: array)
