"""TensorPort's outputs: read as Hugging Face's tensors, bit for bit, or refused for a reason that is told."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert
import gpt_oss_checkpoints as gpt_oss
import hf_checkpoints as hf
import tensorport
from convert import ConvertError
from convert.sources import open_source, serde_pickle
from convert.sources import tensorport as reader
from core import checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "tensorport"
FORMATS = ("numpy-direct", "msgpack", "msgpack-maps", "jax-pickle")


def golden() -> dict[str, np.ndarray]:
    """What tests/golden/tensorport/src/main.rs writes, spelled out again."""
    halves = np.array([*range(0, 3000, 2), *range(65532, 65536)], np.uint16)
    tiny = np.finfo(np.float32).tiny
    integers = [0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 32, (1 << 63) - 1]
    integers += [-1, -32, -33, -129, -32769, -(1 << 63)]
    return {
        "a.float16": halves.view(np.float16).reshape(2, 752),
        "b.float32": np.array([0, -0.0, 1.5, -3.25e38, tiny, np.inf], np.float32).reshape(3, 2),
        "c.uint8": (np.arange(512) % 256).astype(np.uint8).reshape(4, 2, 64),
        "d.int64": np.array(integers, np.int64),
        "e.thousand": np.full(1000, 204, np.uint8),
        "f.scalar": np.array(7, np.float32),
    }


def test_the_fixtures_are_what_the_rust_serializers_write():
    weights = golden()
    assert tensorport.packed(weights) == (GOLDEN / "shard_000.msgpack").read_bytes()
    assert tensorport.pickled(weights) == (GOLDEN / "shard_000.pkl").read_bytes()
    for name, x in weights.items():
        assert tensorport.npy(x) == (GOLDEN / f"{name.replace('.', '_')}.npy").read_bytes()


@pytest.mark.parametrize("part", [2, 3, 7, 1 << 20])
@pytest.mark.parametrize("format", FORMATS)
def test_every_type_is_read_bit_for_bit(
    tmp_path: Path, format: str, part: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        reader, "_PART", max(part, 64) if format == "msgpack" and part < 64 else part
    )
    monkeypatch.setattr(serde_pickle, "_GROUP", part - 1 if part < 64 else 1000)
    finite = golden() | {"a.float16": golden()["a.float16"][:, ::2].copy()}
    finite["a.float16"][~np.isfinite(finite["a.float16"])] = 0
    source = tensorport.write(tmp_path / "s", finite, hf.CONFIG, format)
    found = open_source(source)
    assert found.format == "tensorport"
    assert found.tensors.keys() == finite.keys()
    assert all(hf.same_bits(found.tensors[name].read(), finite[name]) for name in finite)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_gpt2_becomes_the_model_that_it_was(tmp_path: Path, format: str, precision: str):
    weights = tensorport.ported(hf.tensors(), precision)
    source = tensorport.write(tmp_path / "s", hf.prefixed(weights), hf.CONFIG, format, shards=2)
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
    expected = hf.as_parameters(weights)
    assert all(hf.same_bits(folder.tensors[name], expected[name]) for name in expected)
    assert folder.manifest["source"]["format"] == "tensorport"
    files = folder.manifest["source"]["files"]
    assert len(files) == (1 + len(weights) if format == "numpy-direct" else 3)


@pytest.mark.parametrize("format", FORMATS)
def test_a_gpt_oss_keeps_its_packed_experts(tmp_path: Path, format: str):
    weights = gpt_oss.packed()
    made = tensorport.ported(weights, "float32")
    source = tensorport.write(tmp_path / "s", made, gpt_oss.PACKED_CONFIG, format, shards=3)
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out", dtype="bfloat16"))
    original = gpt_oss.write(tmp_path / "hf", weights, config=gpt_oss.PACKED_CONFIG)
    expected = checkpoint.open(convert.convert(original, out=tmp_path / "expected"))
    assert {x.dtype.name for x in folder.tensors.values()} == {"bfloat16", "uint8"}
    assert folder.config == expected.config
    assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.tensors.items())


def test_float16_is_noted_and_its_infinities_are_refused(tmp_path: Path):
    weights = tensorport.ported(hf.tensors("bfloat16"), "float16")
    heard: list[str] = []
    source = tensorport.write(tmp_path / "s", weights, hf.CONFIG, "numpy-direct")
    heard += open_source(source).notes
    assert "40 tensors are float16" in heard[0]
    for format in FORMATS:
        weights["wpe.weight"][3, 4] = -np.inf
        source = tensorport.write(tmp_path / format, weights, hf.CONFIG, format)
        with pytest.raises(ConvertError, match=r"wpe\.weight: holds infinities"):
            convert.convert(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float32_has_no_note(tmp_path: Path):
    source = tensorport.write(tmp_path / "s", hf.tensors(), hf.CONFIG, "msgpack")
    assert open_source(source).notes == ()


def test_a_config_that_was_not_embedded_may_lie_beside(tmp_path: Path):
    source = tensorport.write(tmp_path / "s", hf.tensors(), {}, "msgpack")
    with pytest.raises(ConvertError, match=r"has no config; put Hugging Face's config\.json there"):
        open_source(source)
    (source / "config.json").write_text(json.dumps(hf.CONFIG))
    assert open_source(source).config == hf.CONFIG


@pytest.mark.parametrize("format", ["msgpack", "jax-pickle"])
def test_shards_that_are_not_the_manifests_are_told(tmp_path: Path, format: str):
    suffix = "pkl" if format == "jax-pickle" else "msgpack"

    def damaged(name: str, **changes: object) -> Path:
        source = tensorport.write(tmp_path / name, hf.tensors(), hf.CONFIG, format, shards=3)
        manifest = json.loads((source / "manifest.json").read_text())
        (source / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        return source

    shards = json.loads((damaged("plain") / "manifest.json").read_text())["shards"]
    gone = damaged("gone")
    (gone / f"shard_001.{suffix}").unlink()
    double = damaged("double")
    (double / f"shard_001.{suffix}").write_bytes((double / f"shard_000.{suffix}").read_bytes())
    for source, message in (
        (gone, rf"shard_001\.{suffix} is missing"),
        (double, "is there twice"),
        (damaged("fewer", shards=shards[:2]), "total_shards is 3, 2 are listed"),
        (damaged("number", total_parameters=7), r"counts 7 parameters, its files hold \d+"),
        (damaged("none", shards=None), "no list of shards"),
        (damaged("count", shards=[*shards[:2], {**shards[2], "tensor_count": 9}]), "expected 9"),
        (damaged("path", shards=[{"file": "../x", "tensor_count": 1}]), "no list of shards"),
    ):
        with pytest.raises(ConvertError, match=message):
            open_source(source)


def test_arrays_that_are_not_the_manifests_are_told(tmp_path: Path):
    weights = hf.tensors()
    source = tensorport.write(tmp_path / "s", weights, hf.CONFIG, "numpy-direct")
    manifest = json.loads((source / "manifest.json").read_text())
    first, second, *rest = manifest["tensors"]

    def with_first(**changes: object) -> list[object]:
        return [{**first, **changes}, second, *rest]

    for tensors, message in (
        (with_first(shape=[1]), r"holds float32\[37, 14\], the manifest says <f4\[1\]"),
        (with_first(dtype="<f2"), "the manifest says <f2"),
        (with_first(file="shard_000/none.npy"), "none.npy is missing"),
        (with_first(file="/etc/passwd"), "no list of tensors"),
        (with_first(file="../x.npy"), "no list of tensors"),
        (with_first(file=second["file"]), "appears twice"),
        ([second, *rest], "parameters"),
        ("x", "no list of tensors"),
    ):
        (source / "manifest.json").write_text(json.dumps({**manifest, "tensors": tensors}))
        with pytest.raises(ConvertError, match=message):
            open_source(source)
    (source / "manifest.json").write_text(json.dumps(manifest))
    file = source / first["file"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConvertError, match="cut short: found 2200 bytes, expected 2201"):
        open_source(source)


@pytest.mark.parametrize("evil", ["reduce", "global", "memo", "long", "bytes"])
def test_a_pickle_of_anything_else_is_refused_by_its_opcode(tmp_path: Path, evil: str):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    content = {
        "reduce": (pickle.dumps(Evil(), 3), "GLOBAL"),
        "global": (b"\x80\x03cos\nsystem\n.", "GLOBAL"),
        "memo": (pickle.dumps({"a": {}}, 3), "BINPUT"),
        "long": (b"\x80\x03}(\x8a\x01\x01u.", "LONG1"),
        "bytes": (b"\x80\x03}(C\x01au.", "SHORT_BINBYTES"),
    }[evil]
    source = tensorport.write(tmp_path / "s", {}, hf.CONFIG, "jax-pickle")
    (source / "shard_000.pkl").write_bytes(content[0])
    with pytest.raises(ConvertError, match=f"pickle opcode {content[1]} at byte .* is refused"):
        open_source(source)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("number", "variant"),
    [
        (1.5, "Uint8"),
        ("5", "Uint8"),
        (300, "Uint8"),
        (None, "Int64"),
        (1.5, "Int64"),
        (-1, "Uint8"),
        (1 << 31, "Float32"),
    ],
)
def test_a_list_of_anything_but_its_numbers_is_refused(
    tmp_path: Path, number: object, variant: str
):
    import msgpack

    source = tensorport.write(
        tmp_path / "s", {"x": np.zeros(3, variant.lower())}, hf.CONFIG, "msgpack"
    )
    first = 1.0 if variant == "Float32" else 1
    data = {variant: [first, number, first]}
    content = msgpack.packb({"x": [[3], variant.lower(), data]}, use_single_float=True)
    assert content is not None
    (source / "shard_000.msgpack").write_bytes(content)
    with pytest.raises(ConvertError, match="x cannot be decoded"):
        open_source(source).tensors["x"].read()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("small")
    weights = {
        "wte.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "h.0.ln_1.bias": np.array([1, 300, 65504], np.float16),
        "mlp.experts.x_blocks": np.array([1, 200, 204, 255], np.uint8),
        "n": np.array([-1, 5, 1 << 40]),
    }
    return {
        format: tensorport.write(folder / format, weights, hf.CONFIG, format) for format in FORMATS
    }


@given(
    format=st.sampled_from(FORMATS),
    cut=st.integers(0, 500) | st.none(),
    flips=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 7)), max_size=3),
)
def test_damage_is_refused_or_changes_only_numbers(
    small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, format: str, cut, flips
):
    source = small[format]
    file = next(p for p in sorted(source.rglob("*")) if p.suffix in (".npy", ".msgpack", ".pkl"))
    whole = file.read_bytes()
    data = bytearray(whole[: None if cut is None else min(cut, len(whole) - 1)])
    for at, bit in flips:
        if at < len(data):
            data[at] ^= 1 << bit
    file.write_bytes(data)
    try:
        found = open_source(source)
        for tensor in found.tensors.values():
            array = tensor.read()
            assert (array.dtype.name, array.shape) == (tensor.dtype, tensor.shape)
        assert cut is None
    except ConvertError:
        assert bytes(data) != whole
    finally:
        file.write_bytes(whole)


_MEASURED = """
import sys, threading, time
import convert.sources as sources

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def read():
    for tensor in sources.open_source("source").tensors.values():
        tensor.read()

sources.open_source("small")
peak = before = anonymous()
reader = threading.Thread(target=read)
reader.start()
while reader.is_alive():
    peak = max(peak, anonymous())
    time.sleep(0.002)
print(peak - before)
"""


@pytest.mark.parametrize("format", ["msgpack", "jax-pickle"])
def test_memory_is_that_of_one_tensor(tmp_path: Path, format: str):
    rng = np.random.default_rng(0)
    weights = {f"blocks{i}": rng.integers(0, 256, 3_000_000, np.uint8) for i in range(4)}
    tensorport.write(tmp_path / "source", weights, hf.CONFIG, format)
    tensorport.write(tmp_path / "small", {"x": np.zeros(3, np.uint8)}, hf.CONFIG, format)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # One tensor and the temporaries of decoding a piece of it; as lists of numbers the four would be 100 MB.
    assert int(done.stdout) < 25e6
