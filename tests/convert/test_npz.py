"""npz, in and out: numpy's own files are read, and what is written is read by numpy."""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert
import gpt_oss_checkpoints as gpt_oss
import hf_checkpoints as hf
from convert import ConvertError
from convert.sources import npz, open_source
from core import checkpoint
from core.config import GPT2Config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npz")
    return convert.convert(hf.write(folder / "source", hf.tensors()), out=folder / "model")


def save(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write: Any = np.savez_compressed if compressed else np.savez
    write(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_numpys_files_are_read_bit_for_bit(tmp_path: Path, compressed: bool):
    arrays = {
        name: np.arange(35).reshape(5, 7).astype(name)
        for name in ("float32", "float16", "float64", "uint8", "int64", "bool")
    }
    arrays |= {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32)}
    arrays["fortran"] = np.asfortranarray(arrays["float32"])
    file = save(tmp_path / "x.npz", arrays, compressed=compressed)
    (tmp_path / "config.json").write_text("{}")
    found = open_source(file)
    assert found.format == "npz"
    assert found.tensors.keys() == arrays.keys()
    assert all(hf.same_bits(found.tensors[name].read(), arrays[name]) for name in arrays)


def test_what_is_stored_is_mapped(tmp_path: Path):
    file = save(tmp_path / "x.npz", {"a": np.arange(6, dtype=np.float32)})
    (tmp_path / "config.json").write_text("{}")
    array = open_source(file).tensors["a"].read()
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize("sep", [".", "/"])
@pytest.mark.parametrize("prefix", ["", "params"])
def test_our_names_with_a_config_of_ours_or_of_hugging_face(tmp_path: Path, sep: str, prefix: str):
    expected = hf.as_parameters(hf.tensors())
    top = prefix + sep if prefix else ""
    arrays = {top + name.replace(".", sep): x for name, x in expected.items()}
    save(tmp_path / "s" / "weights.npz", arrays)
    for name, config in {"ours": GPT2Config.from_hf(hf.CONFIG).to_dict(), "hf": hf.CONFIG}.items():
        (tmp_path / "s" / "config.json").write_text(json.dumps(config))
        folder = checkpoint.open(convert.convert(tmp_path / "s", out=tmp_path / name))
        assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.items())


def test_hugging_faces_names(tmp_path: Path):
    save(tmp_path / "s" / "model.npz", hf.tensors() | hf.masks())
    (tmp_path / "s" / "config.json").write_text(json.dumps(hf.CONFIG))
    folder = checkpoint.open(convert.convert(tmp_path / "s", out=tmp_path / "out"))
    expected = hf.as_parameters(hf.tensors())
    assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_stored_repeats_the_embedding_or_is_its_own(tmp_path: Path, tied: bool):
    expected = hf.as_parameters(hf.tensors())
    head = expected["wte.embedding"] * (1 if tied else 2)
    save(tmp_path / "s" / "model.npz", {**expected, "lm_head.kernel": head})
    (tmp_path / "s" / "config.json").write_text(json.dumps(hf.CONFIG))
    folder = checkpoint.open(convert.convert(tmp_path / "s", out=tmp_path / "out"))
    assert ("lm_head.kernel" in folder.tensors) is not tied


def test_the_config_may_be_inside(tmp_path: Path):
    file = save(tmp_path / "x.npz", hf.as_parameters(hf.tensors()))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("config.json", json.dumps(GPT2Config.from_hf(hf.CONFIG).to_dict()))
    assert checkpoint.open(convert.convert(file, out=tmp_path / "out")).config.family == "gpt2"


def test_bfloat16_as_numpy_saves_it_is_read_and_noted(tmp_path: Path):
    weights = hf.as_parameters(hf.tensors("bfloat16"))
    # np.savez gives ml_dtypes' bfloat16 the type of two raw bytes.
    save(tmp_path / "s" / "model.npz", {n: x.view("V2") for n, x in weights.items()})
    (tmp_path / "s" / "config.json").write_text(json.dumps(hf.CONFIG))
    assert open_source(tmp_path / "s").notes == (
        "40 arrays of two raw bytes a number are read as bfloat16",
    )
    folder = checkpoint.open(convert.convert(tmp_path / "s", out=tmp_path / "out"))
    assert all(hf.same_bits(folder.tensors[n], x) for n, x in weights.items())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_export_is_numpys_and_comes_back_bit_for_bit(tmp_path: Path, dtype: str):
    source = hf.write(tmp_path / "source", hf.tensors(dtype))
    model = convert.convert(source, out=tmp_path / "model")
    heard: list[str] = []
    out = convert.export(model, to="npz", out=tmp_path / "out", on_note=heard.append)
    expected = checkpoint.open(model).tensors
    with np.load(out / "model.npz") as found:
        assert list(found) == list(expected)
        for name, x in expected.items():
            wide = x.astype(np.float32) if dtype == "bfloat16" else x
            assert hf.same_bits(found[name], wide)
    back = checkpoint.open(convert.convert(out, out=tmp_path / "back", dtype=dtype))
    assert all(hf.same_bits(back.tensors[name], x) for name, x in expected.items())
    assert back.config == checkpoint.open(model).config
    assert [note[-5:] for note in heard] == ([": all"] if dtype == "bfloat16" else [])
    assert {p.name for p in out.iterdir()} == {"model.npz", "config.json", *hf.FILES}


def test_only_what_npz_cannot_hold_is_wider(tmp_path: Path):
    source = gpt_oss.write(tmp_path / "s", gpt_oss.packed(), gpt_oss.PACKED_CONFIG)
    model = convert.convert(source, out=tmp_path / "model")
    heard: list[str] = []
    out = convert.export(model, to="npz", out=tmp_path / "out", on_note=heard.append)
    assert "48 tensors are float32" in heard[0]
    assert "blocks.*.moe.gate_up.bias" in heard[0]
    assert ".blocks," not in heard[0]
    back = checkpoint.open(convert.convert(out, out=tmp_path / "back", dtype="bfloat16"))
    expected = checkpoint.open(model).tensors
    assert all(hf.same_bits(back.tensors[name], x) for name, x in expected.items())


def test_an_export_is_the_same_bytes_and_its_arrays_begin_on_64_bytes(tmp_path: Path, model: Path):
    a, b = (convert.export(model, to="npz", out=tmp_path / n) / "model.npz" for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    for tensor in open_source(a).tensors.values():
        assert tensor.read().__array_interface__["data"][0] % 64 == 0
    with zipfile.ZipFile(a) as archive:
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_an_export_replaces_only_an_export(tmp_path: Path, model: Path):
    out = convert.export(model, to="npz", out=tmp_path / "out")
    convert.export(model, to="npz", out=out, overwrite=True)
    save(tmp_path / "mine" / "model.npz", {"a": np.zeros(3)})
    for other in (tmp_path / "mine", model):
        with pytest.raises(ConvertError, match=r"is not an exported model|lies there"):
            convert.export(model, to="npz", out=other, overwrite=True)


def test_objects_are_refused_and_never_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    file = tmp_path / "x.npz"
    save(file, {"ok": np.zeros(3), "evil": np.array([Evil()], object)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConvertError, match="evil: holds Python objects, which are pickled"):
        open_source(file)
    assert not (tmp_path / "pwned").exists()


def entry(descr: str = "<f4", shape: str = "(3,)", data: bytes = bytes(12)) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


REFUSED = {
    "big endian": ({"a.npy": entry(">f4")}, r"a: has type >f4; known are"),
    "structured": ({"a.npy": entry("<f4, <f4")}, "known are"),
    "too long": ({"a.npy": entry(data=bytes(13))}, r"do not hold float32\[3\]"),
    "too short": ({"a.npy": entry(data=bytes(11))}, r"do not hold float32\[3\]"),
    "huge": ({"a.npy": entry(shape="(99999999999999, 99999)")}, "do not hold"),
    "no header": ({"a.npy": b"\x93NUMPY\x01\x00\xff\xff"}, "header .* cannot be read"),
    "an expression": ({"a.npy": entry(shape="(1+2,)")}, "header .* cannot be read"),
    "not npy": ({"a.npy": b"hello"}, r"expected a \.npy array"),
    "another file": ({"a.npy": entry(), "b.txt": b""}, "holds 'b.txt', which is no .npy array"),
    "no config": ({"a.npy": entry()}, r"no config\.json beside it"),
    "bad config": (
        {"a.npy": entry(), "config.json": b"[" * 9999},
        r"its config\.json cannot be read",
    ),
    "list config": (
        {"a.npy": entry(), "config.json": b"[]"},
        r"its config\.json is no JSON object",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_numpy_would_not_write_is_refused(tmp_path: Path, case: str):
    entries, message = REFUSED[case]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ConvertError, match=message):
        open_source(tmp_path / "x.npz")


def test_twice_the_same_name_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", entry())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", entry())
    with pytest.raises(ConvertError, match="holds 'a' twice"):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_of_the_data_is_told(tmp_path: Path, compressed: bool):
    values = np.random.default_rng(0).integers(0, 256, 60_000, np.uint8)
    file = save(tmp_path / "x.npz", {"a": values}, compressed=compressed)
    (tmp_path / "config.json").write_text("{}")
    data = bytearray(file.read_bytes())
    data[50_000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConvertError, match="the data are damaged"):
        open_source(file).tensors["a"].read()


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path: Path):
    content = io.BytesIO()
    np.save(content, np.zeros(40_000_000, np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", content.getvalue()[:1_000_000])
    data = bytearray((tmp_path / "x.npz").read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = len(content.getvalue()).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConvertError, match="cannot hold 40000128, however compressed"):
        open_source(tmp_path / "x.npz")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(hf.CONFIG))
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)}
    return {
        False: save(folder / "stored.npz", arrays),
        True: save(folder / "deflated.npz", arrays, compressed=True),
    }


@given(
    compressed=st.booleans(),
    cut=st.integers(0, 600) | st.none(),
    flips=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 7)), max_size=3),
)
def test_damage_is_refused(small: dict[bool, Path], compressed: bool, cut, flips):
    file = small[compressed]
    whole = file.read_bytes()
    data = bytearray(whole[:cut])
    for at, bit in flips:
        if at < len(data):
            data[at] ^= 1 << bit
    file.write_bytes(data)
    try:
        for tensor in open_source(file, format="npz").tensors.values():
            array = tensor.read()
            assert (array.dtype.name, array.shape) == (tensor.dtype, tensor.shape)
    except ConvertError:
        assert bytes(data) != whole
    finally:
        file.write_bytes(whole)


def test_a_torch_zip_or_a_pickle_is_no_npz(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    (tmp_path / "x.npz").write_bytes(pickle.dumps({}))
    assert not npz.recognizes(tmp_path / "x.pt")
    assert not npz.recognizes(tmp_path / "x.npz")
    assert npz.recognizes(
        save(tmp_path / "y.npz", {"a": np.zeros(1, ml_dtypes.bfloat16).view("V2")})
    )
