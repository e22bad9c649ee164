"""Archives as torch.save writes them, put together by hand: for what torch itself would never write."""

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

from convert.targets import torch_archive


def proto(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str, length: int, kind: str = "torch\nFloatStorage", more: bytes = b"") -> bytes:
    """A reference to a storage; in a legacy file `more` is what follows."""
    return (
        b"(" + text("storage") + f"c{kind}\n".encode() + text(key) + text("cpu") + number(length)
    ) + (more + b"tQ")


def tensor(
    reference: bytes,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int = 0,
    rebuild: str = "torch._utils\n_rebuild_tensor_v2",
    more: bytes = b"\x89ccollections\nOrderedDict\n)R",
) -> bytes:
    """A call that rebuilds a tensor."""
    view = number(offset) + numbers(shape) + numbers(strides)
    return f"c{rebuild}\n(".encode() + reference + view + more + b"tR"


def state(tensors: Mapping[str, bytes]) -> bytes:
    """The pickle of a dict of names to calls."""
    return proto(b"}(" + b"".join(text(name) + call for name, call in tensors.items()) + b"u")


def archive(
    pickled: bytes,
    records: Mapping[str, bytes],
    *,
    top: str = "archive",
    order: bytes | None = b"little",
    **options: Any,
) -> bytes:
    """A zip archive with data.pkl and storages."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as file:
        file.writestr(f"{top}/data.pkl", pickled)
        file.writestr(f"{top}/version", b"3\n")
        if order is not None:
            file.writestr(f"{top}/byteorder", order)
        for key, data in records.items():
            file.writestr(f"{top}/data/{key}", data)
    return content.getvalue()


def legacy(
    pickled: bytes,
    storages: Mapping[str, tuple[int, bytes]],
    *,
    protocol: int = 1001,
    keys: list[str] | None = None,
) -> bytes:
    """A file of before 1.6: `storages` gives every key its length and its bytes."""
    parts = [
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        torch_archive.dumps(protocol),
        torch_archive.dumps({"protocol_version": 1001, "little_endian": True}),
        pickled,
        torch_archive.dumps(keys if keys is not None else list(storages)),
    ]
    parts += [struct.pack("<q", length) + data for length, data in storages.values()]
    return b"".join(parts)
