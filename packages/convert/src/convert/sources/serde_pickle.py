"""Reads pickles of maps, strings and lists of bytes as serde-pickle (Rust) writes them, without an unpickler.

A list of bytes is two bytes of file a byte, and one Python object a byte once unpickled; here it is found by its length
and decoded by numpy. What such a pickle is made of is nine opcodes. Any other is refused by its name, among them every
one that could import or call.
"""

import mmap
import struct
from typing import Any

import numpy as np

from convert.sources.msgpack_walker import Malformed

_BATCH = 1000  # numbers that are appended to a list at a time
_GROUP = 1000  # batches that are decoded at a time


class Reader:
    """Reads the opcodes that such a pickle is made of; any other is an error that names it."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, expected: bytes) -> None:
        found = self.data[self.at : self.at + len(expected)]
        if found != expected:
            wrong = next((i for i, byte in enumerate(found) if byte != expected[i]), len(found))
            raise Malformed(self._unexpected(self.at + wrong))
        self.at += len(expected)

    def next_is(self, expected: bytes) -> bool:
        return self.data[self.at : self.at + len(expected)] == expected

    def text(self) -> str:
        self.take(b"X")
        (size,) = self._unpack("<I")
        if self.at + size > len(self.data):
            raise Malformed(f"cut short: a string of {size} bytes at byte {self.at}")
        self.at += size
        try:
            return self.data[self.at - size : self.at].decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"byte {self.at}: {error}") from error

    def sizes(self) -> tuple[int, ...]:
        self.take(b"]")
        if not self.next_is(b"("):
            return ()
        self.take(b"(")
        values = []
        while not self.next_is(b"e"):
            if len(values) == 32:
                raise Malformed(f"byte {self.at}: a shape of more than 32 sizes")
            self.take(b"J")
            values.append(self._unpack("<I")[0])
        self.take(b"e")
        return tuple(values)

    def skip_bytes(self, count: int) -> int:
        """Passes over a list of `count` bytes and returns where it began."""
        start = self.at
        self.take(b"]")
        if count:
            self.take(b"(")
            self.at += 2 * count + 2 * (count // _BATCH)
            self.take(b"e")
        return start

    def _unpack(self, code: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from(code, self.data, self.at)
        except struct.error as error:
            raise Malformed(f"cut short at byte {len(self.data)}") from error
        self.at += struct.calcsize(code)
        return values

    def _unexpected(self, at: int) -> str:
        import pickletools

        if at >= len(self.data):
            return f"cut short at byte {len(self.data)}"
        code = self.data[at : at + 1].decode("latin-1")
        known = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        name = known.get(code, f"byte {code!r}")
        return f"pickle opcode {name} at byte {at} is refused: TensorPort writes lists and strings"


def read_bytes(data: mmap.mmap, start: int, count: int) -> np.ndarray:
    """Returns the `count` bytes of the list at `start`: an opcode stands before each, two between batches.

    Raises:
      Malformed: another opcode stands there.
    """
    result = np.empty(count, np.uint8)
    stride = 2 * _BATCH + 2
    for begin in range(0, count, _BATCH * _GROUP):
        size = min(_BATCH * _GROUP, count - begin)
        batches = -(-size // _BATCH)
        at = start + 2 + begin // _BATCH * stride
        coded = np.frombuffer(data, np.uint8, 2 * size + 2 * (size // _BATCH), at)
        whole = np.zeros(batches * stride, np.uint8)
        whole[: coded.size] = coded
        rows = whole.reshape(batches, stride)
        opcodes = rows[:, : 2 * _BATCH : 2].reshape(-1)[:size]
        ends = rows[: size // _BATCH, 2 * _BATCH :]
        if not (opcodes == ord("K")).all() or not (ends == (ord("e"), ord("("))).all():
            raise Malformed("an opcode that is refused: TensorPort writes lists of bytes")
        result[begin : begin + size] = rows[:, 1 : 2 * _BATCH : 2].reshape(-1)[:size]
    return result
