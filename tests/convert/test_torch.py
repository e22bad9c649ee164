"""PyTorch's files without torch: what torch.save wrote is read bit for bit, and what is damaged or evil is told."""

import contextlib
import json
import mmap
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert
import hf_checkpoints as hf
import torch_files as tf
from convert import ConvertError
from convert.sources import open_source, torch_storage, torch_zip
from core import checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "pytorch"
SIX = np.arange(6, dtype="<f4")


def put(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    return path


def read(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    found = torch_zip.read_file(put(tmp_path, content))
    arrays = {name: tensor.read() for name, tensor in found.items()}
    for name, tensor in found.items():
        assert (tensor.name, tensor.shape, tensor.dtype) == (
            name,
            arrays[name].shape,
            arrays[name].dtype.name,
        )
    return arrays


def hf_folder(folder: Path, *weights: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf.CONFIG))
    for name, content in hf.FILES.items():
        (folder / name).write_bytes(content)
    for path in weights:
        (folder / "pytorch_model.bin").write_bytes(path.read_bytes())
    return folder


class TestModels:
    """GPT2LMHeadModel's weights, as torch itself saved them."""

    @pytest.mark.parametrize("file", ["zip.bin", "legacy.bin"])
    def test_a_folder_becomes_a_model_folder(self, tmp_path: Path, file: str):
        source = hf_folder(tmp_path / "source", GOLDEN / file)
        out = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
        expected = hf.as_parameters(hf.tensors())
        assert out.tensors.keys() == expected.keys()
        assert all(hf.same_bits(out.tensors[name], expected[name]) for name in expected)
        assert out.config.tie_word_embeddings
        assert out.manifest["source"]["format"] == "torch"
        assert out.manifest["source"]["files"].keys() == {"config.json", "pytorch_model.bin"}
        assert (out.path / "tokenizer.json").read_bytes() == hf.FILES["tokenizer.json"]
        convert.verify(out.path, against=source)

    @pytest.mark.parametrize("file", ["zip.bin", "legacy.bin"])
    def test_a_file_of_any_name_beside_its_config(self, tmp_path: Path, file: str):
        source = hf_folder(tmp_path / "source")
        (source / "weights.pt").write_bytes((GOLDEN / file).read_bytes())
        assert open_source(source / "weights.pt").format == "torch"
        (source / "config.json").unlink()
        with pytest.raises(ConvertError, match=r"no config\.json"):
            open_source(source / "weights.pt")

    def test_safetensors_come_first(self, tmp_path: Path):
        source = hf_folder(tmp_path / "source", GOLDEN / "zip.bin")
        hf.write(source, hf.tensors())
        assert open_source(source).format == "safetensors"
        assert open_source(source, format="torch").format == "torch"

    def test_shards_behind_an_index(self, tmp_path: Path):
        source, weights = hf_folder(tmp_path / "source"), hf.tensors()
        shards = [list(weights)[k::2] for k in range(2)]
        files = [f"pytorch_model-0000{k + 1}-of-00002.bin" for k in range(2)]
        for file, names in zip(files, shards, strict=True):
            (source / file).write_bytes(archived({name: weights[name] for name in names}))
        index = dict(zip(files, shards, strict=True))
        weight_map = {name: file for file, names in index.items() for name in names}
        (source / torch_zip.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        out = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
        expected = hf.as_parameters(weights)
        assert all(hf.same_bits(out.tensors[name], expected[name]) for name in expected)
        assert out.manifest["source"]["files"].keys() == {"config.json", torch_zip.INDEX, *files}
        (source / files[1]).unlink()
        with pytest.raises(ConvertError, match=f"{files[1]} is missing"):
            open_source(source)

    def test_tensors_that_share_a_storage_share_their_bytes(self):
        tensors = torch_zip.read_file(GOLDEN / "zip.bin")
        head, embedding = (tensors[n].read() for n in ("lm_head.weight", "transformer.wte.weight"))
        assert np.shares_memory(head, embedding)

    @pytest.mark.parametrize("file", ["zip.bin", "legacy.bin"])
    def test_nothing_is_copied(self, file: str):
        for tensor in torch_zip.read_file(GOLDEN / file).values():
            base: Any = tensor.read()
            while isinstance(base, np.ndarray):
                base = base.base
            assert isinstance(base, mmap.mmap)


def archived(weights: dict[str, np.ndarray]) -> bytes:
    calls = {
        name: tf.tensor(tf.storage(str(k), x.size), x.shape, contiguous(x.shape))
        for k, (name, x) in enumerate(weights.items())
    }
    return tf.archive(
        tf.state(calls), {str(k): x.tobytes() for k, x in enumerate(weights.values())}
    )


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


class TestViews:
    """A tensor is any view of its storage."""

    def test_offsets_and_strides(self, tmp_path: Path):
        reference = tf.storage("0", 6)
        calls = {
            "turned": tf.tensor(reference, (3, 2), (1, 3)),
            "columns": tf.tensor(reference, (2, 2), (3, 1), offset=1),
            "expanded": tf.tensor(reference, (4, 2), (0, 1), offset=4),
            "scalar": tf.tensor(reference, (), (), offset=5),
            "nothing": tf.tensor(reference, (0, 7), (7, 1), offset=6),
            "v1": tf.tensor(
                reference, (2, 3), (3, 1), rebuild="torch._utils\n_rebuild_tensor", more=b""
            ),
        }
        found = read(tmp_path, tf.archive(tf.state(calls), {"0": SIX.tobytes()}))
        whole = SIX.reshape(2, 3)
        expected = {
            "turned": whole.T,
            "columns": whole[:, 1:],
            "expanded": np.broadcast_to(SIX[4:], (4, 2)),
            "scalar": np.float32(5).reshape(()),
            "nothing": np.zeros((0, 7), np.float32),
            "v1": whole,
        }
        assert found.keys() == expected.keys()
        assert all(hf.same_bits(found[name], expected[name]) for name in expected)

    def test_a_parameter_is_its_tensor(self, tmp_path: Path):
        inner = tf.tensor(tf.storage("0", 6), (6,), (1,))
        hooks = b"ccollections\nOrderedDict\n)R"
        call = b"ctorch._utils\n_rebuild_parameter\n(" + inner + b"\x88" + hooks + b"tR"
        found = read(tmp_path, tf.archive(tf.state({"p": call}), {"0": SIX.tobytes()}))
        assert hf.same_bits(found["p"], SIX)

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            ("FloatStorage", "float32"),
            ("DoubleStorage", "float64"),
            ("HalfStorage", "float16"),
            ("BFloat16Storage", "bfloat16"),
            ("LongStorage", "int64"),
            ("IntStorage", "int32"),
            ("ShortStorage", "int16"),
            ("CharStorage", "int8"),
            ("ByteStorage", "uint8"),
            ("BoolStorage", "bool"),
            ("ComplexFloatStorage", "complex64"),
        ],
    )
    @pytest.mark.parametrize("order", [b"little", b"big", None])
    def test_every_type_in_both_byte_orders(
        self, tmp_path: Path, kind: str, dtype: str, order: bytes | None
    ):
        values = np.arange(6).astype(np.dtype(getattr(ml_dtypes, dtype, dtype))).reshape(2, 3)
        part = values.itemsize // (2 if values.dtype.kind == "c" else 1)
        stored = values.view(f"u{part}")
        stored = stored.byteswap() if order == b"big" else stored
        call = tf.tensor(tf.storage("0", 6, f"torch\n{kind}"), (3, 2), (1, 3))
        content = tf.archive(tf.state({"a": call}), {"0": stored.tobytes()}, order=order)
        assert hf.same_bits(read(tmp_path, content)["a"], values.T)

    def test_untyped_storages_are_what_the_tensor_says(self, tmp_path: Path):
        call = tf.tensor(
            tf.storage("0", 6, "torch.storage\nUntypedStorage"),
            (2,),
            (1,),
            offset=1,
            rebuild="torch._utils\n_rebuild_tensor_v3",
            more=b"\x89ccollections\nOrderedDict\n)Rctorch\nuint16\n",
        )
        content = tf.archive(tf.state({"a": call}), {"0": bytes([9, 9, 1, 2, 3, 4])})
        assert hf.same_bits(read(tmp_path, content)["a"], np.array([0x201, 0x403], np.uint16))

    def test_the_top_folder_has_any_name(self, tmp_path: Path):
        content = archived({"a": SIX}).replace(b"archive/", b"Archive/")
        assert hf.same_bits(read(tmp_path, content)["a"], SIX)

    def test_a_legacy_storage_may_be_a_part_of_another(self, tmp_path: Path):
        part = b"(" + tf.text("v") + tf.number(2) + tf.number(3) + b"t"
        calls = {
            "whole": tf.tensor(tf.storage("0", 6, more=b"N"), (2, 3), (3, 1)),
            "part": tf.tensor(tf.storage("0", 6, more=part), (2,), (1,), offset=1),
        }
        found = read(tmp_path, tf.legacy(tf.state(calls), {"0": (6, SIX.tobytes())}))
        assert hf.same_bits(found["whole"], SIX.reshape(2, 3))
        assert hf.same_bits(found["part"], SIX[3:5])


ONE = {"0": SIX.tobytes()}
WHOLE = tf.storage("0", 6)


def call(**changes: Any) -> bytes:
    return tf.state({"a": tf.tensor(WHOLE, **{"shape": (2, 3), "strides": (3, 1), **changes})})


EVIL: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "code": (tf.archive(tf.proto(b"cos\nsystem\n" + tf.text("x") + b"\x85R"), ONE), "'os.system'"),
    "a subclass": (
        tf.archive(tf.proto(b"ctorch._tensor\n_rebuild_from_type_v2\n)R"), ONE),
        "'torch._tensor._rebuild_from_type_v2' is not allowed",
    ),
    "beyond the storage": (
        tf.archive(call(offset=1), ONE),
        "element 6 of a storage of 6 float32",
    ),
    "strides beyond": (tf.archive(call(strides=(4, 1)), ONE), "element 6 of a storage of 6"),
    "a stride of nothing": (
        tf.archive(call(shape=(99, 3), strides=(0, 1)), ONE),
        "element is repeated until",
    ),
    "a dict of other than names": (
        tf.archive(tf.proto(b"ccollections\nOrderedDict\n](K\x01K\x02\x86K\x03\x86e\x85R"), ONE),
        "expected names as keys",
    ),
    "a dict of no pairs": (
        tf.archive(tf.proto(b"ccollections\nOrderedDict\n](K\x01e\x85R"), ONE),
        "expected pairs",
    ),
    "negative stride": (tf.archive(call(strides=(-3, 1)), ONE), "must be numbers of elements"),
    "negative offset": (tf.archive(call(offset=-1), ONE), "must be numbers of elements"),
    "negative shape": (tf.archive(call(shape=(-2, 3)), ONE), "must be numbers of elements"),
    "too few strides": (tf.archive(call(strides=(1,)), ONE), "2 axes and 1 strides"),
    "65 axes": (tf.archive(call(shape=(1,) * 65, strides=(1,) * 65), ONE), "65 axes"),
    "huge": (
        tf.archive(call(shape=(2**40, 2**40), strides=(0, 0)), ONE),
        "is too large",
    ),
    "no storage": (
        tf.archive(tf.state({"a": tf.tensor(b"N", (2,), (1,))}), ONE),
        "its storage is none",
    ),
    "a conjugate": (
        tf.archive(call(more=b"\x89N}" + tf.text("conj") + b"\x88s"), ONE),
        "conjugate and negative views",
    ),
    "another length": (
        tf.archive(call(), {"0": SIX.tobytes() + b"1234"}),
        "data/0 has 28 bytes, its tensor says 24",
    ),
    "no record": (tf.archive(call(), {"1": SIX.tobytes()}), "no record data/0"),
    "odd id": (
        tf.archive(tf.state({"a": tf.tensor(b"(" + tf.text("module") + b"tQ", (2,), (1,))}), ONE),
        "is no id of a storage",
    ),
    "odd type": (
        tf.archive(tf.state({"a": tf.tensor(tf.storage("0", 6, "torch\nSize"), (2,), (1,))}), ONE),
        "is no id of a storage",
    ),
    "byte order": (tf.archive(call(), ONE, order=b"middle"), "the byte order is b'middle'"),
    "two pickles": (
        tf.archive(call(), {"0": SIX.tobytes(), "x/data.pkl": b""}),
        "found 2 records data.pkl",
    ),
    "compressed": (
        tf.archive(call(), ONE, compression=zipfile.ZIP_DEFLATED),
        "is compressed or encrypted",
    ),
    "a list": (tf.archive(tf.proto(b"]"), ONE), "holds a list; expected a dict"),
    "a number in it": (tf.archive(tf.state({"a": b"K\x01"}), ONE), "a is a int"),
    "a nested dict": (tf.archive(tf.state({"a": b"}"}), ONE), "1 entries are no tensors"),
    "legacy protocol": (tf.legacy(call(), {}, protocol=1000), "found protocol 1000, expected 1001"),
    "legacy keys": (
        tf.legacy(tf.state({"a": tf.tensor(tf.storage("0", 6, more=b"N"), (6,), (1,))}), {}),
        "found 0 storages, expected the 1",
    ),
    "legacy length": (
        tf.legacy(
            tf.state({"a": tf.tensor(tf.storage("0", 6, more=b"N"), (6,), (1,))}),
            {"0": (7, SIX.tobytes())},
        ),
        "storage 0 has 7 elements, its tensors say 6",
    ),
    "legacy cut": (
        tf.legacy(
            tf.state({"a": tf.tensor(tf.storage("0", 6, more=b"N"), (6,), (1,))}),
            {"0": (6, SIX.tobytes()[:-1])},
        ),
        "cut short: found",
    ),
    "legacy rest": (
        tf.legacy(
            tf.state({"a": tf.tensor(tf.storage("0", 6, more=b"N"), (6,), (1,))}),
            {"0": (6, SIX.tobytes() + b"1")},
        ),
        "bytes, expected",
    ),
    "legacy part": (
        tf.legacy(
            tf.state(
                {
                    "a": tf.tensor(
                        tf.storage("0", 6, more=b"(" + tf.text("v") + tf.numbers((4, 3))[1:]),
                        (1,),
                        (1,),
                    )
                }
            ),
            {"0": (6, SIX.tobytes())},
        ),
        "is no part of storage 0",
    ),
    "legacy twice": (
        tf.legacy(
            tf.state(
                {
                    "a": tf.tensor(tf.storage("0", 6, more=b"N"), (1,), (1,)),
                    "b": tf.tensor(tf.storage("0", 5, more=b"N"), (1,), (1,)),
                }
            ),
            {"0": (6, SIX.tobytes())},
        ),
        "storage 0 is described in two ways",
    ),
}


@pytest.mark.parametrize("case", EVIL)
def test_what_is_damaged_or_evil_is_told(tmp_path: Path, case: str):
    content, message = EVIL[case]
    with pytest.raises(ConvertError, match=message) as told:
        torch_zip.read_file(put(tmp_path, content))
    assert "x.bin" in str(told.value)


def test_a_record_twice_is_refused(tmp_path: Path):
    content = tf.archive(call(), ONE | {"1": b""}).replace(b"data/1", b"data/0")
    with pytest.raises(ConvertError, match="a record is there twice"):
        torch_zip.read_file(put(tmp_path, content))


def test_a_record_that_says_it_is_compressed_is_refused(tmp_path: Path):
    content = bytearray(tf.archive(call(), ONE))
    local = content.index(b"archive/data/0") - 30
    directory = content.rindex(b"archive/data/0") - 46
    for place in (local + 8, directory + 10):
        content[place] = zipfile.ZIP_DEFLATED
    with pytest.raises(ConvertError, match="is compressed or encrypted"):
        torch_zip.read_file(put(tmp_path, bytes(content)))


def test_a_record_that_runs_out_of_the_file_is_refused(tmp_path: Path):
    content = bytearray(tf.archive(call(), ONE))
    extra = content.index(b"archive/data/0") - 2
    content[extra : extra + 2] = b"\xff\xff"
    with pytest.raises(ConvertError, match="data/0 is not where the directory says"):
        torch_zip.read_file(put(tmp_path, bytes(content)))


def test_a_truncated_archive_is_told(tmp_path: Path):
    whole = (GOLDEN / "zip.bin").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ConvertError, match="damaged or cut short"):
            torch_zip.read_file(put(tmp_path, whole[:size]))


def test_a_directory_is_not_read_beyond_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_zip, "_DIRECTORY_LIMIT", 1000)
    with pytest.raises(ConvertError, match="its directory is too long"):
        torch_zip.read_file(GOLDEN / "zip.bin")


def test_other_archives_are_not_ours(tmp_path: Path):
    np.savez(tmp_path / "a.npz", a=SIX)
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04" + bytes(50))
    (tmp_path / "c").write_bytes(b"PK")
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "none"):
        assert not torch_zip.recognizes(path)


@pytest.mark.parametrize("file", ["zip.bin", "legacy.bin"])
@given(data=st.data())
def test_no_damage_escapes_as_another_exception(tmp_path_factory, file: str, data: st.DataObject):
    content = bytearray((GOLDEN / file).read_bytes())
    # Most of a file is weights, where damage is no damage: aim at the pickles and at the directory's end as well.
    places = st.integers(0, len(content) - 1) | st.integers(0, 5000)
    places |= st.integers(len(content) - 5000, len(content) - 1)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(places) :]
    path = put(tmp_path_factory.mktemp("fuzz"), bytes(content))
    torch_zip.recognizes(path)
    with contextlib.suppress(ConvertError):
        for tensor in torch_zip.read_file(path).values():
            tensor.read().tobytes()


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_that_torch_saves(tmp_path: Path, zipped: bool):
    torch = pytest.importorskip("torch")
    base = torch.arange(60, dtype=torch.float32)
    tensors = {
        **{name: torch.randn(2, 3).to(getattr(torch, name)) for name in torch_storage.DTYPES},
        "turned": torch.randn(5, 7).t(),
        "part": base.view(6, 10)[2:, 3:7],
        "base": base,
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 4),
        "expanded": torch.randn(3, 1).expand(3, 5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "split": torch.randn(8).split(3)[1],
    }
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = torch_zip.read_file(tmp_path / "x.bin")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        assert found[name].read().shape == tuple(whole.shape)
        assert found[name].dtype == str(whole.dtype).removeprefix("torch.")
        assert found[name].read().tobytes() == whole.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parity
def test_files_by_hand_are_what_torch_reads_too(tmp_path: Path):
    """The archives of `torch_files` are not our own invention: torch gives the same tensors."""
    torch = pytest.importorskip("torch")
    part = b"(" + tf.text("v") + tf.number(2) + tf.number(3) + b"t"
    contents = {
        "zip": archived({"a": SIX.reshape(2, 3), "b": SIX}),
        "big": tf.archive(call(), {"0": SIX.byteswap().tobytes()}, order=b"big"),
        "legacy": tf.legacy(
            tf.state(
                {
                    "whole": tf.tensor(tf.storage("0", 6, more=b"N"), (2, 3), (3, 1)),
                    "part": tf.tensor(tf.storage("0", 6, more=part), (2,), (1,), offset=1),
                }
            ),
            {"0": (6, SIX.tobytes())},
        ),
    }
    for content in contents.values():
        ours = read(tmp_path, content)
        theirs = torch.load(tmp_path / "x.bin", weights_only=True)
        assert ours.keys() == theirs.keys()
        assert all(hf.same_bits(ours[name], theirs[name].numpy()) for name in ours)
