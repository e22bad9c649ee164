"""From a model folder to Hugging Face's format and back: the same bits both ways, and transformers agrees."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import convert
import hf_checkpoints as hf
from convert import ConvertError
from convert.targets import hf as hf_target
from core import axes, checkpoint
from core.config import Config, GPT2Config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return convert.convert(hf.write(folder / "source", hf.tensors()), out=folder / "model")


def random_model(path: Path, config: Config, dtype: str = "float32") -> Path:
    rng = np.random.default_rng(3)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    specs = [
        checkpoint.TensorSpec(name, axes.shape(word, config.axes), dtype)
        for name, word in config.tensors().items()
    ]
    checkpoint.write(
        path,
        config=config,
        specs=specs,
        read=lambda spec: rng.standard_normal(spec.shape, np.float32).astype(kind),
    )
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("untied", [False, True])
def test_the_file_of_transformers_comes_back_byte_for_byte(
    tmp_path: Path, dtype: str, untied: bool
):
    weights = hf.tensors(dtype)
    if untied:
        weights["lm_head.weight"] = weights["wte.weight"] + weights["wte.weight"]
    config = {**hf.CONFIG, "tie_word_embeddings": not untied}
    source = hf.write(tmp_path / "source", hf.prefixed(weights), config=config)
    model = convert.convert(source, out=tmp_path / "model")
    exported = convert.export(model, out=tmp_path / "exported")
    before, after = hf.digests(source), hf.digests(exported)
    assert after.keys() == before.keys()
    assert {n for n in after if after[n] != before[n]} == {"config.json"}
    assert GPT2Config.from_hf(json.loads((exported / "config.json").read_text())) == (
        GPT2Config.from_hf(config)
    )


def test_a_model_folder_comes_back_byte_for_byte(tmp_path: Path):
    config = GPT2Config(vocab_size=37, n_positions=11, n_embd=14, n_layer=3, n_head=2)
    model = random_model(tmp_path / "model", config, "bfloat16")
    again = convert.convert(convert.export(model, out=tmp_path / "hf"), out=tmp_path / "again")
    before, after = hf.digests(model), hf.digests(again)
    assert {n for n in before if before[n] != after[n]} == {"manifest.json"}


def test_the_head_is_left_out_when_tied_and_kept_when_not(tmp_path: Path, model: Path):
    tied = load_file(convert.export(model, out=tmp_path / "tied") / "model.safetensors")
    assert tied.keys() == hf.prefixed(hf.tensors()).keys()
    config = dataclasses.replace(checkpoint.open(model).config, tie_word_embeddings=False)
    untied = convert.export(random_model(tmp_path / "m", config), out=tmp_path / "untied")
    assert "lm_head.weight" in load_file(untied / "model.safetensors")
    assert json.loads((untied / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_model_without_biases_gets_zeros(tmp_path: Path, model: Path):
    config = dataclasses.replace(checkpoint.open(model).config, use_bias=False)
    source = random_model(tmp_path / "m", config)
    weights = load_file(convert.export(source, out=tmp_path / "out") / "model.safetensors")
    biases = [name for name in weights if name.endswith(".bias")]
    assert len(biases) == 6 * hf.L + 1
    assert not any(weights[name].any() for name in biases)
    expected = checkpoint.open(source).tensors["blocks.1.mlp.up.kernel"]
    assert hf.same_bits(weights["transformer.h.1.mlp.c_fc.weight"], expected)
    assert {name: w.shape for name, w in weights.items()} == {
        f"transformer.{name}": shape for name, shape in hf.shapes().items()
    }


def test_config_and_metadata_are_what_transformers_looks_for(tmp_path: Path, model: Path):
    out = convert.export(model, out=tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    with safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert {name: (out / name).read_bytes() for name in hf.FILES} == hf.FILES


def test_shards_stay_below_the_limit_and_the_index_covers_them(tmp_path: Path, model: Path):
    out = convert.export(model, out=tmp_path / "out", shard_bytes=6000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for shard in shards:
        part = load_file(shard)
        assert sum(x.nbytes for x in part.values()) <= 6000
        assert {index["weight_map"][name] for name in part} == {shard.name}
        found |= part
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    expected = hf.prefixed(hf.tensors())
    assert found.keys() == expected.keys()
    assert all(hf.same_bits(found[name], expected[name]) for name in expected)
    again = checkpoint.open(convert.convert(out, out=tmp_path / "again"))
    hashes = [
        {name: entry["sha256"] for name, entry in manifest["tensors"].items()}
        for manifest in (again.manifest, checkpoint.open(model).manifest)
    ]
    assert hashes[0] == hashes[1]


def test_a_failed_export_leaves_what_was_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    out = convert.export(model, out=tmp_path / "out")
    before = hf.digests(out)
    with pytest.raises(ConvertError, match="exists; choose another folder or pass --overwrite"):
        convert.export(model, out=out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConvertError, match="No space left"):
        convert.export(model, out=out, overwrite=True)
    assert hf.digests(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_an_export_but_never_its_own_model(tmp_path: Path, model: Path):
    out = convert.export(model, out=tmp_path / "out")
    (out / "stale.txt").write_text("of the last export")
    convert.export(model, out=out, overwrite=True)
    assert not (out / "stale.txt").exists()
    with pytest.raises(ConvertError, match=r"the source .* lies there"):
        convert.export(model, out=model, overwrite=True)


@pytest.mark.parametrize(
    "names",
    [
        ["config.json"],
        ["model.safetensors"],
        ["config.json", "metrics.jsonl", "model.safetensors"],
        ["config.json", "checkpoints", "model.safetensors.index.json"],
        ["config.json", "manifest.json", "model-00001-of-00001.safetensors"],
    ],
    ids=str,
)
def test_overwrite_never_replaces_what_is_no_export(tmp_path: Path, model: Path, names: list[str]):
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("precious")
    before = hf.digests(tmp_path / "out")
    with pytest.raises(ConvertError, match="is not an exported model and is not overwritten"):
        convert.export(model, out=tmp_path / "out", overwrite=True)
    assert hf.digests(tmp_path / "out") == before


def test_overwrite_replaces_an_empty_folder_and_a_sharded_export(tmp_path: Path, model: Path):
    (tmp_path / "out").mkdir()
    convert.export(model, out=tmp_path / "out", overwrite=True, shard_bytes=6000)
    out = convert.export(model, out=tmp_path / "out", overwrite=True)
    assert not (out / "model.safetensors.index.json").exists()


def test_the_working_directory_may_be_the_export(tmp_path: Path, model: Path):
    (tmp_path / "out").mkdir()
    flag = f"--model={os.path.relpath(model, tmp_path / 'out')}"
    done = hf.run("convert.export", flag, "--out=.", "--overwrite", cwd=tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, ".\n", "")
    assert convert.verify(model, against=tmp_path / "out").tensors == 12 * hf.L + 4


def test_wrong_input_is_told(tmp_path: Path, model: Path):
    with pytest.raises(ConvertError, match="format 'onnx' is not one of hf"):
        convert.export(model, to="onnx", out=tmp_path / "out")
    with pytest.raises(ConvertError, match="no such model folder"):
        convert.export(tmp_path / "none", out=tmp_path / "out")


def test_the_command_line_says_that_zero_biases_were_added(tmp_path: Path, model: Path):
    config = dataclasses.replace(checkpoint.open(model).config, use_bias=False)
    random_model(tmp_path / "m", config)
    done = hf.run("convert.export", "--model=m", "--out=out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert done.stderr.startswith("note: the model has no biases")


def test_the_command_line(tmp_path: Path, model: Path):
    done = hf.run("convert.export", f"--model={model}", "--to=hf", "--out=exported", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "exported\n", "")


def hf_model(dtype: str, **config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {k: v for k, v in hf.CONFIG.items() if k not in ("model_type", "architectures")}
    built = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **config})).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # norms and biases too, which start at one and zero
            parameter.add_(torch.randn_like(parameter))
    return built.to(getattr(torch, dtype))


def reload(folder: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.arange(11)[None] % 37).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("untied", [False, True])
def test_what_transformers_saves_comes_back_with_the_same_logits(
    tmp_path: Path, dtype: str, untied: bool
):
    original = hf_model(dtype, tie_word_embeddings=not untied)
    original.save_pretrained(tmp_path / "single")
    original.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    state = {name: x.float().numpy() for name, x in original.state_dict().items()}
    logits = reload(tmp_path / "single")
    for kind in ("single", "sharded"):
        folder = convert.convert(tmp_path / kind, out=tmp_path / f"{kind}-folder")
        opened = checkpoint.open(folder)
        assert {x.dtype.name for x in opened.tensors.values()} == {dtype}
        for name, array in hf_target.tensors(opened.config, opened.tensors).items():
            np.testing.assert_array_equal(array.astype(np.float32), state[name])
        exported = convert.export(folder, out=tmp_path / f"{kind}-exported", shard_bytes=9000)
        np.testing.assert_array_equal(reload(exported), logits)
    single = convert.export(tmp_path / "single-folder", out=tmp_path / "again")
    before, after = hf.digests(tmp_path / "single"), hf.digests(single)
    assert before["model.safetensors"] == after["model.safetensors"]


@pytest.mark.parity
def test_a_head_that_differs_though_the_config_ties_it_is_kept_as_transformers_keeps_it(
    tmp_path: Path,
):
    weights = hf.tensors()
    weights["lm_head.weight"] = weights["wte.weight"] * 2
    source = hf.write(tmp_path / "source", hf.prefixed(weights), files={})
    model = convert.convert(source, out=tmp_path / "model")
    exported = convert.export(model, out=tmp_path / "exported")
    np.testing.assert_array_equal(reload(exported), reload(source))


@pytest.mark.parity
def test_a_model_without_biases_computes_the_same_in_transformers(tmp_path: Path, model: Path):
    pytest.importorskip("transformers")
    import core

    config = dataclasses.replace(checkpoint.open(model).config, use_bias=False)
    source = random_model(tmp_path / "m", config)
    ours, params, _ = core.load(source)
    tokens_BT = jax.numpy.arange(11)[None] % 37
    logits = reload(convert.export(source, out=tmp_path / "out"))
    np.testing.assert_allclose(
        jax.device_get(ours.apply(params, tokens_BT)), logits, atol=2e-4, rtol=1e-4
    )
