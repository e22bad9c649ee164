"""Reads Hugging Face checkpoints in safetensors: one file, or shards behind an index.

The container is an 8-byte length, a JSON header and raw little-endian bytes. It is parsed here, because old files are
not aligned, and because whoever has a damaged file should hear what was found and what was expected before a tensor is
touched.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import ConvertError
from convert.sources import (
    CONFIG,
    GENUINE_BYTES,
    Source,
    SourceTensor,
    check_genuine,
    companions,
    map_file,
    read_json,
    reader,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPECTED = f"{SINGLE} (or shards and {INDEX}) beside {CONFIG}"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""The format's names of types, as numpy's."""

_UNINDEXED = re.compile(r"model--\d{5}-of-(\d{5})\.safetensors")
_HEADER_LIMIT = 100_000_000  # the format's own
_MAX_AXES, _MAX_COUNT = 64, 1 << 62  # numpy's; the product of so many such numbers takes no time


def recognizes(path: Path) -> bool:
    """Tells whether safetensors weights lie at `path`, by the first bytes of a file and the names in a folder."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{")
    return any((path / name).is_file() for name in (INDEX, SINGLE)) or bool(_unindexed(path))


def open(path: Path) -> Source:
    """Opens a checkpoint folder, or a single weights file with its config.json beside it.

    The index decides where there is one. Folders below are not looked into: repositories carry a second copy of their
    weights there.
    """
    folder = path.parent if path.is_file() else path
    config = _read_config(folder)
    if path.is_file():
        tensors, files = read_file(path), [path]
    elif (folder / INDEX).is_file():
        tensors, shards = read_shards(folder / INDEX, read_file)
        files = [folder / INDEX, *shards]
    elif (folder / SINGLE).is_file():
        tensors, files = read_file(folder / SINGLE), [folder / SINGLE]
    else:
        tensors, files = _read_unindexed(folder)
    return Source(
        path=path,
        format="safetensors",
        config=config,
        tensors=tensors,
        files=(folder / CONFIG, *files),
        companions=companions(folder),
    )


def shard_names(index: Path) -> dict[str, str]:
    """Returns the index's map of tensor to file, with every file's name checked to be a plain name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index}: no 'weight_map' of tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise ConvertError(
                f"{index}: {name} lies in {shard!r}; expected the name of a file in this folder"
            )
    return weight_map


def read_file(path: Path) -> dict[str, SourceTensor]:
    """Returns the tensors of one safetensors file in the order of their bytes, memory-mapped and not yet read.

    Raises:
      ConvertError: the header is damaged, or the file is not exactly as long as it says.
    """
    size = path.stat().st_size
    header, start = _read_header(path, size)
    entries = sorted(_entries(path, header), key=lambda entry: entry[3])
    end = start
    for name, _, _, (begin, stop) in entries:
        if start + begin != end:
            raise ConvertError(
                f"{path}: {name} begins at byte {start + begin}, but the data before it ends at {end}"
            )
        end = start + stop
    if size != end:
        state = "cut short: " if size < end else ""
        raise ConvertError(
            f"{path}: {state}found {size} bytes, expected {end} from its header; copy or download it again"
        )
    buffer = map_file(path)
    return {
        name: SourceTensor(name, dtype.name, shape, reader(buffer, dtype, shape, start + begin))
        for name, dtype, shape, (begin, _) in entries
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ConvertError(f"{folder}: no {CONFIG}; it says what the tensors are, so put it there")
    return read_json(folder / CONFIG)


def read_shards(
    index: Path, read: Callable[[Path], dict[str, SourceTensor]]
) -> tuple[dict[str, SourceTensor], list[Path]]:
    """Returns what the index names, and the shards, each opened by `read`; index and shards must say the same."""
    folder, where = index.parent, shard_names(index)
    shards = sorted(set(where.values()))
    absent = [f"{shard} is missing" for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ConvertError(f"{folder}: {index.name} names {len(shards)} shards", absent)
    tensors: dict[str, SourceTensor] = {}
    problems = []
    for shard in shards:
        found = read(folder / shard)
        listed = {name for name, file in where.items() if file == shard}
        problems += [f"{shard} lacks {name}" for name in sorted(listed - found.keys())]
        problems += [f"{shard} holds {name} unlisted" for name in sorted(found.keys() - listed)]
        tensors |= found
    if problems:
        raise ConvertError(f"{folder}: {index.name} and the shards differ", problems)
    return tensors, [folder / shard for shard in shards]


def _unindexed(folder: Path) -> dict[Path, int]:
    """Returns the shards that OpenAI names "model--0000k-of-0000n" and gives no index, each with its n."""
    found = {path: _UNINDEXED.fullmatch(path.name) for path in folder.glob("model--*.safetensors")}
    return {path: int(match[1]) for path, match in sorted(found.items()) if match}


def _read_unindexed(folder: Path) -> tuple[dict[str, SourceTensor], list[Path]]:
    shards = _unindexed(folder)
    if not shards:
        raise ConvertError(f"{folder}: found no safetensors; expected {EXPECTED}")
    total = max(shards.values())
    if len(shards) < total or set(shards.values()) != {total}:
        raise ConvertError(
            f"{folder}: found {len(shards)} of {total} shards ({', '.join(path.name for path in shards)}); "
            "copy or download the rest"
        )
    tensors: dict[str, SourceTensor] = {}
    for path in shards:
        found = read_file(path)
        if twice := tensors.keys() & found.keys():
            raise ConvertError(f"{path}: {min(twice)} lies in another shard too")
        tensors |= found
    return tensors, list(shards)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Returns the header and the byte at which the data starts."""
    with path.open("rb") as file:
        check_genuine(path, file.read(GENUINE_BYTES))
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_LIMIT or 8 + length > size:
            raise ConvertError(
                f"{path}: found {size} bytes, expected at least {8 + length} for its header; "
                "cut short, or not a safetensors file"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: the header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise ConvertError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _entries(
    path: Path, header: Mapping[str, Any]
) -> Iterator[tuple[str, np.dtype, tuple[int, ...], tuple[int, int]]]:
    """Yields (name, dtype, shape, (begin, end)) of every entry, each consistent in itself."""
    for name, entry in header.items():
        if not _is_sound(entry):
            raise ConvertError(
                f"{path}: the header entry of {name!r} is {str(entry)[:200]}; expected dtype, shape and data_offsets"
            )
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if code not in DTYPES:
            raise ConvertError(f"{path}: {name} has dtype {code!r}; known are {', '.join(DTYPES)}")
        nbytes = math.prod(shape) * DTYPES[code].itemsize
        if end - begin != nbytes:
            raise ConvertError(
                f"{path}: {name} is {code}{shape}, {nbytes} bytes, but its offsets span {end - begin}"
            )
        yield name, DTYPES[code], tuple(shape), (begin, end)


def _is_sound(entry: Any) -> bool:
    def are_counts(values: Any) -> bool:
        return (
            isinstance(values, list)
            and len(values) <= _MAX_AXES
            and all(type(n) is int and 0 <= n < _MAX_COUNT for n in values)
        )

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and are_counts(entry.get("shape"))
        and are_counts(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result
