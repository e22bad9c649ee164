"""Pickles without their power: a stack machine of our own, over plain data.

A pickle is a program, and Python's own unpickler cannot be made safe by overriding `find_class`: it sizes its memo by
an index that the file states, sets attributes of whatever a name stands for (BUILD), and hashes tuples of any depth.
So this machine executes the few opcodes that picklers of protocol 2 and later write for data, and refuses any other
by name. A global is never imported. It is looked up in what the caller allows: values it stands for, or functions of
the caller's that take plain data and return it.

What comes out is a tree and small: nothing contains itself, nothing is nested deeper than `DEPTH`, and written out it
is at most a few times the size of the file. So whoever walks it or prints it needs no care.
"""

import dataclasses
import mmap
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

from convert.errors import ConvertError

DEPTH = 50
OPCODES = 1 << 21  # at some 200 bytes each, the most that a file can make us hold
# A tree may be that many times as large as its pickle, and so many bytes more.
_GROWTH, _ALLOWANCE = 16, 1 << 20
_LARGEST = 1 << 26  # and this in any case; all strings together, too
_NAME_BYTES = 1024
_KEYS = (
    str,
    int,
    float,
    bool,
    bytes,
    type(None),
)  # hashing these takes time in proportion to their length

Buffer = bytes | memoryview | mmap.mmap


@dataclasses.dataclass(frozen=True)
class Function:
    """An allowed function that a pickle names; inert, wherever in the data it may stand."""

    name: str


def load(
    data: Buffer,
    *,
    where: object,
    calls: Mapping[str, Callable[..., Any]] | None = None,
    constants: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    max_opcodes: int = OPCODES,
) -> Any:
    """Returns what the pickle at the start of `data` holds; see `load_at`."""
    return load_at(
        data,
        0,
        where=where,
        calls=calls,
        constants=constants,
        persistent=persistent,
        max_opcodes=max_opcodes,
    )[0]


def load_at(
    data: Buffer,
    start: int,
    *,
    where: object,
    calls: Mapping[str, Callable[..., Any]] | None = None,
    constants: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    max_opcodes: int = OPCODES,
) -> tuple[Any, int]:
    """Returns what the pickle at byte `start` of `data` holds, and the byte after it.

    Args:
      data: the file, mapped or read.
      start: where the pickle begins.
      where: what to call it in errors: a path.
      calls: the functions that the pickle may call, by their full name in it ("collections.OrderedDict").
      constants: what other names stand for; these cannot be called.
      persistent: makes a value of a persistent id; without it there may be none.
      max_opcodes: a longer pickle is refused.

    Raises:
      ConvertError: an opcode or a global that is not allowed, or a pickle that is damaged, by its name and place.
    """
    with memoryview(data) as view:
        machine = _Machine(view, start, str(where), calls or {}, constants or {}, persistent)
        return machine.run(max_opcodes), machine.position


@dataclasses.dataclass(slots=True)
class _Extent:
    """What a container amounts to: written out in full, in depth; and whether it is inside another one already."""

    value: Any  # kept, so that no other object gets its id
    size: int
    depth: int
    is_sealed: bool = False


class _Machine:
    """The stack, the marks in it, the memo; one method for each opcode, listed in `_STEPS`."""

    def __init__(
        self,
        data: memoryview,
        start: int,
        where: str,
        calls: Mapping[str, Callable[..., Any]],
        constants: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None,
    ):
        self.data, self.position, self.where = data, start, where
        self.calls, self.constants, self.persistent = calls, constants, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.extents: dict[int, _Extent] = {}
        self.opcode = start
        self.room = _LARGEST
        self.largest = min(_GROWTH * (len(data) - start) + _ALLOWANCE, _LARGEST)

    def run(self, max_opcodes: int) -> Any:
        for _ in range(max_opcodes):
            self.opcode = self.position
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                raise self.refused(f"opcode {_opcode_name(code)} is not allowed")
            step(self)
        raise self.refused(f"more than {max_opcodes:,} opcodes")

    def refused(self, what: str) -> ConvertError:
        return ConvertError(f"{self.where}: refused to unpickle: {what} (at byte {self.opcode})")

    # Bytes

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            missing = end - len(self.data)
            raise self.refused(
                f"cut short: {count:,} bytes are wanted, {missing:,} of them missing"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, kind: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def line(self) -> str:
        ahead = bytes(self.data[self.position : self.position + _NAME_BYTES])
        text, newline, _ = ahead.partition(b"\n")
        if not newline:
            raise self.refused("a name without an end")
        self.position += len(text) + 1
        return self.text(text, "utf-8")

    def text(self, data: bytes | memoryview, encoding: str) -> str:
        try:
            return str(data, encoding)
        except UnicodeDecodeError as error:
            raise self.refused(f"a string that is not {encoding}") from error

    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        self.peek()
        return self.stack.pop()

    def peek(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.refused("the stack is empty")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise self.refused("no mark on the stack")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    # Containers: each is measured as it grows, and is finished when it goes into another

    def contain(self, container: Any, items: list[Any]) -> Any:
        """Notes that `items` have gone into `container`, and returns it."""
        extent = self.extents.get(id(container))
        if extent is None:
            extent = self.extents[id(container)] = _Extent(container, 1, 1)
        elif extent.is_sealed:
            raise self.refused("a container grows after it was put into another")
        for item in items:
            inner = self.extents.get(id(item))
            if inner is not None:
                inner.is_sealed = True
                extent.size += inner.size
                extent.depth = max(extent.depth, inner.depth + 1)
            else:
                extent.size += 1 + (len(item) if isinstance(item, (str, bytes)) else 0)
        if extent.is_sealed:
            raise self.refused("a container holds itself")
        if extent.depth > DEPTH:
            raise self.refused(f"nested deeper than {DEPTH}")
        if extent.size > self.largest:
            raise self.refused("its values are repeated until they fill the memory")
        return container

    def make_tuple(self, items: list[Any]) -> None:
        self.push(self.contain(tuple(items), items) if items else ())

    def tuple_of(self, count: int) -> None:
        self.make_tuple([self.pop() for _ in range(count)][::-1])

    def append(self, items: list[Any]) -> None:
        target = self.peek()
        if type(target) is not list:
            raise self.refused(f"APPEND to {_kind(target)}")
        self.contain(target, items)
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.peek()
        if type(target) is not dict:
            raise self.refused(f"SETITEM on {_kind(target)}")
        if len(items) % 2:
            raise self.refused("a key without a value")
        self.contain(target, items)
        for key in items[::2]:
            self.check_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def check_key(self, key: Any) -> None:
        if type(key) not in _KEYS or (type(key) is int and not -(2**63) <= key < 2**64):
            raise self.refused(f"{_kind(key)} as a key")

    # Names and calls

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.refused("a global whose name is no string")
        full = f"{module}.{name}"
        if full in self.constants:
            self.push(self.constants[full])
        elif full in self.calls:
            self.push(Function(full))
        else:
            raise self.refused(f"global {full[:200]!r} is not allowed")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Function:
            raise self.refused(f"a call of {_kind(function)}")
        if type(arguments) is not tuple:
            raise self.refused(f"{function.name} is called with {_kind(arguments)}")
        try:
            result = self.calls[function.name](*arguments)
        except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise self.refused(f"{function.name} cannot be called so: {error}") from error
        self.push(result)
        if result != () and isinstance(result, (dict, list, tuple)):
            self.keep(result, arguments)

    def keep(self, result: Any, arguments: tuple[Any, ...]) -> None:
        """Measures what a call returns: as much as it was given, at least."""
        if isinstance(result, dict):
            for key in result:
                self.check_key(key)
        if id(result) not in self.extents:
            self.contain(result, [arguments])

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise self.refused("a persistent id, and none is expected")
        self.push(self.persistent(self.pop()))

    def build(self) -> None:
        """Drops what an object's attributes would be: a dictionary's, which no state dict needs."""
        self.pop()
        if type(self.peek()) is not dict:
            raise self.refused(f"BUILD on {_kind(self.peek())}")

    # Numbers, strings, memo

    def protocol(self) -> None:
        version = self.number("<B")
        if not 2 <= version <= 5:
            raise self.refused(f"protocol {version}; 2 to 5 are known")

    def frame(self) -> None:
        if self.number("<Q") > len(self.data) - self.position:
            raise self.refused("cut short: a frame is longer than the file")

    def remember(self, index: int) -> None:
        self.memo[index] = self.peek()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.refused(f"nothing is remembered as {index}")
        self.push(self.memo[index])

    def counted(self, kind: str) -> memoryview:
        """Returns as many bytes as a number in front of them says."""
        length = self.number(kind)
        if length < 0:
            raise self.refused("a string of negative length")
        taken = self.take(length)
        self.room -= length
        if self.room < 0:
            raise self.refused(f"more than {_LARGEST:,} bytes of strings")
        return taken

    def string(self, kind: str, encoding: str = "utf-8") -> None:
        self.push(self.text(self.counted(kind), encoding))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _opcode_name(code: int) -> str:
    import pickletools

    return next((op.name for op in pickletools.opcodes if op.code == chr(code)), f"{code:#04x}")


_STEPS: dict[int, Callable[[_Machine], None]] = {
    pickle.PROTO[0]: _Machine.protocol,
    pickle.FRAME[0]: _Machine.frame,
    pickle.MARK[0]: _Machine.mark,
    pickle.NONE[0]: lambda m: m.push(None),
    pickle.NEWTRUE[0]: lambda m: m.push(True),
    pickle.NEWFALSE[0]: lambda m: m.push(False),
    pickle.BININT[0]: lambda m: m.push(m.number("<i")),
    pickle.BININT1[0]: lambda m: m.push(m.number("<B")),
    pickle.BININT2[0]: lambda m: m.push(m.number("<H")),
    pickle.LONG1[0]: lambda m: m.push(
        int.from_bytes(m.take(m.number("<B")), "little", signed=True)
    ),
    pickle.BINFLOAT[0]: lambda m: m.push(m.number(">d")),
    pickle.SHORT_BINSTRING[0]: lambda m: m.string("<B", "latin-1"),
    pickle.BINSTRING[0]: lambda m: m.string("<i", "latin-1"),
    pickle.SHORT_BINUNICODE[0]: lambda m: m.string("<B"),
    pickle.BINUNICODE[0]: lambda m: m.string("<I"),
    pickle.BINUNICODE8[0]: lambda m: m.string("<Q"),
    pickle.SHORT_BINBYTES[0]: lambda m: m.push(bytes(m.counted("<B"))),
    pickle.BINBYTES[0]: lambda m: m.push(bytes(m.counted("<I"))),
    pickle.BINBYTES8[0]: lambda m: m.push(bytes(m.counted("<Q"))),
    pickle.EMPTY_TUPLE[0]: lambda m: m.make_tuple([]),
    pickle.TUPLE1[0]: lambda m: m.tuple_of(1),
    pickle.TUPLE2[0]: lambda m: m.tuple_of(2),
    pickle.TUPLE3[0]: lambda m: m.tuple_of(3),
    pickle.TUPLE[0]: lambda m: m.make_tuple(m.pop_to_mark()),
    pickle.EMPTY_LIST[0]: lambda m: m.push(m.contain([], [])),
    pickle.EMPTY_DICT[0]: lambda m: m.push(m.contain({}, [])),
    pickle.APPEND[0]: lambda m: m.append([m.pop()]),
    pickle.APPENDS[0]: lambda m: m.append(m.pop_to_mark()),
    pickle.SETITEM[0]: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    pickle.SETITEMS[0]: lambda m: m.set_items(m.pop_to_mark()),
    pickle.BINPUT[0]: lambda m: m.remember(m.number("<B")),
    pickle.LONG_BINPUT[0]: lambda m: m.remember(m.number("<I")),
    pickle.MEMOIZE[0]: lambda m: m.remember(len(m.memo)),
    pickle.BINGET[0]: lambda m: m.recall(m.number("<B")),
    pickle.LONG_BINGET[0]: lambda m: m.recall(m.number("<I")),
    pickle.GLOBAL[0]: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL[0]: lambda m: m.name(*[m.pop(), m.pop()][::-1]),
    pickle.REDUCE[0]: _Machine.call,
    pickle.NEWOBJ[0]: _Machine.call,
    pickle.BUILD[0]: _Machine.build,
    pickle.BINPERSID[0]: _Machine.persistent_id,
}
