"""Writes TensorFlow's V2 checkpoints from their description (LevelDB's table_format.md, tensor_bundle.proto).

It shares nothing with the reader: its sums are its own, bit by bit, unless a test has megabytes to sum.
"""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = 0xDB4775248B80FB57
ENUMS = {
    "float32": 1,
    "float64": 2,
    "int32": 3,
    "uint8": 4,
    "int16": 5,
    "int8": 6,
    "int64": 9,
    "bool": 10,
    "bfloat16": 14,
    "uint16": 17,
    "float16": 19,
    "uint32": 22,
    "uint64": 23,
}

Crc = Callable[[bytes], int]


def _table_row(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_ROWS = [_table_row(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Castagnoli's sum, a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _ROWS[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    rotated = (crc >> 15) | ((crc & 0x7FFF) << 17)
    return (rotated + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes | float) -> bytes:
    """A protobuf field; a float stands for a fixed32, which sums are."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<I", int(value))
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def entry(
    dtype: int, shape: tuple[int, ...], shard: int, offset: int, size: int, crc: int
) -> bytes:
    dims = b"".join(field(2, field(1, dim)) for dim in shape)
    places = field(3, shard) + field(4, offset) + field(5, size)
    return field(1, dtype) + field(2, dims) + places + field(6, float(crc))


def header(shards: int, **fields: Any) -> bytes:
    """The entry of the empty name; `endianness` and `version` as they are on the wire."""
    version = fields.get("version", field(1, 1))
    return field(1, shards) + field(2, fields.get("endianness", 0)) + field(3, version)


def block(pairs: list[tuple[bytes, bytes]], restart_interval: int = 16) -> bytes:
    body, restarts, previous = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart_interval == 0:
            restarts.append(len(body))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        rest = key[shared:]
        body += varint(shared) + varint(len(rest)) + varint(len(value)) + rest + value
        previous = key
    restarts = restarts or [0]
    return body + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(
    pairs: Mapping[bytes, bytes],
    *,
    per_block: int = 1000,
    restart_interval: int = 16,
    kind: int = 0,
    tamper: Callable[[bytes], bytes] = lambda block: block,
) -> bytes:
    """An index file; `tamper` changes blocks before they are signed, as somebody would who means harm."""
    out = b""

    def put(content: bytes) -> bytes:
        nonlocal out
        content = tamper(content)
        handle = varint(len(out)) + varint(len(content))
        signed = content + bytes([kind])
        out += signed + struct.pack("<I", masked(crc32c(signed)))
        return handle

    keys = sorted(pairs)
    groups = [keys[i : i + per_block] for i in range(0, len(keys), per_block)]
    index = []
    for group in groups:
        handle = put(block([(key, pairs[key]) for key in group], restart_interval))
        index.append((group[-1] + b"~", handle))  # a separator, and no tensor's name
    metaindex = put(block([]))
    where = put(block(index, 1))
    footer = (metaindex + where).ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    return out + footer


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    prefix: str = "model.ckpt",
    crc: Crc = crc32c,
    **layout: Any,
) -> Path:
    """Writes a checkpoint, its tensors in turn in `shards` data files; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [bytearray() for _ in range(shards)]
    pairs = {b"": header(shards)}
    for i, (name, array) in enumerate(tensors.items()):
        raw = array.tobytes()
        place = data[i % shards]
        pairs[name.encode()] = entry(
            ENUMS[array.dtype.name],
            array.shape,
            i % shards,
            len(place),
            len(raw),
            masked(crc(raw)),
        )
        place += raw
    for i, content in enumerate(data):
        (folder / f"{prefix}.data-{i:05d}-of-{shards:05d}").write_bytes(content)
    index = folder / f"{prefix}.index"
    index.write_bytes(table(pairs, **layout))
    return index
