"""The container: what is read is what was written, and what is damaged is told."""

import json
import os
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import hf_checkpoints as hf
from convert import ConvertError, importer
from convert.sources import open_source, safetensors


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "bool", "uint8", "int64", "float64"]
)
def test_every_type_is_read_bit_for_bit(tmp_path: Path, dtype: str):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    stored = {
        "a": np.arange(15).reshape(5, 3).astype(kind),
        "scalar": np.ones((), kind),
        "none": np.zeros((0, 4), kind),
    }
    save_file(stored, tmp_path / "x.safetensors")
    found = safetensors.read_file(tmp_path / "x.safetensors")
    assert found.keys() == stored.keys()
    assert all(hf.same_bits(found[name].read(), stored[name]) for name in stored)


def test_data_may_start_at_an_odd_byte(tmp_path: Path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    header = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    assert len(header) % 2
    (tmp_path / "x.safetensors").write_bytes(raw(header, values.tobytes()))
    array = safetensors.read_file(tmp_path / "x.safetensors")["a"].read()
    assert not array.flags.aligned
    np.testing.assert_array_equal(array, values)


DAMAGED = {
    "empty": (b"", "found 0 bytes"),
    "no header": (b"\x00\x01", "found 2 bytes"),
    "length beyond the file": ((1 << 20).to_bytes(8, "little") + b"{", "expected at least 1048584"),
    "not JSON": (raw(b"{nothing"), "header cannot be read"),
    "nested deeply": (raw(b"[" * 100_000), "header cannot be read: maximum recursion"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "header cannot be read"),
    "a list": (raw([1]), "not a JSON object"),
    "key twice": (raw(b'{"a":1,"a":1}'), "appears twice"),
    "entry is a number": (raw({"a": 1}), "entry of 'a'"),
    "negative shape": (raw({"a": entry("F32", [-1], 0, 4)}, b"1234"), "entry of 'a'"),
    "three offsets": (
        raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"),
        "entry of 'a'",
    ),
    "unknown type": (raw({"a": entry("F5", [1], 0, 4)}, b"1234"), "dtype 'F5'"),
    "offsets of another size": (raw({"a": entry("F32", [2], 0, 4)}, b"1234"), "8 bytes, but"),
    "hole": (
        raw({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"),
        "before it ends at",
    ),
    "overlap": (
        raw({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
        "before it ends at",
    ),
    "too long": (raw({"a": entry("U8", [1], 0, 1)}, b"12"), "expected"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told_what_is_wrong(tmp_path: Path, case: str):
    content, message = DAMAGED[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConvertError, match=message) as told:
        safetensors.read_file(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(told.value)


def test_a_truncated_file_names_both_sizes(tmp_path: Path):
    folder = hf.write(tmp_path / "gpt", hf.tensors())
    file = folder / "model.safetensors"
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ConvertError, match=f"cut short: found {whole - 100} bytes, expected {whole}"
    ):
        open_source(folder)


@given(st.data())
def test_no_damage_escapes_as_another_exception(tmp_path_factory, data):
    content = bytearray(
        raw({"a": entry("F32", [2], 0, 8), "b": entry("U8", [1], 8, 9)}, b"123456789")
    )
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        for tensor in safetensors.read_file(path).values():
            tensor.read()
    except ConvertError:
        pass


def test_shards_and_index_must_agree(tmp_path: Path):
    folder = hf.write(tmp_path / "gpt", hf.tensors(), shards=2)
    index = json.loads((folder / safetensors.INDEX).read_text())
    first = index["weight_map"].pop("wte.weight")
    index["weight_map"]["ghost"] = first
    (folder / safetensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(ConvertError) as told:
        open_source(folder)
    assert told.value.problems == (f"{first} lacks ghost", f"{first} holds wte.weight unlisted")


def test_every_missing_shard_is_named(tmp_path: Path):
    folder = hf.write(tmp_path / "gpt", hf.tensors(), shards=3)
    for k in (1, 3):
        (folder / f"model-{k:05d}-of-00003.safetensors").unlink()
    with pytest.raises(ConvertError) as told:
        open_source(folder)
    assert told.value.problems == (
        "model-00001-of-00003.safetensors is missing",
        "model-00003-of-00003.safetensors is missing",
    )


@pytest.mark.parametrize("name", ["../model.safetensors", "sub/model.safetensors", "", 3])
def test_an_index_reaches_into_no_other_folder(tmp_path: Path, name: object):
    folder = hf.write(tmp_path / "gpt", hf.tensors(), shards=2)
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConvertError, match="name of a file in this folder"):
        open_source(folder)


def test_a_second_copy_in_a_subfolder_is_not_read(tmp_path: Path):
    folder = hf.write(tmp_path / "gpt", hf.tensors())
    hf.write(folder / "original", {"other": np.zeros(3, np.float32)})
    assert open_source(folder).tensors.keys() == hf.tensors().keys()


def test_of_two_formats_in_one_folder_the_first_is_read_and_the_other_named(tmp_path: Path):
    folder = hf.write(tmp_path / "gpt", hf.tensors())
    assert open_source(folder).notes == ()
    with zipfile.ZipFile(folder / "model.npz", "w") as archive:
        for name, array in hf.tensors(seed=1).items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
    source = open_source(folder)
    assert source.format == "safetensors"
    (note,) = source.notes
    assert note.endswith("holds npz too; safetensors is read, --format=npz reads the other")
    other = open_source(folder, format="npz")
    assert (other.format, other.notes) == ("npz", ())


def test_what_lies_there_instead_is_named(tmp_path: Path):
    with pytest.raises(ConvertError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ConvertError, match="an empty folder"):
        open_source(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF")
    with pytest.raises(ConvertError, match=r"no weights that are understood among weights\.h5"):
        open_source(tmp_path)
    with pytest.raises(ConvertError, match="a file of 4 bytes that begins as none of the formats"):
        open_source(tmp_path / "weights.h5")


def test_a_config_must_be_there_and_be_json(tmp_path: Path):
    folder = hf.write(tmp_path / "gpt", hf.tensors())
    for content in ("{", "[" * 100_000):
        (folder / "config.json").write_text(content)
        with pytest.raises(ConvertError, match=r"config\.json: cannot be read as JSON"):
            open_source(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConvertError, match=r"no config\.json"):
        open_source(folder / "model.safetensors")


@pytest.fixture
def impatient() -> Iterator[None]:
    """Fails a test that takes longer than any honest reading of a few kilobytes."""

    def fail(number: int, frame: object) -> None:
        raise TimeoutError("more than 10 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("shape", [[9**4000] * 300, [10**4000] * 20, [2**63], [1] * 65])
def test_a_shape_that_no_array_has_is_refused_at_once(tmp_path: Path, impatient, shape: list[int]):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": entry("F32", shape, 0, 4)}, bytes(4)))
    with pytest.raises(ConvertError, match=r"the header entry of 'a' is .* expected dtype, shape"):
        safetensors.read_file(path)


def test_a_name_or_an_entry_of_any_length_is_told_in_a_line_to_read(tmp_path: Path):
    folder = hf.write(tmp_path / "x", {"h" * 100_000: np.zeros(1, np.float32)})
    with pytest.raises(ConvertError) as told:
        importer.plan_source(folder)
    assert "hhh" in str(told.value)
    assert len(str(told.value)) < 5000


def test_nothing_in_a_name_reaches_the_terminal_but_text(tmp_path: Path):
    folder = hf.write(tmp_path / "x", {"red\x1b[31m\u202e\n": np.zeros(1, np.float32)})
    with pytest.raises(ConvertError, match=r"red\\x1b\[31m\\u202e is not of this model"):
        importer.plan_source(folder)


IMPOSTORS = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n",
    "a web page": b"\n<!DOCTYPE html><html><title>404</title></html>",
    "a web page ": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("what", IMPOSTORS)
def test_what_was_downloaded_instead_of_a_file_is_named(tmp_path: Path, name: str, what: str):
    folder = hf.write(tmp_path / "x", hf.tensors())
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(IMPOSTORS[what])
    with pytest.raises(
        ConvertError, match=f"{name}: {what.strip()}, not the file itself; .* again"
    ):
        open_source(folder)


@pytest.mark.parametrize("format", ["auto", "nanogpt", "llmc", "npz"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, impatient, format: str):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConvertError, match="pipe: neither a file nor a folder"):
        open_source(tmp_path / "pipe", format=format)


@pytest.mark.parametrize("name", ["config.json", "ckpt.pt", "manifest.json"])
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path, impatient, name: str):
    folder = hf.write(tmp_path / "x", hf.tensors())
    (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ConvertError, match="no weights that are understood"):
        open_source(folder)


def test_a_folder_without_safetensors_is_told_when_they_are_asked_for(tmp_path: Path):
    folder = hf.write(tmp_path / "x", {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"no safetensors; expected model\.safetensors"):
        open_source(folder, format="safetensors")
