"""Where everything lies in a MessagePack file: its items are walked over a memory map, by their headers.

The msgpack package gives whole objects; a checkpoint is one object. What is walked over here is never copied, so a
file of many gigabytes costs the memory of its names.
"""

import dataclasses
import mmap
import struct
from typing import Any

_NUMBERS = {
    0xCA: (">f", 4),
    0xCB: (">d", 8),
    0xCC: (">B", 1),
    0xCD: (">H", 2),
    0xCE: (">I", 4),
    0xCF: (">Q", 8),
    0xD0: (">b", 1),
    0xD1: (">h", 2),
    0xD2: (">i", 4),
    0xD3: (">q", 8),
}
_SIZED = {
    **dict(zip(range(0xC4, 0xC7), (("bin", 1), ("bin", 2), ("bin", 4)), strict=True)),
    **dict(zip(range(0xC7, 0xCA), (("ext", 1), ("ext", 2), ("ext", 4)), strict=True)),
    **dict(zip(range(0xD9, 0xDC), (("str", 1), ("str", 2), ("str", 4)), strict=True)),
    **dict(zip(range(0xDC, 0xDE), (("array", 2), ("array", 4)), strict=True)),
    **dict(zip(range(0xDE, 0xE0), (("map", 2), ("map", 4)), strict=True)),
}
_LENGTHS = {1: ">B", 2: ">H", 4: ">I"}
_PLAIN = {0xC0: None, 0xC2: False, 0xC3: True}


class Malformed(ValueError):
    """The bytes are no MessagePack, or not of the kind that was asked for."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An item: `size` counts the bytes of a str, bin or ext, the items of an array, the pairs of a map.

    `start` is where its content begins: after the header, and after the type byte of an ext. A "value" (a number, a
    bool or nil) has none and ends there. `value` is that value, or the type of an ext.
    """

    kind: str
    size: int
    start: int
    value: Any = None


def item(data: mmap.mmap | memoryview, offset: int) -> Item:
    """Returns what begins at `offset`.

    Raises:
      Malformed: the file ends before it does.
    """
    (tag,) = _unpack(data, ">B", offset)
    if tag <= 0x7F or tag >= 0xE0:
        return Item("value", 0, offset + 1, tag if tag <= 0x7F else tag - 256)
    if tag in _PLAIN:
        return Item("value", 0, offset + 1, _PLAIN[tag])
    if tag in _NUMBERS:
        code, width = _NUMBERS[tag]
        return Item("value", 0, offset + 1 + width, _unpack(data, code, offset + 1)[0])
    kind, size, start = _sized(data, tag, offset)
    code = None
    if kind == "ext":
        (code,) = _unpack(data, ">b", start)
        start += 1
    if kind in ("str", "bin", "ext") and start + size > len(data):
        raise Malformed(f"cut short: {kind} at byte {offset} ends at {start + size}")
    return Item(kind, size, start, code)


def text(data: mmap.mmap | memoryview, offset: int) -> tuple[str, int]:
    """Returns the string that begins at `offset`, and where it ends."""
    found = item(data, offset)
    if found.kind not in ("str", "bin"):
        raise Malformed(f"byte {offset}: expected a string, found {_described(found)}")
    end = found.start + found.size
    try:
        return bytes(data[found.start : end]).decode(), end
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {offset}: {error}") from error


def sizes(data: mmap.mmap | memoryview, offset: int) -> tuple[tuple[int, ...], int]:
    """Returns the array of sizes (a shape) that begins at `offset`, and where it ends."""
    found = item(data, offset)
    if found.kind != "array" or found.size > 32:
        raise Malformed(f"byte {offset}: expected a shape, found {_described(found)}")
    values, end = [], found.start
    for _ in range(found.size):
        element = item(data, end)
        if type(element.value) is not int or element.kind != "value" or element.value < 0:
            raise Malformed(f"byte {end}: expected a size, found {_described(element)}")
        values.append(element.value)
        end = element.start
    return tuple(values), end


def expect(data: mmap.mmap | memoryview, offset: int, kind: str) -> Item:
    """Returns the item at `offset`, which has to be of `kind`."""
    found = item(data, offset)
    if found.kind != kind:
        raise Malformed(f"byte {offset}: expected {kind}, found {_described(found)}")
    return found


def _sized(data: mmap.mmap | memoryview, tag: int, offset: int) -> tuple[str, int, int]:
    """Returns kind, size, and the byte after the size."""
    if tag <= 0x8F:
        return "map", tag & 0x0F, offset + 1
    if tag <= 0x9F:
        return "array", tag & 0x0F, offset + 1
    if tag <= 0xBF:
        return "str", tag & 0x1F, offset + 1
    if 0xD4 <= tag <= 0xD8:
        return "ext", 1 << (tag - 0xD4), offset + 1
    if tag not in _SIZED:
        raise Malformed(f"byte {offset} is {tag:#x}, which MessagePack never writes")
    kind, width = _SIZED[tag]
    return kind, _unpack(data, _LENGTHS[width], offset + 1)[0], offset + 1 + width


def _unpack(data: mmap.mmap | memoryview, code: str, offset: int) -> tuple[Any, ...]:
    try:
        return struct.unpack_from(code, data, offset)
    except struct.error as error:
        raise Malformed(f"cut short at byte {len(data)}") from error


def _described(found: Item) -> str:
    return repr(found.value) if found.kind == "value" else f"{found.kind} of {found.size}"
