"""Our own folder as a source: cast, unpacked and compared from there, with the memory of where it came from."""

import json
from pathlib import Path

import ml_dtypes
import pytest

import convert
import gpt_oss_checkpoints as gpt_oss
import hf_checkpoints as hf
from convert import ConvertError
from convert.sources import open_source
from core import checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return convert.convert(hf.write(tmp_path / "source", hf.tensors()), out=tmp_path / "model")


def test_a_model_folder_is_cast_again(tmp_path: Path, model: Path):
    folder = checkpoint.open(convert.convert(model, out=tmp_path / "out", dtype="bfloat16"))
    expected = {n: x.astype(ml_dtypes.bfloat16) for n, x in hf.as_parameters(hf.tensors()).items()}
    assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.items())
    assert hf.digests(tmp_path / "out").keys() == hf.digests(model).keys()
    assert "equal to" in str(convert.verify(tmp_path / "out", against=model))


def test_where_the_weights_came_from_goes_on(tmp_path: Path, model: Path):
    first = checkpoint.open(model).manifest["source"]
    second = checkpoint.open(convert.convert(model, out=tmp_path / "second")).manifest["source"]
    assert second["format"] == "model_folder"
    assert second["origin"] == first
    assert second["files"]["manifest.json"]["sha256"] == hf.digests(model)["manifest.json"]
    third = convert.convert(tmp_path / "second", out=tmp_path / "third")
    assert checkpoint.open(third).manifest["source"]["origin"] == second


def test_experts_are_unpacked_from_a_model_folder(tmp_path: Path):
    source = gpt_oss.write(tmp_path / "s", gpt_oss.packed(), gpt_oss.PACKED_CONFIG)
    packed = convert.convert(source, out=tmp_path / "packed")
    at_once = convert.convert(source, out=tmp_path / "at_once", experts="bfloat16")
    later = convert.convert(packed, out=tmp_path / "later", experts="bfloat16")
    a, b = checkpoint.open(at_once), checkpoint.open(later)
    assert a.config == b.config
    assert all(hf.same_bits(a.tensors[n], x) for n, x in b.tensors.items())
    assert not any(n.endswith(".blocks") for n in b.tensors)
    convert.verify(later, against=packed)


def test_a_file_of_it_stands_for_the_folder(model: Path):
    source = open_source(model / "model-00001-of-00001.safetensors")
    assert (source.format, source.path) == ("model_folder", model)


def test_a_checkpoint_put_into_a_model_folder_is_read_itself(model: Path):
    golden = Path(__file__).parents[1] / "golden" / "pytorch" / "zip.bin"
    (model / "pytorch_model.bin").write_bytes(golden.read_bytes())
    (model / "config.json").write_text(json.dumps({**hf.CONFIG, "family": "gpt2"}))
    assert open_source(model / "pytorch_model.bin").format == "torch"


def test_a_difference_is_found(tmp_path: Path, model: Path):
    weights = hf.tensors()
    weights["h.1.ln_2.bias"][5] += 1
    other = convert.convert(hf.write(tmp_path / "other", weights), out=tmp_path / "changed")
    with pytest.raises(ConvertError, match=r"blocks\.1\.ln_2\.bias"):
        convert.verify(other, against=model)


@pytest.mark.parametrize("damage", ["truncated", "no shard", "no tokenizer", "config"])
def test_a_damaged_folder_is_refused(tmp_path: Path, model: Path, damage: str):
    shard = model / "model-00001-of-00001.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    if damage == "no shard":
        shard.unlink()
    if damage == "no tokenizer":
        (model / "tokenizer.json").unlink()
    if damage == "config":
        (model / "config.json").write_text('{"family": "gpt2", "n_layer": "x"}')
    message = {
        "truncated": "expected .* bytes, found",
        "no shard": "is missing; convert or copy the model again",
        "no tokenizer": r"tokenizer\.json is missing",
        "config": "n_layer='x' is not int",
    }[damage]
    with pytest.raises(ConvertError, match=message):
        convert.convert(model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_never_its_own_destination(model: Path):
    before = hf.digests(model)
    with pytest.raises(ConvertError, match=r"the source .* lies there"):
        convert.convert(model, out=model, dtype="bfloat16", overwrite=True)
    assert hf.digests(model) == before


def test_the_command_line_casts_a_model_folder(tmp_path: Path, model: Path):
    done = hf.run("convert", "--source=model", "--out=out", "--dtype=float16", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert checkpoint.open(tmp_path / "out").tensors["wte.embedding"].dtype == "float16"
