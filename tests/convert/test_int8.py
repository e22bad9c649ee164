"""GPT-2's kernels in int8: rounded once, to the nearest, and everywhere said so."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert
import gpt_oss_checkpoints as gpt_oss
import hf_checkpoints as hf
from convert import ConvertError, int8
from core import checkpoint
from core import int8 as rounding
from core.config import GPT2Config

KERNELS = {
    "attn.qkv": ("D3NH", 1),
    "attn.out": ("NHD", 2),
    "mlp.up": ("DF", 1),
    "mlp.down": ("FD", 1),
}
"""The kernels of a block, and how many input axes they begin with."""


def outputs_first(kernel: np.ndarray, inputs: int) -> np.ndarray:
    return np.moveaxis(kernel, range(inputs), range(-inputs, 0))


def by_the_formula(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The values and scales of a dense kernel, one output channel after another."""
    turned = outputs_first(kernel, inputs).astype(np.float64)
    rows = turned.reshape(int(np.prod(turned.shape[:-inputs])), -1)
    scales = [np.float32(np.abs(row).max() / 127) for row in rows]
    values = [[round(w / float(s)) for w in row] for row, s in zip(rows, scales, strict=True)]
    return (
        np.array(values, np.int8).reshape(turned.shape),
        np.array(scales, np.float32).reshape(turned.shape[:-inputs]),
    )


def parts(folder: checkpoint.ModelFolder, name: str) -> tuple[np.ndarray, np.ndarray]:
    return folder.tensors[f"{name}.kernel.values"], folder.tensors[f"{name}.kernel.scales"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return hf.write(tmp_path / "source", hf.tensors())


@pytest.fixture
def model(tmp_path: Path, source: Path) -> Path:
    return convert.convert(source, out=tmp_path / "int8", quantization="int8")


def test_kernels_are_rounded_by_the_formula_and_nothing_else_is(model: Path):
    folder = checkpoint.open(model)
    dense = hf.as_parameters(hf.tensors())
    assert isinstance(folder.config, GPT2Config)
    assert folder.config.quantization == "int8"
    for name, (_, inputs) in KERNELS.items():
        for layer in range(folder.config.n_layer):
            values, scales = parts(folder, f"blocks.{layer}.{name}")
            expected = by_the_formula(dense[f"blocks.{layer}.{name}.kernel"], inputs)
            assert hf.same_bits(values, expected[0])
            assert hf.same_bits(scales, expected[1])
    kept = [n for n in folder.tensors if ".kernel." not in n]
    assert all(hf.same_bits(folder.tensors[n], dense[n]) for n in kept)
    assert {n.rpartition(".")[2] for n in kept} >= {"embedding", "scale", "bias"}


def test_no_weight_moves_by_more_than_half_a_scale(model: Path):
    folder = checkpoint.open(model)
    dense = hf.as_parameters(hf.tensors())
    for name, (_, inputs) in KERNELS.items():
        values, scales = parts(folder, f"blocks.1.{name}")
        scales = scales.reshape(scales.shape + (1,) * inputs).astype(np.float64)
        exact = outputs_first(dense[f"blocks.1.{name}.kernel"], inputs).astype(np.float64)
        assert (np.abs(exact - values * scales) <= scales / 2).all()


@pytest.mark.parametrize(
    ("row", "values", "scale"),
    [
        ([0, -0.0, 0], [0, 0, 0], 1),
        ([127, 0.5, 1.5], [127, 0, 2], 1),
        ([-127, -0.5, -2.5], [-127, 0, -2], 1),
        ([1e-40, -1e-38, 0], [0, -1, 0], 2.0**-126),
        ([3e38, -3e38, 0], [127, -127, 0], float(np.float32(3e38)) / 127),
    ],
)
def test_a_channel(row: list[float], values: list[int], scale: float):
    weights = np.array([row], np.float32)
    assert np.concatenate([*int8.values(weights, 1, "w")]).tolist() == [values]
    assert np.concatenate([*int8.scales(weights, 1, "w")]).tolist() == [float(np.float32(scale))]


def test_parts_are_few_channels_and_whole_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounding, "_PART", 500)
    weights = np.random.default_rng(0).standard_normal((30, 2, 35)).astype(np.float32)
    found = [*int8.values(weights.transpose(2, 0, 1), 1, "w")]
    assert {part.shape for part in found[:-1]} == {(8, 60)}
    expected = by_the_formula(weights, 2)
    assert hf.same_bits(np.concatenate(found).reshape(35, 30, 2), expected[0])
    found = [*int8.scales(weights.transpose(2, 0, 1), 1, "w")]
    assert hf.same_bits(np.concatenate(found), expected[1])


def test_the_other_weights_are_cast_and_the_kernels_come_from_the_source(
    tmp_path: Path, source: Path, model: Path
):
    cast = convert.convert(source, out=tmp_path / "cast", quantization="int8", dtype="bfloat16")
    a, b = checkpoint.open(model), checkpoint.open(cast)
    for name, x in a.tensors.items():
        expected = x if checkpoint.is_quantised(name) else x.astype(ml_dtypes.bfloat16)
        assert hf.same_bits(b.tensors[name], expected)
    assert "rounded to int8, cast to bfloat16" in str(convert.verify(cast, against=source))


def test_the_manifest_says_how(model: Path):
    manifest = json.loads((model / "manifest.json").read_text())
    values = manifest["tensors"]["blocks.0.attn.qkv.kernel.values"]
    scales = manifest["tensors"]["blocks.0.attn.qkv.kernel.scales"]
    assert (values["dtype"], scales["dtype"]) == ("int8", "float32")
    assert values["layout"] == "int8 D(3NH) -> D3NH -> 3NHD"
    assert scales["layout"] == "int8 D(3NH) -> D3NH -> 3NH"
    assert values["sources"] == ["h.0.attn.c_attn.weight"]
    assert manifest["parameters"] == sum(x.size for x in hf.as_parameters(hf.tensors()).values())
    assert json.loads((model / "config.json").read_text())["quantization"] == "int8"
    assert any("rounded to int8" in note for note in manifest["source"]["notes"])


def test_values_are_int8_to_any_reader_of_safetensors(model: Path):
    from safetensors.numpy import load_file

    shard = load_file(model / "model-00001-of-00001.safetensors")
    assert shard["blocks.0.mlp.up.kernel.values"].dtype == np.int8


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, source: Path, model: Path):
    again = convert.convert(source, out=tmp_path / "again", quantization="int8")
    assert hf.digests(again) == hf.digests(model)


def test_verify_derives_it_again(tmp_path: Path, source: Path, model: Path):
    assert "with its kernels rounded to int8" in str(convert.verify(model, against=source))
    weights = hf.tensors()
    weights["h.1.mlp.c_fc.weight"][3, 4] += 1
    other = hf.write(tmp_path / "other", weights)
    with pytest.raises(
        ConvertError, match=r"blocks\.1\.mlp\.up\.kernel\.(values|scales) is not what"
    ):
        convert.verify(model, against=other)


def test_a_folder_of_it_is_a_source(tmp_path: Path, model: Path):
    copy = convert.convert(model, out=tmp_path / "copy", dtype="bfloat16")
    a, b = checkpoint.open(model), checkpoint.open(copy)
    assert all(
        hf.same_bits(a.tensors[n], x) for n, x in b.tensors.items() if checkpoint.is_quantised(n)
    )
    assert b.tensors["wte.embedding"].dtype == ml_dtypes.bfloat16
    convert.verify(copy, against=model)


def test_rounded_from_a_model_folder_it_is_the_same(tmp_path: Path, source: Path, model: Path):
    dense = convert.convert(source, out=tmp_path / "dense")
    later = checkpoint.open(convert.convert(dense, out=tmp_path / "later", quantization="int8"))
    assert all(hf.same_bits(x, later.tensors[n]) for n, x in checkpoint.open(model).tensors.items())


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, wrong: float):
    weights = hf.tensors()
    weights["h.0.attn.c_proj.weight"][2, 3] = wrong
    with pytest.raises(ConvertError, match=r"h\.0\.attn\.c_proj\.weight: .* not finite"):
        convert.convert(
            hf.write(tmp_path / "s", weights), out=tmp_path / "out", quantization="int8"
        )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_rounded_is_refused(tmp_path: Path, model: Path):
    experts = gpt_oss.write(tmp_path / "s", gpt_oss.packed(), gpt_oss.PACKED_CONFIG)
    for path, reason in ((experts, "a gpt_oss is not"), (model, "the kernels are int8 already")):
        with pytest.raises(ConvertError, match=reason):
            convert.convert(path, out=tmp_path / "out", quantization="int8")


@pytest.mark.parametrize("to", ["hf", "nanogpt", "npz", "msgpack", "orbax", "gguf"])
def test_no_export_holds_it(tmp_path: Path, source: Path, model: Path, to: str):
    with pytest.raises(ConvertError, match="int8, which no export holds") as caught:
        convert.export(model, to=to, out=tmp_path / "out.gguf")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def test_logits_are_not_compared_with_torch(source: Path, model: Path):
    with pytest.raises(ConvertError, match="leave --logits away"):
        convert.verify(model, against=source, logits=True)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("blocks.0.mlp.up.kernel.values", "uint8"), ("blocks.0.mlp.up.kernel.scales", "bfloat16")],
)
def test_a_folder_of_other_types_does_not_open(model: Path, tmp_path: Path, name: str, dtype: str):
    folder = checkpoint.open(model)
    specs = [
        checkpoint.TensorSpec(n, x.shape, dtype if n == name else x.dtype.name)
        for n, x in folder.tensors.items()
    ]
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} should be"):
        checkpoint.write(
            tmp_path / "out", config=folder.config, specs=specs, read=lambda spec: iter(())
        )


@pytest.mark.usefixtures("source")
def test_the_command_says_what_it_does(tmp_path: Path):
    flags = ("--source=source", "--out=out", "--quantization=int8")
    done = hf.run("convert", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: the blocks' kernels are rounded to int8" in done.stderr
    plan = hf.run("convert", *flags, "--dry_run", cwd=tmp_path).stdout
    assert "int8 D(3NH) -> D3NH -> 3NHD" in plan
    error = hf.the_error(hf.run("convert.export", "--model=out", "--out=hf", cwd=tmp_path))
    assert "from source" in error
    assert hf.run("convert", *flags, "--quantization=int4", cwd=tmp_path).returncode == 2
