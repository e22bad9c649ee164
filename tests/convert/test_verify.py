"""What is intact is confirmed; what differs is named: bits, files, configs, the first layer with other numbers."""

import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

import convert
import core
import gpt_oss_checkpoints as oss
import hf_checkpoints as hf
import tiny
import tiny_gpt_oss
from convert import ConvertError, importer, logits, verifier
from core import checkpoint

TENSORS = 12 * hf.L + 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.write(tmp_path_factory.mktemp("verify") / "source", hf.tensors())


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    return convert.convert(source, out=source.parent / "model")


@pytest.fixture
def copy(tmp_path: Path, model: Path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def rewritten(
    model: Path,
    out: Path,
    edit: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    **config: Any,
) -> Path:
    """The model folder with other tensors or another config, and a manifest that is true to them."""
    folder = checkpoint.open(model)
    tensors = {name: array.copy() for name, array in folder.tensors.items()}
    edit(tensors)
    checkpoint.write(
        out,
        config=dataclasses.replace(folder.config, **config),
        specs=[checkpoint.TensorSpec(n, x.shape, x.dtype.name) for n, x in tensors.items()],
        read=lambda spec: [np.ascontiguousarray(tensors[spec.name])],
        files={n: model / n for n in folder.manifest["files"] if n != "config.json"},
    )
    return out


def problems(model: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ConvertError) as told:
        convert.verify(model, **options)
    return told.value.problems


class TestHashes:
    def test_an_intact_folder(self, model: Path):
        report = convert.verify(model)
        assert (report.tensors, report.files) == (TENSORS, len(hf.FILES) + 1)
        assert str(report).endswith("files as in the manifest")

    def test_one_flipped_bit_and_changed_files_are_named(self, copy: Path):
        entry = checkpoint.open(copy).manifest["tensors"]["blocks.1.attn.out.bias"]
        with (copy / entry["shard"]).open("r+b") as file:
            file.seek(entry["offset"])
            byte = file.read(1)
            file.seek(entry["offset"])
            file.write(bytes([byte[0] ^ 1]))
        (copy / "tokenizer.json").write_text("{}")
        (copy / "generation_config.json").unlink()
        (copy / "merges.txt").write_text("#version: 0.2\n")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
        assert problems(copy) == (
            "config.json has another hash than in the manifest",
            "generation_config.json is missing",
            "tokenizer.json has another hash than in the manifest",
            "merges.txt is not in the manifest",
            "blocks.1.attn.out.bias has another hash than in the manifest",
        )

    def test_another_type_over_the_same_bytes_is_seen(self, tmp_path: Path, source: Path):
        """No hash covers a shard's header: float16 read as bfloat16 is another model of the same bytes."""
        half = convert.convert(source, out=tmp_path / "half", dtype="float16")
        (shard,) = half.glob("*.safetensors")
        data = shard.read_bytes()
        at = data.index(b'"F16"', data.index(b'"wpe.embedding"'))
        begin = 8 + int.from_bytes(data[:8], "little")
        assert data[begin - 1 : begin] == b" "  # which makes room for the longer name
        shard.write_bytes(data[:at] + b'"BF16"' + data[at + 5 : begin - 1] + data[begin:])
        assert problems(half) == ("wpe.embedding is bfloat16, float16 in the manifest",)

    def test_tensors_that_the_manifest_does_not_name_are_seen(self, copy: Path):
        manifest = json.loads((copy / "manifest.json").read_text())
        del manifest["tensors"]["ln_f.scale"]
        (copy / "manifest.json").write_text(json.dumps(manifest))
        assert problems(copy) == ("ln_f.scale is not in the manifest",)

    @pytest.mark.parametrize(
        ("tear", "message"),
        [
            (lambda shard: shard.write_bytes(shard.read_bytes()[:-1]), r"expected \d+ bytes"),
            (lambda shard: shard.unlink(), "is missing; convert or copy the model again"),
            (lambda shard: (shard.parent / "manifest.json").unlink(), "is not a model folder"),
        ],
        ids=["cut short", "no shard", "no manifest"],
    )
    def test_a_torn_folder_is_told_in_one_line(self, copy: Path, tear, message: str):
        (shard,) = copy.glob("*.safetensors")
        tear(shard)
        with pytest.raises(ConvertError, match=message):
            convert.verify(copy)


class TestAgainst:
    def test_an_intact_folder_and_its_source(self, model: Path, source: Path):
        report = convert.verify(model, against=source)
        assert report.notes == ()
        assert str(report).endswith(f", equal to {source} bit for bit")

    def test_a_cast_folder_is_compared_as_cast(self, tmp_path: Path, source: Path):
        half = convert.convert(source, out=tmp_path / "half", dtype="bfloat16")
        assert str(convert.verify(half, against=source)).endswith(
            f", equal to {source} cast to bfloat16"
        )

    def test_a_cast_folder_is_its_own_export_bit_for_bit(self, tmp_path: Path, source: Path):
        half = convert.convert(source, out=tmp_path / "half", dtype="bfloat16")
        exported = convert.export(half, out=tmp_path / "exported")
        assert str(convert.verify(half, against=exported)).endswith("bit for bit")

    def test_nan_and_signed_zero_are_compared_by_their_bits(self, tmp_path: Path):
        weights = hf.tensors()
        weights["ln_f.weight"][:3] = np.nan, 0, np.inf
        source = hf.write(tmp_path / "source", weights)
        model = convert.convert(source, out=tmp_path / "model")
        convert.verify(model, against=source)
        weights["ln_f.weight"][1] = -0.0
        other = hf.write(tmp_path / "other", weights)
        assert problems(model, against=other) == (
            f"ln_f.scale is not what {other} holds: 1 of 14 values differ, by up to 0",
        )

    @pytest.mark.parametrize("part_bytes", [1 << 24, 24])
    def test_every_difference_is_named(
        self, tmp_path: Path, model: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(
            importer, "in_parts", functools.partial(checkpoint.parts, part_bytes=part_bytes)
        )
        weights = hf.tensors()
        weights["h.0.ln_2.bias"][5] += 1
        weights["wte.weight"][[3, 30], [2, 4]] += 0.5, 0.25
        config = {**hf.CONFIG, "activation_function": "gelu", "layer_norm_epsilon": 1e-6}
        files = {"tokenizer.json": b"{}", "merges.txt": b"", "generation_config.json": b"{}"}
        other = hf.write(tmp_path / "other", weights, config=config, files=files)
        assert problems(model, against=other) == (
            f"config.json: activation_function is 'gelu_new', {other} has 'gelu'",
            f"config.json: layer_norm_epsilon is 1e-05, {other} has 1e-06",
            f"tokenizer.json is not that of {other}",
            f"merges.txt is only in {other}",
            f"generation_config.json is not that of {other}",
            f"wte.embedding is not what {other} holds: 2 of 518 values differ, by up to 0.5",
            f"blocks.0.ln_2.bias is not what {other} holds: 1 of 14 values differ, by up to 1",
        )

    def test_files_that_the_source_cannot_hold_are_noted(self, tmp_path: Path, model: Path):
        bare = hf.write(tmp_path / "bare", hf.tensors(), files={})
        (note,) = convert.verify(model, against=bare).notes
        assert note == (
            f"not compared, because {bare} has none: "
            "generation_config.json, tokenizer.json, tokenizer_config.json"
        )

    def test_a_source_with_more_or_fewer_layers_is_told(self, tmp_path: Path, model: Path):
        deeper = {**hf.CONFIG, "n_layer": hf.L + 1}
        more = hf.write(tmp_path / "more", hf.tensors(config=deeper), config=deeper)
        found = problems(model, against=more)
        assert f"config.json: n_layer is {hf.L}, {more} has {hf.L + 1}" in found
        assert (
            f"12 tensors are only in {more}: "
            "blocks.3.attn.out.bias, blocks.3.attn.out.kernel, blocks.3.attn.qkv.bias and 9 more"
        ) in found
        whole = convert.convert(more, out=tmp_path / "whole")
        found = problems(whole, against=model.parent / "source")
        assert any(line.startswith("12 tensors are not in ") for line in found)

    def test_a_source_of_other_sizes_is_told(self, tmp_path: Path, model: Path):
        wider = {**hf.CONFIG, "n_inner": hf.F + 1}
        other = hf.write(tmp_path / "other", hf.tensors(config=wider), config=wider)
        assert f"blocks.2.mlp.up.bias is [{hf.F}], {other} has [{hf.F + 1}]" in problems(
            model, against=other
        )

    def test_a_source_of_another_family_is_told(self, tmp_path: Path, model: Path):
        other = oss.write(tmp_path / "other", oss.dense(), oss.CONFIG)
        found = problems(model, against=other)
        assert found[0] == f"config.json: it is a gpt2, {other} is a gpt_oss"
        assert sum("config.json" in line for line in found) == 1

    def test_a_value_that_does_not_survive_the_cast_is_a_difference(
        self, tmp_path: Path, source: Path
    ):
        half = convert.convert(source, out=tmp_path / "half", dtype="float16")
        weights = hf.tensors()
        weights["ln_f.bias"][0] = 1e9
        other = hf.write(tmp_path / "other", weights)
        (found,) = problems(half, against=other)
        assert found.startswith("ln_f.bias cannot be compared: ln_f.bias: 1e+09 does not fit")

    def test_a_wrong_folder_with_a_true_manifest_is_seen(self, tmp_path: Path, model: Path):
        def edit(tensors: dict[str, np.ndarray]) -> None:
            swap(tensors, "blocks.1.", "blocks.2.")

        wrong = rewritten(model, tmp_path / "wrong", edit, activation_function="gelu")
        assert convert.verify(wrong)
        found = problems(wrong, against=model.parent / "source")
        assert "activation_function" in found[0]
        assert len(found) == 1 + 2 * 12

    def test_unpacked_experts_are_verified_through_the_decoder(self, tmp_path: Path):
        packed = oss.write(tmp_path / "packed", oss.packed(), oss.PACKED_CONFIG)
        model = convert.convert(packed, out=tmp_path / "model", experts="bfloat16", dtype="float32")
        assert str(convert.verify(model, against=packed)).endswith(
            f"equal to {packed} with its experts unpacked, cast to float32"
        )
        weights = oss.packed()
        blocks = next(x for name, x in weights.items() if name.endswith("down_proj_blocks"))
        blocks[:] = blocks << 4 | blocks >> 4  # the other order of the nibbles
        other = oss.write(tmp_path / "other", weights, oss.PACKED_CONFIG)
        (found,) = problems(model, against=other)
        assert found.startswith(f"blocks.0.moe.down.kernel is not what {other} holds: ")

    def test_a_broken_source_is_told(self, tmp_path: Path, model: Path):
        weights = hf.tensors()
        del weights["h.1.ln_2.bias"]
        lacking = hf.write(tmp_path / "lacking", weights)
        with pytest.raises(ConvertError, match=r"blocks\.1\.ln_2\.bias is missing"):
            convert.verify(model, against=lacking)
        with pytest.raises(ConvertError, match="no such file or folder"):
            convert.verify(model, against=tmp_path / "none")
        with pytest.raises(ConvertError, match="format 'floppy' is not one of auto, "):
            convert.verify(model, against=lacking, format="floppy")


class TestCommandLine:
    def test_what_is_in_order_is_one_line(self, model: Path, source: Path):
        done = hf.run("convert.verify", f"--model={model}", f"--against={source}", cwd=source)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{TENSORS} tensors")

    def test_a_note_goes_to_stderr(self, tmp_path: Path, model: Path):
        bare = hf.write(tmp_path / "bare", hf.tensors(), files={})
        flags = f"--model={model}", f"--against={bare}", "--format=safetensors"
        done = hf.run("convert.verify", *flags, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (0, 1)
        assert done.stderr.startswith("note: not compared, because ")

    def test_a_difference_is_one_line_and_exit_code_1(self, tmp_path: Path, copy: Path):
        (copy / "tokenizer.json").unlink()
        done = hf.run("convert.verify", f"--model={copy}", cwd=tmp_path)
        assert hf.the_error(done) == f"error: {copy}: 1 difference: tokenizer.json is missing"

    def test_a_damaged_source_is_one_line_and_exit_code_1(self, tmp_path: Path, model: Path):
        torn = hf.write(tmp_path / "torn", hf.tensors())
        (torn / "model.safetensors").write_bytes(b"")
        done = hf.run("convert.verify", f"--model={model}", "--against=torn", cwd=tmp_path)
        assert "found 0 bytes" in hf.the_error(done)

    def test_format_alone_is_wrong_usage(self, tmp_path: Path):
        done = hf.run("convert.verify", "--model=m", "--format=safetensors", cwd=tmp_path)
        assert done.returncode == 2
        assert "--format is that of --against" in done.stderr


def test_logits_without_torch_say_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConvertError) as told:
        convert.verify(model, logits=True)
    assert str(told.value) == (
        "--logits compares with torch, and torch is not installed: "
        "`uv pip install torch transformers`, or run it from .venv-peers"
    )


def swap(tensors: dict[str, np.ndarray], one: str, other: str) -> None:
    """Exchanges all tensors that begin with `one` and those that begin with `other`."""
    for name in [name for name in tensors if name.startswith(one)]:
        twin = other + name.removeprefix(one)
        tensors[name], tensors[twin] = tensors[twin], tensors[name]


# P is beyond the random ids (64 long), and what the paragraph has is beyond P.
SIZES = {"vocab_size": 257, "n_positions": 97, "n_layer": 3}


def saved(out: Path, config: Any, params: Mapping[str, Any]) -> Path:
    checkpoint.save(out, config, params, tokenizer=core.Tokenizer.utf8())
    return out


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers itself saves of an amplified random model, and a tokenizer beside."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {k: v for k, v in tiny.config(**SIZES).to_hf().items() if k != "model_type"}
    built = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1).add_(torch.randn_like(parameter) * 0.1)
    out = tmp_path_factory.mktemp("logits") / "original"
    built.save_pretrained(out)
    for name, content in core.Tokenizer.utf8().files().items():
        (out / name).write_bytes(content)
    return out


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    return convert.convert(original, out=original.parent / "converted")


def flip_a_bit(tensors: dict[str, np.ndarray]) -> None:
    tensors["blocks.1.attn.out.bias"].view(np.uint32)[5] ^= 1 << 30  # of the exponent


def untranspose(tensors: dict[str, np.ndarray]) -> None:
    kernel_NHD = tensors["blocks.2.attn.out.kernel"]
    square = kernel_NHD.reshape(len(kernel_NHD) * kernel_NHD.shape[1], -1)
    tensors["blocks.2.attn.out.kernel"] = square.T.reshape(kernel_NHD.shape)


def add_one(name: str, *index: int) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][index] += 1

    return edit


def untie(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.kernel"] = tensors["wte.embedding"] * np.float32(1.01)


MISTAKES: dict[str, tuple[Callable[[dict[str, np.ndarray]], None], dict[str, Any], str]] = {
    "a flipped bit": (flip_a_bit, {}, "blocks.1.attn"),
    "swapped layers": (lambda t: swap(t, "blocks.1.", "blocks.2."), {}, "blocks.1.attn"),
    "a transposed kernel": (untranspose, {}, "blocks.2.attn"),
    "another GELU": (lambda t: None, {"activation_function": "gelu"}, "blocks.0.mlp"),
    "another epsilon": (lambda t: None, {"layer_norm_epsilon": 1e-6}, "blocks.0.attn"),
    "another scale": (lambda t: None, {"scale_attn_by_inverse_layer_idx": True}, "blocks.1.attn"),
    "a wrong position": (add_one("wpe.embedding", 3, 2), {}, "embedding"),
    "a wrong norm": (add_one("ln_f.scale"), {}, "ln_f"),
    "a wrong down": (add_one("blocks.2.mlp.down.bias", 0), {}, "blocks.2.mlp"),
    "another head": (untie, {"tie_word_embeddings": False}, "lm_head"),
}


@pytest.mark.parity
class TestLogits:
    def test_a_conversion_computes_what_transformers_does_with_the_original(
        self, original: Path, converted: Path
    ):
        report = convert.verify(converted, against=original, logits=True)
        assert report.logits is not None
        assert report.logits.reference == f"transformers on {original}"
        assert {row.name: row.tokens for row in report.logits.rows} == {
            "random": 2 * 64,
            "text": 97,
            "long": 97,
        }
        assert all(row.same_argmax == 1 and row.kl < 1e-9 for row in report.logits.rows)
        assert report.logits.first is None
        assert (report.notes, report.problems) == ((), ())

    @pytest.mark.parametrize(("edit", "config", "first"), MISTAKES.values(), ids=MISTAKES.keys())
    def test_the_first_layer_that_differs_is_named(
        self, tmp_path: Path, original: Path, converted: Path, edit, config, first: str
    ):
        """Both checks see every mistake of a folder whose own manifest is true."""
        wrong = rewritten(converted, tmp_path / "wrong", edit, **config)
        said, *rest = problems(wrong, against=original, logits=True)
        assert said.startswith(f"the logits differ from transformers on {original} from {first} on")
        assert rest

    def test_what_is_wrong_beyond_the_random_ids_is_seen_in_a_full_context(
        self, tmp_path: Path, original: Path, converted: Path
    ):
        wrong = rewritten(converted, tmp_path / "wrong", add_one("wpe.embedding", 96, 2))
        (tmp_path / "wrong" / "tokenizer.json").unlink()
        report = verifier.verify(wrong, against=original, logits=True)
        assert report.logits is not None
        assert [row.name for row in report.logits.rows if not row.agrees] == ["long"]
        assert report.logits.first == "embedding"

    def test_a_cast_folder_is_compared_with_the_original_as_cast(
        self, tmp_path: Path, original: Path
    ):
        half = convert.convert(original, out=tmp_path / "half", dtype="bfloat16")
        report = convert.verify(half, against=original, logits=True)
        assert f"transformers on {original} with its weights in bfloat16\n" in str(report)

    def test_an_original_of_pytorch_is_opened_by_transformers(self, tmp_path: Path, original: Path):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        loaded = transformers.GPT2LMHeadModel.from_pretrained(original)
        older = tmp_path / "older"
        older.mkdir()
        torch.save(loaded.state_dict(), older / "pytorch_model.bin")
        shutil.copy(original / "config.json", older)
        model = convert.convert(older, out=tmp_path / "model")
        report = convert.verify(model, against=older, logits=True)
        assert str(report).startswith(f"float32 against transformers on {older}\n")
        assert report.notes == (
            "no text among the inputs of --logits: the folder has no tokenizer",
        )

    def test_a_folder_of_both_formats_is_read_as_it_was_verified(
        self, tmp_path: Path, original: Path
    ):
        """Transformers would take the safetensors, and the logits would be of something else."""
        torch = pytest.importorskip("torch")
        both = shutil.copytree(original, tmp_path / "both")
        state = {
            n: torch.from_numpy(x.copy()) for n, x in load_file(both / "model.safetensors").items()
        }
        state["transformer.ln_f.bias"] += 1
        torch.save(state, both / "pytorch_model.bin")
        plan = importer.plan_source(both, format="torch")
        model = importer.write(plan, tmp_path / "model")
        report = convert.verify(model, against=both, format="torch", logits=True)
        assert "our own conversion and export of" in str(report)

    def test_without_a_source_the_reference_is_our_own_export_and_that_is_said(
        self, tmp_path: Path
    ):
        built = core.build(tiny.config(**SIZES, use_bias=False, activation_function="gelu"))
        model = saved(tmp_path / "model", built.config, tiny.params(built))
        report = convert.verify(model, logits=True)
        assert str(report).startswith(
            "float32 against transformers on our own export of the folder"
        )

    def test_another_format_is_compared_through_our_own_conversion(self, tmp_path: Path):
        built = core.build(tiny.config(**SIZES, use_bias=False, activation_function="gelu"))
        model = saved(tmp_path / "model", built.config, tiny.params(built))
        theirs = convert.export(model, to="nanogpt", out=tmp_path / "nanogpt")
        wrong = rewritten(model, tmp_path / "wrong", activation_function="gelu_new")
        report = verifier.verify(wrong, against=theirs, logits=True)
        assert report.logits is not None
        assert report.logits.reference.endswith(f"our own conversion and export of {theirs}")
        assert report.logits.first == "blocks.0.mlp"

    def test_a_long_context_is_filled_up_to_a_limit_and_that_is_said(self, tmp_path: Path):
        sizes = {"n_positions": 1100, "n_layer": 1, "n_embd": 12, "n_head": 2}
        built = core.build(tiny.config(**{**SIZES, **sizes}))
        model = saved(tmp_path / "model", built.config, tiny.params(built))
        report = convert.verify(model, logits=True)
        assert report.logits is not None
        assert report.logits.rows[-1].tokens == 1024
        assert report.notes == ("the longest input of --logits has 1,024 of 1,100 positions",)

    @pytest.mark.parametrize("quantization", [None, "mxfp4"])
    def test_gpt_oss_is_compared_module_by_module(self, tmp_path: Path, quantization: str | None):
        sizes = {"vocab_size": 257, "max_position_embeddings": 71}
        config = (
            tiny_gpt_oss.config(**sizes)
            if quantization is None
            else tiny_gpt_oss.packed_config(**sizes)
        )
        weights = tiny_gpt_oss.weights(config)
        model = saved(tmp_path / "model", config, traverse_util.unflatten_dict(weights, sep="."))
        exported = convert.export(model, out=tmp_path / "exported")
        assert convert.verify(model, against=exported, logits=True).logits
        for name, first in (
            ("blocks.1.attn.sinks", "blocks.1.attn"),
            ("blocks.2.moe.router.bias", "blocks.2.moe"),
            ("norm_f.scale", "norm_f"),
        ):
            wrong = rewritten(model, tmp_path / first, add_one(name, 0))
            assert f"from {first} on" in problems(wrong, against=exported, logits=True)[0]

    def test_a_model_of_other_sizes_is_not_compared(self, tmp_path: Path, converted: Path):
        other = hf.write(tmp_path / "other", hf.tensors())
        with pytest.raises(ConvertError, match="is a model of other sizes"):
            convert.verify(converted, against=other, logits=True)

    def test_numbers_that_are_none_are_a_difference(
        self, tmp_path: Path, original: Path, converted: Path
    ):
        def edit(tensors: dict[str, np.ndarray]) -> None:
            tensors["blocks.1.mlp.up.bias"][3] = np.nan

        wrong = rewritten(converted, tmp_path / "wrong", edit)
        assert "from blocks.1.mlp on" in problems(wrong, against=original, logits=True)[0]

    def test_the_command_line_shows_the_numbers_and_fails_in_one_line(
        self, tmp_path: Path, original: Path, converted: Path
    ):
        wrong = rewritten(converted, tmp_path / "wrong", activation_function="gelu")
        flags = f"--model={wrong}", f"--against={original}", "--logits"
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two wait for each other
        done = hf.run("convert.verify", *flags, cwd=tmp_path, env=one_thread, timeout=200)
        error = hf.the_error(done, stdout=None)
        assert "2 differences: the logits differ from transformers" in error
        assert "from blocks.0.mlp on" in error
        lines = done.stdout.splitlines()
        assert lines[0] == f"float32 against transformers on {original}"
        assert [line.split()[0] for line in lines[1:5]] == ["logits", "random", "text", "long"]
        assert lines[5:] == ["first differing layer: blocks.0.mlp"]


@pytest.mark.parity
@pytest.mark.parametrize("variant", tiny.VARIANTS.values(), ids=tiny.VARIANTS.keys())
def test_rounding_alone_is_never_a_difference(tmp_path: Path, variant: dict[str, Any]):
    """Ours is at most a few times as far from torch as its float32 is from float64, whatever the weights' size."""
    built = core.build(tiny.config(**(SIZES | variant | {"n_layer": 2})))
    for amplify in (1, 25):
        model = saved(tmp_path / str(amplify), built.config, tiny.params(built, amplify))
        comparison = logits.compare(checkpoint.open(model), None)
        assert all(row.largest < row.allowed / 2 for row in comparison.rows), str(comparison)
