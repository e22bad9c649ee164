"""nanoGPT's checkpoints in and out: the same bits, the same logits, and what neither side can say is told."""

import dataclasses
import functools
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

import convert
import core
import hf_checkpoints as hf
import nanogpt
import torch_files as tf
from convert import ConvertError
from convert.sources import open_source, torch_zip
from convert.targets import torch_archive
from core import axes, checkpoint
from core.config import GPT2Config
from core.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "pytorch"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with nanoGPT's ckpt.pt and meta.pkl."""
    folder = tmp_path / "out-char"
    folder.mkdir()
    for name in ("ckpt.pt", "meta.pkl"):
        shutil.copy(GOLDEN / name, folder)
    return folder


def saved(
    path: Path,
    weights: dict[str, np.ndarray] | None = None,
    args: dict[str, Any] = nanogpt.ARGS,
    prefix: str = "",
    **more: Any,
) -> Path:
    """Writes a checkpoint as train.py would, without torch."""
    weights = nanogpt.weights(args) if weights is None else weights
    keys = {name: str(k) for k, name in enumerate(weights)}
    state = {
        prefix + name: torch_archive.Tensor(keys[name], x.dtype.name, x.shape)
        for name, x in weights.items()
    }
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    torch_archive.write(
        path,
        {"model": state, "model_args": dict(args), **more},
        {keys[name]: x for name, x in weights.items()},
        lambda x: [x],
        lambda _: None,
    )
    return path


def model_folder(path: Path, dtype: str = "float32", **variant: Any) -> Path:
    """A random model of nanoGPT's sizes as a model folder."""
    sizes = {"n_positions": nanogpt.P, "n_embd": nanogpt.D, "n_layer": nanogpt.L, "n_head": 2}
    config = GPT2Config(
        **{"vocab_size": nanogpt.V, "activation_function": "gelu", **sizes, **variant}
    )
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    drawn = {
        name: (rng.standard_normal(axes.shape(word, config.axes)) / 4).astype(kind)
        for name, word in config.tensors().items()
    }
    checkpoint.save(path, config, traverse_util.unflatten_dict(drawn, sep="."))
    return path


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits of every position; always of a whole context, so that JAX compiles one shape."""
    model, params, _ = core.load(folder)
    padded = np.zeros((len(tokens), nanogpt.P), np.int32)
    padded[:, : tokens.shape[1]] = tokens
    return np.asarray(jax.jit(model.apply)(params, padded))[:, : tokens.shape[1]]


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(folder, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


class TestReading:
    """`ckpt.pt`, as nanoGPT on real torch saved it."""

    @pytest.mark.parametrize("is_file", [False, True])
    def test_every_weight_comes_through(self, tmp_path: Path, run: Path, is_file: bool):
        source = run / "ckpt.pt" if is_file else run
        out = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
        expected = nanogpt.as_parameters(nanogpt.weights())
        assert out.tensors.keys() == expected.keys()
        assert all(hf.same_bits(out.tensors[name], expected[name]) for name in expected)
        assert out.manifest["source"]["format"] == "nanogpt"
        assert out.manifest["source"]["files"].keys() == {"ckpt.pt", "meta.pkl"}
        assert "notes" not in out.manifest["source"]
        convert.verify(out.path, against=source)

    def test_it_computes_what_nanogpt_computes(self, tmp_path: Path, run: Path):
        out = convert.convert(run, out=tmp_path / "out")
        with np.load(GOLDEN / "expected.npz") as expected:
            found = logits(out, expected["tokens"])
            # formats.md 7.3 for amplified weights
            np.testing.assert_allclose(found, expected["logits"], atol=2e-4, rtol=1e-4)
            assert greedy(out, list(expected["prompt"]), 8) == list(expected["greedy"])

    def test_the_config_is_the_models(self, tmp_path: Path, run: Path):
        out = checkpoint.open(convert.convert(run, out=tmp_path / "out"))
        assert out.config == GPT2Config(
            vocab_size=nanogpt.V,
            n_positions=nanogpt.P,
            n_embd=nanogpt.D,
            n_layer=nanogpt.L,
            n_head=nanogpt.N,
            activation_function="gelu",
        )

    def test_the_optimizers_state_is_never_a_tensor(self, run: Path):
        value, _ = torch_zip.load(run / "ckpt.pt")
        assert len(value["optimizer"]["state"]) == 12 * nanogpt.L + 4
        assert len(open_source(run).tensors) == 12 * nanogpt.L + 5

    def test_characters_have_the_ids_of_itos(self, tmp_path: Path, run: Path):
        tokenizer = Tokenizer.open(convert.convert(run, out=tmp_path / "out"))
        assert tokenizer.encode(nanogpt.CHARACTERS) == list(range(nanogpt.V))
        assert tokenizer.decode(range(nanogpt.V)) == nanogpt.CHARACTERS
        assert tokenizer.eos_id is None

    @pytest.mark.parametrize("place", ["data/shakespeare_char", "out-char/data/shakespeare_char"])
    def test_the_datasets_characters_are_found(self, tmp_path: Path, run: Path, place: str):
        (tmp_path / place).mkdir(parents=True)
        (run / "meta.pkl").rename(tmp_path / place / "meta.pkl")
        out = convert.convert(run, out=tmp_path / "out")
        assert Tokenizer.open(out).encode("xy") == [2, 1]

    @pytest.mark.parametrize("dataset", ["../other", "a/b", "..", ".", "", "a\0b", 7, None])
    def test_a_dataset_is_a_name_and_no_path(self, tmp_path: Path, dataset: Any):
        for place in (".", "other", "data", "data/a/b"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            (tmp_path / place / "meta.pkl").write_bytes(b"evil")
        (tmp_path / "run").mkdir()
        file = saved(tmp_path / "run" / "ckpt.pt", config={"dataset": dataset})
        assert "no tokenizer" in open_source(file).notes[0]

    def test_a_tokenizer_beside_it_comes_first(self, run: Path):
        (run / "tokenizer.json").write_bytes(b"{}")
        assert open_source(run).companions == {"tokenizer.json": run / "tokenizer.json"}

    @pytest.mark.parametrize("prefix", ["", "_orig_mod."])
    @pytest.mark.parametrize("bias", [False, True])
    def test_compiled_or_not_with_biases_or_without(self, tmp_path: Path, prefix: str, bias: bool):
        args = nanogpt.ARGS | {"bias": bias}
        file = saved(tmp_path / "any.pt", args=args, prefix=prefix)
        out = checkpoint.open(convert.convert(file, out=tmp_path / "out"))
        expected = nanogpt.as_parameters(nanogpt.weights(args))
        assert out.config.to_dict()["use_bias"] is bias
        assert out.tensors.keys() == expected.keys()
        assert all(hf.same_bits(out.tensors[name], expected[name]) for name in expected)

    def test_arguments_of_early_2023_have_no_bias_and_the_weights_have_masks(self, tmp_path: Path):
        args = {k: v for k, v in nanogpt.ARGS.items() if k not in ("bias", "dropout")}
        mask = np.tril(np.ones((1, 1, nanogpt.P, nanogpt.P), np.float32))
        masks = {f"transformer.h.{i}.attn.bias": mask for i in range(nanogpt.L)}
        file = saved(tmp_path / "ckpt.pt", nanogpt.weights() | masks, args)
        out = checkpoint.open(convert.convert(file, out=tmp_path / "out"))
        assert out.tensors.keys() == nanogpt.as_parameters(nanogpt.weights()).keys()
        assert out.config.to_dict()["resid_pdrop"] == 0

    @pytest.mark.parametrize("vocab_size", [50257, 50304])
    def test_gpt2s_vocabulary_keeps_its_rows_and_lacks_its_tokenizer(
        self, tmp_path: Path, vocab_size: int
    ):
        args = nanogpt.ARGS | {"vocab_size": vocab_size, "n_layer": 1}
        file = saved(tmp_path / "ckpt.pt", args=args)
        out = checkpoint.open(convert.convert(file, out=tmp_path / "out"))
        heard = out.manifest["source"]["notes"]
        assert out.tensors["wte.embedding"].shape == (vocab_size, nanogpt.D)
        assert out.config.to_dict()["eos_token_id"] == 50256
        assert (
            "put GPT-2's tokenizer.json (or vocab.json and merges.txt) beside ckpt.pt" in heard[-1]
        )
        assert ["rows 50257 to 50303 of wte are padding" in note for note in heard] == [
            *[True] * (vocab_size == 50304),
            False,
        ]

    def test_the_command_line_says_the_notes(self, tmp_path: Path):
        saved(tmp_path / "ckpt.pt")
        done = hf.run("convert", "--source=ckpt.pt", "--out=out", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "out\n")
        assert done.stderr == (
            "note: no tokenizer: put the dataset's meta.pkl beside ckpt.pt and convert again\n"
        )


WRONG_ARGS: dict[str, tuple[Any, str]] = {
    "a fork's": (
        {"use_rmsnorm": True, "window": 4},
        "unknown key 'use_rmsnorm'.*unknown key 'window'",
    ),
    "another size": ({"n_embd": 12}, "mismatches with the config"),
    "no number": ({"n_layer": "3"}, "n_layer='3' is not int"),
    "a huge number": ({"n_layer": 10**15}, "n_layer"),
    "no head": ({"n_head": 0}, "n_head"),
    "dropout": ({"dropout": "much"}, "dropout='much' is no number"),
    "bias": ({"bias": 2}, "bias"),
}


@pytest.mark.parametrize("case", WRONG_ARGS)
def test_wrong_arguments_are_told(tmp_path: Path, case: str):
    changes, message = WRONG_ARGS[case]
    file = saved(tmp_path / "ckpt.pt", nanogpt.weights(), nanogpt.ARGS | changes)
    with pytest.raises(ConvertError, match=message) as told:
        convert.convert(file, out=tmp_path / "out")
    assert "ckpt.pt" in str(told.value)


def test_missing_arguments_are_all_named(tmp_path: Path):
    file = saved(tmp_path / "ckpt.pt", nanogpt.weights(), {"n_head": 2, "bias": True})
    with pytest.raises(ConvertError, match=r"n_layer is missing.*n_embd is missing.*block_size is"):
        convert.convert(file, out=tmp_path / "out")
    torch_archive.write(file, {"model": {}, "model_args": []}, {}, lambda x: [x], lambda _: None)
    with pytest.raises(ConvertError, match="model_args is a list; expected a dict"):
        convert.convert(file, out=tmp_path / "out")


def test_a_swapped_pair_a_missing_bias_and_a_stranger_are_told_together(tmp_path: Path):
    weights = nanogpt.weights()
    up, down = (f"transformer.h.1.mlp.{name}.weight" for name in ("c_fc", "c_proj"))
    weights[up], weights[down] = weights[down], weights[up]
    del weights["transformer.h.2.ln_1.bias"]
    weights["transformer.h.3.ln_1.bias"] = np.zeros(nanogpt.D, np.float32)
    with pytest.raises(ConvertError) as told:
        convert.convert(saved(tmp_path / "ckpt.pt", weights), out=tmp_path / "out")
    assert [problem.split(" ", 1)[0] for problem in told.value.problems] == [
        up,
        down,
        "transformer.h.3.ln_1.bias",
        "blocks.2.ln_1.bias",
    ]


def test_what_is_not_nanogpts_is_told(tmp_path: Path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(tf.archive(tf.proto(b"}"), {}))
    with pytest.raises(ConvertError, match=r"'model' and 'model_args'.*config\.json beside it"):
        open_source(tmp_path)
    path.write_bytes(tf.archive(tf.proto(b"cos\nsystem\n" + tf.text("x") + b"\x85R"), {}))
    for target in (tmp_path, path):
        with pytest.raises(ConvertError, match=r"'os.system'|no config\.json"):
            open_source(target)


META: dict[str, tuple[bytes, str]] = {
    "evil": (tf.proto(b"cos\nsystem\n" + tf.text("x") + b"\x85R"), "global 'os.system'"),
    "empty": (b"", "cut short"),
    "no itos": (pickle.dumps({"stoi": {}}), "no 'itos'"),
    "a list": (pickle.dumps(["a"]), "no 'itos'"),
    "a hole": (pickle.dumps({"itos": {0: "a", 2: "b"}}), "no 'itos' that gives every id"),
    "text as ids": (pickle.dumps({"itos": {"0": "a"}}), "'None' is no character"),
    "words": (pickle.dumps({"itos": {0: "word"}}), "'word' is no character; only the tokenizer of"),
    "a number": (pickle.dumps({"itos": {0: 5}}), "'5' is no character"),
    "twice": (pickle.dumps({"itos": {0: "a", 1: "a"}}), "a character twice"),
    "another dataset's": (
        pickle.dumps({"itos": {0: "a"}}),
        "1 characters, but ckpt.pt has a vocab",
    ),
}


@pytest.mark.parametrize("case", META)
def test_a_meta_that_is_no_character_set_is_told(run: Path, case: str):
    content, message = META[case]
    (run / "meta.pkl").write_bytes(content)
    with pytest.raises(ConvertError, match=message) as told:
        open_source(run)
    assert "meta.pkl" in str(told.value)


class TestWriting:
    """`convert.export --to=nanogpt`."""

    def test_there_and_back_is_the_same(self, tmp_path: Path, run: Path):
        first = convert.convert(run, out=tmp_path / "first")
        exported = convert.export(first, to="nanogpt", out=tmp_path / "exported")
        again = convert.convert(exported, out=tmp_path / "again")
        assert {n: d for n, d in hf.digests(again).items() if n != "manifest.json"} == {
            n: d for n, d in hf.digests(first).items() if n != "manifest.json"
        }
        assert {path.name for path in exported.iterdir()} == {
            *("ckpt.pt", "meta.pkl", "tokenizer.json", "tokenizer_config.json")
        }
        assert pickle.loads((exported / "meta.pkl").read_bytes()) == nanogpt.META

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("use_bias", [False, True])
    def test_every_type_is_kept(self, tmp_path: Path, dtype: str, use_bias: bool):
        model = model_folder(tmp_path / "model", dtype, use_bias=use_bias)
        exported = convert.export(model, to="nanogpt", out=tmp_path / "exported")
        again = checkpoint.open(convert.convert(exported, out=tmp_path / "again"))
        expected = checkpoint.open(model)
        assert all(hf.same_bits(again.tensors[n], x) for n, x in expected.tensors.items())
        assert dataclasses.replace(again.config, embd_pdrop=0.1) == expected.config

    def test_the_same_model_gives_the_same_bytes(self, tmp_path: Path):
        model = model_folder(tmp_path / "model")
        outs = [convert.export(model, to="nanogpt", out=tmp_path / name) for name in "ab"]
        assert hf.digests(outs[0]) == hf.digests(outs[1])

    def test_every_storage_begins_on_64_bytes_and_the_head_is_stored_once(self, tmp_path: Path):
        out = convert.export(model_folder(tmp_path / "m"), to="nanogpt", out=tmp_path / "out")
        value, places = torch_zip.load(out / "ckpt.pt")
        assert {place.offset % 64 for place in places.values()} == {0}
        assert len(places) == len(value["model"]) - 1
        assert value["model"]["lm_head.weight"] == value["model"]["transformer.wte.weight"]

    def test_large_records_begin_on_64_bytes_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(torch_archive, "_ZIP64_FROM", 100)
        out = convert.export(model_folder(tmp_path / "m"), to="nanogpt", out=tmp_path / "out")
        _, places = torch_zip.load(out / "ckpt.pt")
        assert {place.offset % 64 for place in places.values()} == {0}

    def test_everything_it_cannot_be_is_named(self, tmp_path: Path):
        model = model_folder(
            tmp_path / "model",
            n_inner=50,
            tie_word_embeddings=False,
            layer_norm_epsilon=1e-3,
            activation_function="relu",
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
        )
        with pytest.raises(ConvertError) as told:
            convert.export(model, to="nanogpt", out=tmp_path / "out")
        assert told.value.problems == (
            "n_inner=50",
            "tie_word_embeddings=False",
            "layer_norm_epsilon=0.001",
            "activation_function='relu'",
            "scale_attn_weights=False",
            "scale_attn_by_inverse_layer_idx=True",
        )
        assert not (tmp_path / "out").exists()

    def test_what_is_only_nearly_the_same_is_said(self, tmp_path: Path):
        model_folder(tmp_path / "m", activation_function="gelu_new", resid_pdrop=0.3)
        done = hf.run("convert.export", "--model=m", "--to=nanogpt", "--out=out", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "out\n")
        lines = done.stderr.splitlines()
        assert lines[0].startswith("note: the model's activation is gelu_new, nanoGPT computes the")
        assert lines[1] == "note: nanoGPT has one dropout for all; resid_pdrop=0.3 is written as it"
        assert "this model has 37 tokens of another one" in lines[2]

    def test_overwrite_replaces_an_export_and_no_run(self, tmp_path: Path, run: Path):
        export = functools.partial(convert.export, to="nanogpt", overwrite=True)
        model = model_folder(tmp_path / "model")
        export(model, out=tmp_path / "out")
        export(model, out=tmp_path / "out")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        for folder in (tmp_path / "out", run):
            with pytest.raises(ConvertError, match="is not overwritten"):
                export(model, out=folder)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.parity
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_checkpoint_of_nanogpt_computes_the_same_here(
    tmp_path: Path, torch: Any, compiled: bool, bias: bool, zipped: bool
):
    args = nanogpt.ARGS | {"bias": bias}
    weights = nanogpt.weights(args)
    torch.save(
        nanogpt.checkpoint(torch, weights, args, compiled=compiled),
        tmp_path / "ckpt.pt",
        _use_new_zipfile_serialization=zipped,
    )
    out = convert.convert(tmp_path / "ckpt.pt", out=tmp_path / "out")
    built = nanogpt.model(args)
    built.load_state_dict(nanogpt.state(torch, weights))
    tokens = np.random.default_rng(0).integers(0, nanogpt.V, (3, nanogpt.P))
    expected = nanogpt.logits(torch, built, tokens)
    np.testing.assert_allclose(logits(out, tokens), expected, atol=2e-4, rtol=1e-4)
    assert (logits(out, tokens).argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_nanogpt_samples_from_an_export(
    tmp_path: Path, torch: Any, dtype: str, use_bias: bool, mapped: bool
):
    """sample.py's way: weights_only, the arguments, a strict state dict."""
    model = model_folder(tmp_path / "model", dtype, use_bias=use_bias)
    out = convert.export(model, to="nanogpt", out=tmp_path / "out")
    loaded = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True, mmap=mapped)
    head, embedding = (
        loaded["model"][name] for name in ("lm_head.weight", "transformer.wte.weight")
    )
    assert head.data_ptr() == embedding.data_ptr()
    assert str(head.dtype) == f"torch.{dtype}"
    built = nanogpt.model(loaded["model_args"])
    built.load_state_dict(loaded["model"])
    tokens = np.arange(nanogpt.P)[None]
    expected = nanogpt.logits(torch, built, tokens)
    found = logits(model, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    assert greedy(model, [1, 2, 3], 8) == nanogpt.greedy(torch, built, [1, 2, 3], 8)


@pytest.mark.parity
@pytest.mark.parametrize("use_bias", [False, True])
def test_nanogpt_resumes_from_an_export(tmp_path: Path, torch: Any, use_bias: bool):
    """train.py's way: model, optimizer, iter_num and best_val_loss, then a step that decays what should."""
    model = model_folder(tmp_path / "model", use_bias=use_bias)
    out = convert.export(model, to="nanogpt", out=tmp_path / "out")
    loaded = torch.load(out / "ckpt.pt", weights_only=True)
    built = nanogpt.model(loaded["model_args"])
    built.load_state_dict(loaded["model"])
    optimizer = built.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    optimizer.load_state_dict(loaded["optimizer"])
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == decayed
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    built(torch.arange(5)[None]).square().sum().backward()
    before = built.transformer.wpe.weight[-1].clone()  # untouched by the batch: only decay moves it
    optimizer.step()
    np.testing.assert_allclose(
        built.transformer.wpe.weight[-1].detach(), before.detach() * (1 - 6e-4 * 0.1), rtol=1e-5
    )
    assert (loaded["iter_num"], loaded["best_val_loss"]) == (0, 1e9)
