"""The restricted unpickler: data comes through as it was, and a pickle has no other power."""

import collections
import contextlib
import mmap
import pickle
import pickletools
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import ConvertError, unpickle

CALLS = {"collections.OrderedDict": dict, "torch.Size": lambda shape: shape}


def load(data: bytes, **allowed: Any) -> Any:
    return unpickle.load(data, where="evil.pkl", **{"calls": CALLS, **allowed})


def proto(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


TEXTS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.tuples(inner)
            | st.tuples(inner, inner, inner, inner)
            | st.dictionaries(st.text(max_size=5) | st.integers(0, 99), inner, max_size=5)
        ),
        max_leaves=20,
    )


TREES = trees(TEXTS | st.binary(max_size=8))


@given(TREES, st.sampled_from([3, 4, 5]))
def test_what_pickle_writes_comes_back(tree: Any, protocol: int):
    assert load(pickle.dumps(tree, protocol)) == tree


@given(trees(TEXTS))  # protocol 2 writes bytes as a call
def test_protocol_2_comes_back(tree: Any):
    assert load(pickle.dumps(tree, 2)) == tree


def test_ordered_dictionaries_and_their_attributes():
    tree = collections.OrderedDict(b=1, a=[2, 3])
    tree._metadata = {"": {"version": 1}}  # pyright: ignore[reportAttributeAccessIssue]
    for protocol in (2, 3, 4, 5):
        assert list(load(pickle.dumps(tree, protocol)).items()) == [("b", 1), ("a", [2, 3])]


def test_long_lists_and_dictionaries_come_in_batches():
    tree = {"list": list(range(3000)), "dict": {str(i): i for i in range(3000)}}
    assert load(pickle.dumps(tree, 4)) == tree


def test_strings_of_python_2():
    assert load(proto(b"U\x03abcT\x02\x00\x00\x00\xe9!\x86")) == ("abc", "é!")


def test_a_pickle_in_the_middle_of_a_file_ends_where_it_ends(tmp_path: Path):
    first, second = pickle.dumps([1, 2], 4), pickle.dumps("x" * 300, 2)
    path = tmp_path / "two"
    path.write_bytes(first + second + b"rest")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        value, end = unpickle.load_at(mapped, 0, where=path)
        assert (value, end) == ([1, 2], len(first))
        assert unpickle.load_at(mapped, end, where=path) == ("x" * 300, len(first + second))


def test_names_stand_for_what_the_caller_says():
    data = proto(b"ctorch\nfloat32\nccollections\nOrderedDict\n\x86")
    assert load(data, constants={"torch.float32": 4}) == (
        4,
        unpickle.Function("collections.OrderedDict"),
    )


class Runs:
    """Pickles to a call of anything."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


EVIL: dict[str, tuple[bytes, str]] = {
    "os.system": (proto(b"cos\nsystem\n" + text("true") + b"\x85R"), "global 'os.system'"),
    "stack global": (b"\x80\x04" + b"\x8c\x02os\x8c\x06system\x93.", "global 'os.system'"),
    "dotted name": (
        b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.__init__.a.b\x93.",
        r"global 'collections.OrderedDict.__init__",
    ),
    "builtins": (pickle.dumps(Runs(eval, "1+1"), 4), "global 'builtins.eval'"),
    "getattr": (pickle.dumps(Runs(getattr, 1, "real"), 2), "global '__builtin__.getattr'"),
    "numpy": (proto(b"cnumpy.core.multiarray\n_reconstruct\n"), "_reconstruct' is not allowed"),
    "INST": (proto(b"(ios\nsystem\n"), "opcode INST"),
    "OBJ": (proto(b"(ccollections\nOrderedDict\no"), "opcode OBJ"),
    "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
    "EXT1": (proto(b"\x82\x01"), "opcode EXT1"),
    "EXT2": (proto(b"\x83\x01\x00"), "opcode EXT2"),
    "EXT4": (proto(b"\x84\x01\x00\x00\x00"), "opcode EXT4"),
    "PERSID": (proto(b"Pabc\n"), "opcode PERSID"),
    "STRING": (proto(b"S'\\q'\n"), "opcode STRING"),
    "UNICODE": (proto(b"Vabc\n"), "opcode UNICODE"),
    "LONG": (proto(b"L" + b"9" * 10_000 + b"L\n"), "opcode LONG"),
    "LONG4": (proto(b"\x8b\x01\x00\x00\x00\x01"), "opcode LONG4"),
    "set": (b"\x80\x04\x8f.", "opcode EMPTY_SET"),
    "frozenset": (b"\x80\x04(\x91.", "opcode FROZENSET"),
    "bytearray": (pickle.dumps(bytearray(b"ab"), 5), "opcode BYTEARRAY8"),
    "buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "no opcode": (proto(b"\xff"), "opcode 0xff"),
    "persistent id": (proto(b"K\x01Q"), "a persistent id, and none"),
    "call of a string": (proto(text("abc") + b")R"), "a call of a str"),
    "call of a dict": (proto(b"})R"), "a call of a dict"),
    "call of a constant": (proto(b"ctorch\nfloat32\n)R"), "a call of an int"),
    "call with a list": (proto(b"ccollections\nOrderedDict\n]R"), "called with a list"),
    "call with too much": (
        proto(b"ccollections\nOrderedDict\nK\x01K\x02\x86R"),
        "cannot be called so",
    ),
    "NEWOBJ of a string": (proto(text("a") + b")\x81"), "a call of a str"),
    "BUILD on a function": (
        proto(b"ccollections\nOrderedDict\n}" + text("__doc__") + text("x") + b"sb"),
        "BUILD on a Function",
    ),
    "BUILD on a list": (proto(b"]}b"), "BUILD on a list"),
    "APPEND to a dict": (proto(b"}K\x01a"), "APPEND to a dict"),
    "APPEND to a function": (proto(b"ccollections\nOrderedDict\nK\x01a"), "APPEND to a Function"),
    "SETITEM on a list": (proto(b"]K\x00K\x01s"), "SETITEM on a list"),
    "odd SETITEMS": (proto(b"}(K\x01u"), "a key without a value"),
    "tuple as a key": (proto(b"})K\x01s"), "a tuple as a key"),
    "huge key": (proto(b"}\x8a\x09" + b"\x01" * 9 + b"Ns"), "an int as a key"),
    "key by a call": (
        proto(b"ccollections\nOrderedDict\n](K\x01\x85K\x02ta\x85R"),
        "as a key",
    ),
    "itself": (proto(b"]q\x00h\x00a"), "a container holds itself"),
    "itself through another": (proto(b"]q\x00}q\x01K\x01h\x00sah\x01"), "grows after|holds itself"),
    "grows later": (proto(b"]q\x00\x85h\x00K\x01a"), "grows after it was put into another"),
    "deep": (proto(b")" + b"\x85" * 100_000), "nested deeper than 50"),
    "deep lists": (proto(b"]" * 1000 + b"a" * 999), "nested deeper than 50"),
    "doubles and doubles": (
        proto(b"]" + b"".join(b"q\x00h\x00\x86" for _ in range(40))),
        "repeated until they fill the memory",
    ),
    "repeated string": (
        proto(b"]" + text("x" * 100_000) + b"q\x00a" + b"h\x00a" * 1000),
        "repeated until they fill the memory",
    ),
    "10 GB string": (
        b"\x80\x04\x8d" + struct.pack("<Q", 10**10) + b"abc",
        "10,000,000,000 bytes are wanted",
    ),
    "10 GB bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 10**10), "10,000,000,000 bytes"),
    "2**64 bytes": (b"\x80\x04\x8e" + b"\xff" * 8, "bytes are wanted"),
    "negative string": (proto(b"T\xff\xff\xff\xff"), "negative length"),
    "long frame": (b"\x80\x04\x95" + b"\xff" * 8, "a frame is longer"),
    "memo not there": (proto(b"h\x07"), "nothing is remembered as 7"),
    "memo of nothing": (proto(b"q\x00"), "the stack is empty"),
    "nothing to pop": (b"\x80\x02.", "the stack is empty"),
    "pops below a mark": (proto(b"K\x01(\x85"), "the stack is empty"),
    "no mark": (proto(b"K\x01t"), "no mark"),
    "not UTF-8": (proto(b"X\x01\x00\x00\x00\xff"), "not utf-8"),
    "surrogates": (proto(b"X\x03\x00\x00\x00\xed\xa0\x80"), "not utf-8"),
    "name without an end": (proto(b"c" + b"a" * 5000), "a name without an end"),
    "name of a number": (b"\x80\x04K\x01\x8c\x01a\x93.", "whose name is no string"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "opcode DICT"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "nothing": (b"", "cut short"),
    "no end": (b"\x80\x02N", "cut short"),
}


@pytest.mark.parametrize("case", EVIL)
def test_evil_is_refused_by_name(case: str):
    data, message = EVIL[case]
    with pytest.raises(ConvertError, match=message) as told:
        load(data, constants={"torch.float32": 4})
    assert "evil.pkl" in str(told.value)
    assert len(str(told.value)) < 500


def test_every_opcode_is_either_understood_or_refused_by_its_name():
    understood = {bytes([code]).decode("latin-1") for code in unpickle._STEPS} | {
        pickle.STOP.decode()
    }
    powers = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "DUP"}
    for opcode in pickletools.opcodes:
        if opcode.code not in understood:
            with pytest.raises(ConvertError, match=f"opcode {opcode.name} is not allowed"):
                load(b"\x80\x02" + opcode.code.encode("latin-1"))
    assert not powers & {op.name for op in pickletools.opcodes if op.code in understood}


def test_a_memo_index_costs_nothing():
    assert load(proto(b"K\x01r\xff\xff\xff\xffj\xff\xff\xff\xff\x86")) == (1, 1)


def test_too_many_opcodes_are_refused():
    with pytest.raises(ConvertError, match="more than 100 opcodes"):
        load(proto(b"(" + b"N" * 100 + b"t"), max_opcodes=100)


def test_strings_are_held_only_up_to_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpickle, "_LARGEST", 1000)
    with pytest.raises(ConvertError, match="more than 1,000 bytes of strings"):
        load(proto(b"(" + text("x" * 400) * 3 + b"t"))


def test_what_a_persistent_id_stands_for_is_the_callers(tmp_path: Path):
    data = proto(b"(" + text("storage") + b"K\x07tQ")
    assert load(data, persistent=lambda pid: pid) == ("storage", 7)


@given(TREES, st.data())
def test_no_damage_escapes_as_another_exception(tree: Any, data: st.DataObject):
    content = bytearray(pickle.dumps(tree, data.draw(st.sampled_from([2, 3, 4, 5]))))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ConvertError):
        content = bytes(content[: data.draw(st.integers(0, len(content)))])
        load(content, persistent=repr)


@given(
    st.lists(st.sampled_from([bytes([c]) for c in unpickle._STEPS] + [b"\x00", b"\x01", b"a\n"]))
)
def test_no_program_escapes_as_another_exception(parts: list[bytes]):
    with contextlib.suppress(ConvertError):
        load(b"".join(parts), persistent=repr)


_CAPPED = """
import resource, sys
from convert import ConvertError, unpickle
data = bytes.fromhex("80 02") + {body}
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
try:
    unpickle.load(data, where="evil.pkl", max_opcodes=1 << 18)
except ConvertError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "body",
    [
        "b'r' + b'\\xff' * 4 + b'.'",
        "b']' * 10**6",
        "b'(' * 10**6",
        "b'Nq\\x00' + b'h\\x00' * 10**6",
    ],
    ids=["memo", "lists", "marks", "repeats"],
)
def test_no_pickle_fills_the_memory(body: str):
    done = subprocess.run(
        [sys.executable, "-c", _CAPPED.format(body=body)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "refused to unpickle" in done.stdout
    assert int(done.stderr) < 100_000_000  # 200 bytes an opcode, and some
