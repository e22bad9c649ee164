"""Reads TensorFlow's V2 checkpoints ("tensor bundles"), as OpenAI released GPT-2 in, without TensorFlow.

A bundle is an index, which is a LevelDB table of protobufs by tensor name, and data files with the tensors' raw bytes.
Both carry CRC32C sums and all of them are checked: the index's when it is opened, a tensor's when it is first read.
What the names mean is in hparams.json beside the index, which TensorFlow knows nothing of.
"""

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np

from convert.errors import ConvertError
from convert.sources import Source, SourceTensor, companions, map_file, read_json

HPARAMS = "hparams.json"
EXPECTED = f"a TensorFlow checkpoint (checkpoint, model.ckpt.index and its data) beside {HPARAMS}"

DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype(bool),
    14: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype("<u2"),
    19: np.dtype("<f2"),
    22: np.dtype("<u4"),
    23: np.dtype("<u8"),
}
"""TensorFlow's numbers of types, as numpy's."""

# Not raw bytes but lengths and characters: a tensor that can be named, and is never a weight.
_STRING = 7
_MAGIC = bytes.fromhex("57fb808b247547db")
_FOOTER_BYTES = 48
_INDEX_LIMIT = 1 << 26  # bytes of an index, and of the names in it; the largest GPT-2's has 21,000
_RANK_LIMIT = 32
_PART = 1 << 20  # bytes copied at a time to sum them

_TOKENIZER = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
"""OpenAI's names of GPT-2's tokenizer files, and everybody else's."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `shard` counts data files, `crc` is masked as TensorFlow stores it."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    is_sliced: bool


def recognizes(path: Path) -> bool:
    """Tells whether the index of a bundle belongs to `path`, by the last bytes of it."""
    return any(map(_has_magic, _indexes(path)))


def open(path: Path) -> Source:
    """Opens the checkpoint in a folder, the one that its file `checkpoint` names, or the one that a file is part of."""
    indexes = _indexes(path)
    if len(indexes) != 1:
        found = ", ".join(index.name for index in indexes) or "no index"
        raise ConvertError(f"{path}: found {found}; expected {EXPECTED}, or the path of one .index")
    index = indexes[0]
    folder = index.parent
    if not (folder / HPARAMS).is_file():
        raise ConvertError(
            f"{folder}: no {HPARAMS}; it says what the tensors are (n_head is in no shape), so put it there"
        )
    tensors, shards = read_bundle(index)
    renamed = {theirs: folder / ours for ours, theirs in _TOKENIZER.items()}
    return Source(
        path=path,
        format="tensorflow",
        config=read_json(folder / HPARAMS),
        tensors=tensors,
        files=(folder / HPARAMS, index, *shards),
        companions={name: file for name, file in renamed.items() if file.is_file()}
        | companions(folder),
    )


def read_bundle(index: Path) -> tuple[dict[str, SourceTensor], list[Path]]:
    """Returns the tensors of the checkpoint behind `index`, mapped and not yet read, and the data files they lie in.

    Raises:
      ConvertError: the index is damaged, a data file is missing or too short, or a variable is stored in slices.
    """
    count, entries = read_index(index)
    prefix = index.name.removesuffix(".index")
    paths = {
        shard: index.with_name(f"{prefix}.data-{shard:05d}-of-{count:05d}")
        for shard in sorted({entry.shard for entry in entries.values()})
    }
    absent = [f"{path.name} is missing" for path in paths.values() if not path.is_file()]
    if absent:
        raise ConvertError(f"{index}: {len(paths)} data files belong to it", absent)
    return _tensors(entries, paths), list(paths.values())


def read_index(path: Path) -> tuple[int, dict[str, Entry]]:
    """Returns how many data files the bundle behind an index has, and its entries by name.

    Raises:
      ConvertError: the index is damaged, or a variable is stored in slices.
    """
    if path.stat().st_size > _INDEX_LIMIT:
        raise ConvertError(f"{path}: an index of more than {_INDEX_LIMIT:,} bytes")
    try:
        table = _read_table(path.read_bytes())
        if b"" not in table:
            raise ConvertError("no entry that describes the bundle; not a TensorFlow checkpoint")
        count = _shard_count(table.pop(b""))
        entries = {_text(key): _entry(value) for key, value in table.items()}
        _check_entries(entries, count)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error.summary}", error.problems) from error
    return count, entries


def check_data(index: Path, data: Path) -> None:
    """Raises ConvertError unless `data`, by whatever name, is the one data file of `index`, with every sum right."""
    _, entries = read_index(index)
    for tensor in _tensors(entries, {0: data}).values():
        tensor.read()


def _tensors(entries: Mapping[str, Entry], paths: Mapping[int, Path]) -> dict[str, SourceTensor]:
    _check_sizes(entries, paths)
    buffers = {shard: map_file(path) for shard, path in paths.items()}
    return {
        name: SourceTensor(
            name,
            DTYPES[entry.dtype].name if entry.dtype in DTYPES else "string",
            entry.shape,
            _reader(f"{paths[entry.shard]}: {name}", buffers[entry.shard], entry),
        )
        for name, entry in entries.items()
    }


def _indexes(path: Path) -> list[Path]:
    """Returns the index files that `path` may mean: none, one, or in a folder without `checkpoint` all."""
    if path.is_dir():
        return _named(path / "checkpoint") or sorted(path.glob("*.index"))
    if path.name == "checkpoint":
        return _named(path)
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name)
    index = path.with_name(f"{prefix}.index")
    return [index] if prefix != path.name and index.is_file() else []


def _named(checkpoint: Path) -> list[Path]:
    """Returns the index that TensorFlow's text file names as the latest; folders in the name are another machine's."""
    if not checkpoint.is_file():
        return []
    with checkpoint.open("rb") as file:
        text = file.read(1 << 16).decode(errors="replace")
    found = re.search(r'^model_checkpoint_path:\s*"(?:.*[\\/])?([^"\\/]+)"', text, re.MULTILINE)
    index = checkpoint.with_name(f"{found[1]}.index") if found else checkpoint
    return [index] if found and index.is_file() else []


def _has_magic(index: Path) -> bool:
    with index.open("rb") as file:
        file.seek(max(0, index.stat().st_size - len(_MAGIC)))
        return file.read(len(_MAGIC)) == _MAGIC


# The table: LevelDB's doc/table_format.md. Blocks of sorted keys, a block that says where they are, a footer.


def _read_table(content: bytes) -> dict[bytes, bytes]:
    """Returns what a LevelDB table holds; its keys are bytes in rising order."""
    if len(content) < _FOOTER_BYTES or not content.endswith(_MAGIC):
        raise ConvertError(
            f"found {len(content)} bytes that do not end as an index does; cut short, or not one"
        )
    footer = _Cursor(content[-_FOOTER_BYTES:])
    metaindex, where = [(footer.varint(), footer.varint()) for _ in range(2)]
    if any(footer.rest()[: -len(_MAGIC)]) or any(
        True for _ in _block_entries(_block(content, *metaindex))
    ):
        raise ConvertError(
            "damaged: the footer or the metaindex holds what TensorFlow never writes"
        )
    table: dict[bytes, bytes] = {}
    latest, names = None, 0
    for _, handle in _block_entries(_block(content, *where)):
        cursor, before = _Cursor(handle), len(table)
        for key, value in _block_entries(_block(content, cursor.varint(), cursor.varint())):
            if latest is not None and key <= latest:
                raise ConvertError("damaged: its keys do not rise")
            names += len(key)
            if names > _INDEX_LIMIT:
                raise ConvertError(f"names of more than {_INDEX_LIMIT:,} bytes")
            table[key] = value
            latest = key
        if len(table) == before:
            raise ConvertError("damaged: a block with nothing in it")
    return table


def _block(content: bytes, offset: int, size: int) -> bytes:
    """Returns a block after checking the type and the sum that follow it."""
    end = offset + size
    if end + 5 > len(content) - _FOOTER_BYTES:
        raise ConvertError(f"damaged: a block at bytes {offset} to {end} of {len(content)}")
    kind, crc = struct.unpack_from("<BI", content, end)
    if _masked_crc(content[offset : end + 1]) != crc:
        raise ConvertError(f"damaged: the block at byte {offset} does not have its CRC32C")
    if kind:
        name = {1: "snappy", 2: "zstd"}.get(kind, f"type {kind}")
        raise ConvertError(f"compressed ({name}); TensorFlow writes its checkpoints uncompressed")
    return content[offset:end]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block; a key is stored as what differs from the one before."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise ConvertError("damaged: a block shorter than its list of restarts")
    cursor, key, names = _Cursor(block[:end]), b"", 0
    while not cursor.is_done:
        shared, rest, size = cursor.varint(), cursor.varint(), cursor.varint()
        if shared > len(key):
            raise ConvertError("damaged: a key shares more than the one before it has")
        key = key[:shared] + cursor.take(rest)
        names += len(key)
        if names > _INDEX_LIMIT:
            raise ConvertError(f"names of more than {_INDEX_LIMIT:,} bytes")
        yield key, cursor.take(size)


# The protobufs: tensorflow/core/protobuf/tensor_bundle.proto. In proto3 a field that is zero is not written.


def _shard_count(message: bytes) -> int:
    """Returns the number of data files, from a BundleHeaderProto, after checking that we can read them."""
    header = _message(message)
    if _number(header, 2):
        raise ConvertError("a big-endian checkpoint; expected a little-endian one")
    for version in _submessages(header, 3):
        if _number(version, 2) > 1:
            raise ConvertError(f"needs a reader of version {_number(version, 2)}; this one is of 1")
    return _number(header, 1)


def _entry(message: bytes) -> Entry:
    """Returns a BundleEntryProto."""
    entry = _message(message)
    shapes = _submessages(entry, 2)
    if any(_number(shape, 3) or len(shape.get(2, ())) > _RANK_LIMIT for shape in shapes[:1]):
        raise ConvertError("damaged: a stored tensor of no possible rank")
    return Entry(
        dtype=_number(entry, 1),
        shape=tuple(_number(dim, 1) for shape in shapes[:1] for dim in _submessages(shape, 2)),
        shard=_number(entry, 3),
        offset=_number(entry, 4),
        size=_number(entry, 5),
        crc=_number(entry, 6),
        is_sliced=7 in entry,
    )


def _message(data: bytes) -> dict[int, list[int | bytes]]:
    """Returns a message's fields by their numbers: integers, or bytes where there is a length."""
    fields: dict[int, list[int | bytes]] = {}
    cursor = _Cursor(data)
    while not cursor.is_done:
        tag = cursor.varint()
        match tag & 7:
            case 0:
                value = cursor.varint()
            case 1:
                value = int.from_bytes(cursor.take(8), "little")
            case 2:
                value = cursor.take(cursor.varint())
            case 5:
                value = int.from_bytes(cursor.take(4), "little")
            case wire:
                raise ConvertError(f"damaged: a protobuf field of wire type {wire}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(message: Mapping[int, list[int | bytes]], field: int) -> int:
    value = message.get(field, [0])[-1]
    if isinstance(value, bytes):
        raise ConvertError(f"damaged: protobuf field {field} is no number")
    return value


def _submessages(
    message: Mapping[int, list[int | bytes]], field: int
) -> list[dict[int, list[int | bytes]]]:
    values = message.get(field, [])
    if any(isinstance(value, int) for value in values):
        raise ConvertError(f"damaged: protobuf field {field} is no message")
    return [_message(value) for value in values if isinstance(value, bytes)]


class _Cursor:
    """Bytes read from the front; whatever goes beyond their end is a ConvertError."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    @property
    def is_done(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ConvertError(
                f"damaged: {count} bytes expected, {len(self._data) - self._at} left"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte == 0 and shift:
                break
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF
        raise ConvertError("damaged: a number of more than ten bytes, or padded with zeros")


def _text(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


def _check_entries(entries: Mapping[str, Entry], count: int) -> None:
    """Raises ConvertError with every entry that contradicts itself, or that cannot be read."""
    sliced = [f"{name} is a partitioned variable" for name, e in entries.items() if e.is_sliced]
    if sliced:
        raise ConvertError("variables stored in slices are not read; save them whole", sliced)
    problems = []
    for name, entry in entries.items():
        dtype = DTYPES.get(entry.dtype)
        elements = math.prod(entry.shape)
        if entry.shard >= count:
            problems.append(f"{name} lies in data file {entry.shard} of {count}")
        elif dtype is None and entry.dtype != _STRING:
            problems.append(f"{name} has TensorFlow's type {entry.dtype}; known are {list(DTYPES)}")
        elif math.prod(d or 1 for d in entry.shape) >= 1 << 60:
            problems.append(f"{name} has no possible shape")
        elif dtype is not None and elements * dtype.itemsize != entry.size:
            problems.append(
                f"{name} is {dtype.name}{list(entry.shape)}, {elements * dtype.itemsize} bytes, "
                f"but {entry.size} are stored"
            )
    if problems:
        raise ConvertError("damaged", problems)


def _check_sizes(entries: Mapping[str, Entry], paths: Mapping[int, Path]) -> None:
    for shard, path in paths.items():
        expected = max(e.offset + e.size for e in entries.values() if e.shard == shard)
        found = path.stat().st_size
        if found < expected:
            raise ConvertError(
                f"{path}: cut short: found {found} bytes, expected {expected} from its index; "
                "copy or download it again"
            )


def _reader(what: str, buffer: mmap.mmap | bytes, entry: Entry):
    """Returns a function that gives the tensor as it lies in the file, whose sum it checks the first time."""

    @functools.cache
    def read() -> np.ndarray:
        if entry.dtype == _STRING:
            raise ConvertError(f"{what} holds text, which is no weight")
        crc = 0
        for start in range(entry.offset, entry.offset + entry.size, _PART):
            end = min(start + _PART, entry.offset + entry.size)
            crc = google_crc32c.extend(crc, buffer[start:end])
        if _mask(crc) != entry.crc:
            raise ConvertError(
                f"{what} is damaged: its CRC32C is {_mask(crc):08x}, the index says {entry.crc:08x}; "
                "copy or download the file again"
            )
        return np.ndarray(entry.shape, DTYPES[entry.dtype], buffer=buffer, offset=entry.offset)

    return read


def _masked_crc(data: bytes) -> int:
    return _mask(google_crc32c.value(data))


def _mask(crc: int) -> int:
    """Returns a sum as LevelDB stores it: rotated and moved, because a sum of data that holds sums is a weak one."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFF_FFFF
