"""Reads Orbax checkpoints of arrays by name, through TensorStore, which is what Orbax itself keeps them in.

Orbax restores whole trees; read leaf by leaf, a checkpoint costs the memory of one array. All layouts are read that
write `_METADATA`: v0 and v1, with OCDBT or a folder an array, zarr 2 and 3, and a CheckpointManager's steps.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.sources import CONFIG, Source, SourceTensor, companions, params_tree, read_json
from core import checkpoint

METADATA = "_METADATA"
EXPECTED = (
    f"an Orbax checkpoint (with {METADATA}, or a folder of steps) with {CONFIG} in or beside it"
)

ITEMS = ("params", "state", "pytree", "default", "model")
"""The items of a checkpoint that may hold parameters, in the order in which they are looked for."""

_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
_DAMAGE = (ValueError, KeyError, TypeError, OverflowError, MemoryError, RuntimeError, OSError)
"""What TensorStore raises for stores that are damaged or made by hand."""


def recognizes(path: Path) -> bool:
    """Tells whether Orbax wrote the folder `path`, or a step or an item in it."""
    if not path.is_dir():
        return False
    try:
        return bool(_items(path) or _steps(path) or _run(path))
    except OSError:
        return False


def open(path: Path) -> Source:
    """Opens a checkpoint, the parameters among its items, or the last step of a folder of steps."""
    _refuse_run(path)
    step, notes = path, ()
    if not _items(path) and (steps := _steps(path)):
        step = steps[-1]
        if len(steps) > 1:
            notes = (f"of {len(steps)} steps, {step.name} is read",)
    item = _item(step)
    config_file, config = params_tree.read_config(
        path, dict.fromkeys((item, step, path, path.parent))
    )
    metadata = read_json(item / METADATA)
    tensors, left_out = params_tree.parameters(_tensors(item, metadata))
    return Source(
        path=path,
        format="orbax",
        config=config,
        tensors=tensors,
        files=(config_file, *sorted(file for file in item.rglob("*") if file.is_file())),
        companions=companions(config_file.parent),
        notes=(*notes, *left_out),
    )


def _refuse_run(path: Path) -> None:
    """Raises ConvertError if `path` lies in a training run, whose model is a folder of its own already."""
    if (run := _run(path)) is not None:
        raise ConvertError(f"{path}: of a training run; its model is {run / 'model'}, use that")


def _run(path: Path) -> Path | None:
    """Returns the folder of the training run of ours that `path` is, or lies in."""
    for run in (path, *path.absolute().parents[:3]):
        if checkpoint.is_model_folder(run / "model") and (run / "checkpoints").is_dir():
            return run
    return None


def _items(folder: Path) -> list[Path]:
    """Returns the folders at and in `folder` that hold a tree, those whose names say that it is parameters first."""
    if (folder / METADATA).is_file():
        return [folder]
    found = sorted(item.parent for item in folder.glob(f"*/{METADATA}") if _is_name(item.parent))
    return sorted(found, key=lambda item: ITEMS.index(item.name) if item.name in ITEMS else 99)


def _is_name(item: Path) -> bool:
    """Tells whether a folder is an item and no step: steps are numbers, with a prefix perhaps."""
    return _number(item) is None


def _number(folder: Path) -> int | None:
    found = re.fullmatch(r"(?:\w+_)?(\d{1,18})", folder.name)
    return int(found[1]) if found else None


def _steps(folder: Path) -> list[Path]:
    """Returns the steps in `folder` that hold something, the last one last."""
    numbered = {path: _number(path) for path in folder.iterdir() if path.is_dir()}
    steps = {path: number for path, number in numbered.items() if number is not None}
    return sorted((path for path in steps if _items(path)), key=lambda path: steps[path])


def _item(step: Path) -> Path:
    items = _items(step)
    if not items:
        raise ConvertError(
            f"{step}: expected {EXPECTED}; checkpoints from before 2023 are not read"
        )
    if len(items) > 1 and items[0].name not in ITEMS:
        names = ", ".join(item.name for item in items)
        raise ConvertError(f"{step}: holds {names}; give the path of the one with the parameters")
    return items[0]


def _tensors(item: Path, metadata: Mapping[str, Any]) -> dict[str, SourceTensor]:
    leaves = metadata.get("tree_metadata")
    if not isinstance(leaves, dict):
        raise ConvertError(f"{item / METADATA}: no tree_metadata")
    tensors, problems = {}, []
    for leaf in leaves.values():
        keys, kind = _leaf(item, leaf)
        name = ".".join(keys)
        if name in tensors:
            problems.append(f"{name[:60]} is there twice")
        elif kind in _ARRAYS:
            tensors[name] = _tensor(item, metadata, name)
    if problems:
        raise ConvertError(f"{item / METADATA} cannot be", problems)
    return tensors


def _leaf(item: Path, leaf: Any) -> tuple[list[str], str]:
    """Returns the path of a leaf and what kind of value it is."""
    try:
        keys = [str(key["key"]) for key in leaf["key_metadata"]]
        kind = str(leaf["value_metadata"]["value_type"])
    except (KeyError, TypeError) as error:
        raise ConvertError(f"{item / METADATA}: {str(leaf)[:60]} is no leaf") from error
    if not keys or any(not key or key in (".", "..") or "/" in key or "\0" in key for key in keys):
        raise ConvertError(f"{item / METADATA}: {str(keys)[:60]} is no path of a leaf")
    return keys, kind


def _tensor(item: Path, metadata: Mapping[str, Any], name: str) -> SourceTensor:
    """Opens one array; its chunks are read when it is."""
    where = f"{item}: {name[:60]}"
    spec = _spec(item, metadata, name)
    try:
        store = _open_store(spec)
    except _DAMAGE as error:
        raise ConvertError(f"{where} cannot be opened: {_first_line(error)}") from error
    dtype = store.dtype.numpy_dtype
    if dtype is None or dtype.hasobject:
        raise ConvertError(f"{where} has type {store.dtype.name}; expected numbers")
    return SourceTensor(name, dtype.name, tuple(store.shape), _reader(spec, dtype, where))


def _reader(spec: Mapping[str, Any], dtype: np.dtype, where: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            return np.asarray(_open_store(spec).read().result()).astype(dtype, copy=False)
        except _DAMAGE as error:
            raise ConvertError(f"{where} cannot be read: {_first_line(error)}") from error

    return read


def _open_store(spec: Mapping[str, Any]) -> Any:
    import tensorstore

    # No cache: what is read once is not read again, and would be held twice.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    return tensorstore.open(dict(spec), context=context, open=True, read=True).result()


def _spec(item: Path, metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns where TensorStore finds the array; `name` is its path joined by dots, which is Orbax's name of it."""
    folder = {"driver": "file", "path": f"{item.absolute()}/"}
    if metadata.get("use_ocdbt"):
        store = {"driver": "ocdbt", "base": folder, "path": f"{name}/"}
    else:
        store = {**folder, "path": f"{item.absolute()}/{name}/"}
    return {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": store,
        # Where all chunks are written, also those of zeros, one that is missing is lost and not zero.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
    }


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
