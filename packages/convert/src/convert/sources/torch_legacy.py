"""PyTorch's format of before 1.6: five pickles one after the other, then every storage's length and bytes.

Repositories of 2019 (DialoGPT, the first gpt2) still have their `pytorch_model.bin` in it. The pickles are a magic
number, a protocol version, facts about the writing machine, the object itself, and the keys of the storages in the
order in which they follow.
"""

import mmap
from pathlib import Path
from typing import Any

from convert import unpickle
from convert.errors import ConvertError
from convert.sources.torch_storage import CALLS, CONSTANTS, Place, Storage, storage_of

START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number, pickled: how every such file begins."""

_PROTOCOL = 1001


def load(path: Path, buffer: mmap.mmap) -> tuple[Any, dict[str, Place]]:
    """Returns the object that was saved, with `View`s for tensors, and where each storage lies.

    Raises:
      ConvertError: it is damaged, cut short, or more than data.
    """
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        whole, (view,) = storage_of(pid, where=path, fields=6)
        if storages.setdefault(whole.key, whole) != whole:
            raise ConvertError(f"{path}: storage {whole.key} is described in two ways")
        return whole if view is None else _part(path, whole, view)

    protocol, at = unpickle.load_at(buffer, len(START), where=path)
    if protocol != _PROTOCOL:
        raise ConvertError(f"{path}: found protocol {protocol!r}, expected {_PROTOCOL}")
    _, at = unpickle.load_at(buffer, at, where=path)
    value, at = unpickle.load_at(
        buffer, at, where=path, calls=CALLS, constants=CONSTANTS, persistent=persistent
    )
    keys, at = unpickle.load_at(buffer, at, where=path)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ConvertError(f"{path}: the list of storages is not one of names")
    if sorted(keys) != sorted(storages):
        raise ConvertError(
            f"{path}: found {len(keys)} storages, expected the {len(storages)} of its tensors"
        )
    return value, _places(path, buffer, at, [storages[key] for key in keys])


def _part(path: Path, whole: Storage, view: Any) -> Storage:
    """Returns the part of a storage that (key, offset, length) describe, in elements."""
    if not (
        type(view) is tuple
        and len(view) == 3
        and all(type(number) is int and number >= 0 for number in view[1:])
        and view[1] + view[2] <= whole.length
    ):
        raise ConvertError(f"{path}: {str(view)[:200]} is no part of storage {whole.key}")
    return Storage(whole.key, whole.dtype, view[2], start=view[1])


def _places(path: Path, buffer: mmap.mmap, at: int, storages: list[Storage]) -> dict[str, Place]:
    """Returns where the storages lie, each behind its length; both are little endian whoever wrote them."""
    places = {}
    for storage in storages:
        found = int.from_bytes(buffer[at : at + 8], "little")
        if at + 8 > len(buffer) or at + 8 + storage.nbytes > len(buffer):
            raise ConvertError(
                f"{path}: cut short: found {len(buffer):,} bytes, expected {at + 8 + storage.nbytes:,} "
                f"up to the end of storage {storage.key}; copy or download it again"
            )
        if found != storage.length:
            raise ConvertError(
                f"{path}: storage {storage.key} has {found:,} elements, its tensors say {storage.length:,}"
            )
        places[storage.key] = Place(buffer, at + 8)
        at += 8 + storage.nbytes
    if at != len(buffer):
        raise ConvertError(f"{path}: found {len(buffer):,} bytes, expected {at:,}")
    return places
