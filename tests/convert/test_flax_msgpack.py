"""flax's MessagePack, in and out: flax's own bytes are read, and the bytes that are written are flax's."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

import convert
import gpt_oss_checkpoints as gpt_oss
import hf_checkpoints as hf
from convert import ConvertError
from convert.sources import flax_msgpack, open_source
from convert.targets import msgpack as target
from core import checkpoint


def as_hf_flax(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Hugging Face's old Flax tree of a torch checkpoint, spelled out from modeling_flax_gpt2.py: kernels [out, in]."""
    flat: dict[str, np.ndarray] = {}
    for name, x in weights.items():
        *path, leaf = name.split(".")
        if path == ["lm_head"]:
            flat["lm_head.kernel"] = x.T
        elif path[-1] in ("wte", "wpe"):
            flat[".".join(("transformer", *path, "embedding"))] = x
        elif leaf == "weight" and path[-1].startswith("ln"):
            flat[".".join(("transformer", *path, "scale"))] = x
        elif leaf == "weight":
            flat[".".join(("transformer", *path, "kernel"))] = x.T
        else:
            flat[".".join(("transformer", *path, leaf))] = x
    return traverse_util.unflatten_dict(flat, sep=".")


def write(folder: Path, tree: Any, config: Mapping[str, Any] = hf.CONFIG) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_hugging_faces_flax_models_are_read_bit_for_bit(tmp_path: Path, dtype: str, tied: bool):
    weights = hf.tensors(dtype)
    if not tied:
        weights["lm_head.weight"] = -weights["wte.weight"]
    source = write(tmp_path / "s", as_hf_flax(weights), {**hf.CONFIG, "tie_word_embeddings": tied})
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
    expected = hf.as_parameters(weights)
    assert folder.tensors.keys() == expected.keys()
    assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.items())
    assert convert.verify(tmp_path / "out", against=source).against == str(source)


def test_the_bare_model_has_no_prefix(tmp_path: Path):
    source = write(tmp_path / "s", as_hf_flax(hf.tensors())["transformer"])
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
    assert all(
        hf.same_bits(folder.tensors[n], x) for n, x in hf.as_parameters(hf.tensors()).items()
    )


def test_a_kernel_that_is_not_turned_is_told(tmp_path: Path):
    tree = as_hf_flax(hf.tensors())
    tree["transformer"]["h"]["1"]["mlp"]["c_fc"]["kernel"] = hf.tensors()["h.1.mlp.c_fc.weight"]
    with pytest.raises(
        ConvertError, match=r"c_fc.kernel has shape \[14, 20\], expected \[20, 14\]"
    ):
        convert.convert(write(tmp_path / "s", tree), out=tmp_path / "out")


def test_every_leaf_is_read_as_flax_reads_it(tmp_path: Path):
    tree = {
        "a": {"b": jnp.arange(12.0).reshape(3, 4), "scalar": np.float32(2.5), "none": None},
        "list": [np.arange(3), {"c": np.ones((2, 1), np.uint8)}],
        "step": 7,
        "z": 1 + 2j,
        "name": "x",
        "5": np.zeros((0, 3), np.float16),
        "bf": jnp.ones(3, jnp.bfloat16),
    }
    source = write(tmp_path / "s", tree)
    found = open_source(source).tensors
    read = flax.serialization.msgpack_restore((source / "flax_model.msgpack").read_bytes())
    expected = {
        "a.b": read["a"]["b"],
        "a.scalar": np.asarray(read["a"]["scalar"]),
        "list.0": read["list"][0],
        "list.1.c": read["list"][1]["c"],
        "5": read["5"],
        "bf": np.asarray(read["bf"]),
    }
    assert found.keys() == expected.keys()
    assert all(hf.same_bits(found[name].read(), x) for name, x in expected.items())


def test_arrays_are_mapped(tmp_path: Path):
    source = write(tmp_path / "s", {"a": np.arange(300.0)})
    array = open_source(source).tensors["a"].read()
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_of_a_training_state_the_parameters_are_read(tmp_path: Path):
    state = {"params": as_hf_flax(hf.tensors()), "opt_state": {"mu": np.ones(3)}, "step": 3}
    source = write(tmp_path / "s", state)
    assert open_source(source).notes == ("1 tensors beside 'params' are left out: opt_state",)
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
    assert folder.manifest["source"]["notes"] == list(open_source(source).notes)


def test_large_arrays_in_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 300)
    source = write(tmp_path / "s", as_hf_flax(hf.tensors()))
    assert flax_msgpack.CHUNKED.encode() in (source / "flax_model.msgpack").read_bytes()
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
    assert all(
        hf.same_bits(folder.tensors[n], x) for n, x in hf.as_parameters(hf.tensors()).items()
    )


@pytest.mark.parametrize("chunk", [300, 1 << 30])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "mxfp4"])
def test_an_export_is_flaxs_bytes_and_comes_back(
    tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(target, "CHUNK_BYTES", chunk)
    if kind == "mxfp4":
        source = gpt_oss.write(tmp_path / "s", gpt_oss.packed(), gpt_oss.PACKED_CONFIG)
    else:
        source = hf.write(tmp_path / "s", hf.tensors(kind))
    model = convert.convert(source, out=tmp_path / "model")
    out = convert.export(model, to="msgpack", out=tmp_path / "out")
    tensors = checkpoint.open(model).tensors
    tree = traverse_util.unflatten_dict(dict(tensors), sep=".")
    data = (out / "model.msgpack").read_bytes()
    assert data == flax.serialization.msgpack_serialize(tree)
    restored = traverse_util.flatten_dict(flax.serialization.msgpack_restore(data), sep=".")
    assert all(hf.same_bits(np.asarray(restored[name]), x) for name, x in tensors.items())
    back = checkpoint.open(convert.convert(out, out=tmp_path / "back"))
    assert all(hf.same_bits(back.tensors[name], x) for name, x in tensors.items())
    convert.export(model, to="msgpack", out=out, overwrite=True)


def pack(value: Any) -> bytes:
    """MessagePack of plain values."""
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def test_the_shortest_arrays_are_flaxs_bytes_too():
    shapes = [(), (0,), (1,), (2,), (1, 1), (1, 1, 1), (255,), (256,), (65536,)]
    tree = {
        f"{dtype}{shape}": np.ones(shape, dtype)
        for dtype in ("uint8", "float16", "float32")
        for shape in shapes
    }
    file = io.BytesIO()
    target.write_tree(tree, file, lambda nbytes: None)
    assert file.getvalue() == flax.serialization.msgpack_serialize(tree)


NDARRAY = pack(([2], "float32", bytes(8)))
REFUSED = {
    "empty": (b"", "empty"),
    "cut short": ({"a": np.ones(9)}, "cut short"),
    "a tail": (pack({"a": 1}) + b"x", "5 bytes, of which the tree takes 4"),
    "another extension": ({"a": msgpack.ExtType(9, b"x")}, "extension 9 is none of flax's"),
    "not 3 parts": ({"a": msgpack.ExtType(1, b"\x92\x01\x02")}, "an array of 2 parts"),
    "wrong size": (
        {"a": msgpack.ExtType(1, NDARRAY.replace(b"\x91\x02", b"\x91\x03"))},
        "bin of 8",
    ),
    "unknown type": ({"a": msgpack.ExtType(1, NDARRAY.replace(b"float32", b"float99"))}, "float99"),
    "an object": ({"a": msgpack.ExtType(1, NDARRAY.replace(b"float32", b"objectO"))}, "objectO"),
    "longer": ({"a": msgpack.ExtType(1, NDARRAY + b"x")}, "not as long as its extension"),
    "nested": (b"\x81\xa1a" * 5000 + b"\x01", "nested deeper than 64"),
    "claims 4 billion": (b"\xdf\xff\xff\xff\xff", "cut short"),
    "never used byte": (b"\x81\xa1a\xc1", "0xc1, which MessagePack never writes"),
    "twice": (b"\x82" + 2 * (b"\xa1a" + pack(msgpack.ExtType(1, NDARRAY))), "'a' twice"),
    "pieces": (
        {"a": {flax_msgpack.CHUNKED: True, "shape": {"0": 2}, "chunks": {"0": 1}}},
        "expected ext",
    ),
    "few pieces": (
        {
            "a": {
                flax_msgpack.CHUNKED: True,
                "shape": {"0": 3},
                "chunks": {"0": msgpack.ExtType(1, NDARRAY)},
            }
        },
        r"do not make \[3\]",
    ),
    "no piece 0": (
        {
            "a": {
                flax_msgpack.CHUNKED: True,
                "shape": {"0": 2},
                "chunks": {"1": msgpack.ExtType(1, NDARRAY)},
            }
        },
        "chunks lacks '0'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_flax_would_not_write_is_refused(tmp_path: Path, case: str):
    content, message = REFUSED[case]
    if not isinstance(content, bytes):
        content = (
            flax.serialization.msgpack_serialize(content) if case == "cut short" else pack(content)
        )
    if case == "cut short":
        content = content[:-1]
    (tmp_path / "config.json").write_text(json.dumps(hf.CONFIG))
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        open_source(tmp_path, format="flax_msgpack")


def test_keys_may_be_numbers(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(hf.CONFIG))
    (tmp_path / "model.msgpack").write_bytes(pack({"h": {5: msgpack.ExtType(1, NDARRAY)}}))
    assert open_source(tmp_path).tensors["h.5"].read().tolist() == [0, 0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": [np.ones(2, np.float16), 1 + 1j, None]}
    return write(tmp_path_factory.mktemp("small") / "s", tree)


@given(
    cut=st.integers(0, 200) | st.none(),
    flips=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 7)), max_size=3),
)
def test_damage_is_refused_or_changes_only_numbers_and_names(small: Path, cut, flips):
    file = small / "flax_model.msgpack"
    whole = file.read_bytes()
    data = bytearray(whole[:cut])
    for at, bit in flips:
        if at < len(data):
            data[at] ^= 1 << bit
    file.write_bytes(data)
    try:
        for tensor in flax_msgpack.open(small).tensors.values():
            array = tensor.read()
            assert (array.dtype.name, array.shape) == (tensor.dtype, tensor.shape)
        assert cut is None or cut >= len(whole)
    except ConvertError:
        assert bytes(data) != whole
    finally:
        file.write_bytes(whole)
