"""From a model folder to GGUF: every number as it was, every key as llama.cpp reads it, no model that it gets wrong."""

import dataclasses
import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers

import convert
import hf_checkpoints as hf
from convert import ConvertError
from convert.targets import gguf as gguf_target
from convert.targets.gguf import weights
from core import axes, checkpoint
from core.config import Config, GPT2Config, GptOssConfig
from core.tokenizer import Tokenizer

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
O200K_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pairwise different, also in products (NH 48, KH 12, 2F 192); D and F are multiples of an MXFP4 block.
GPT_OSS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_local_experts": 9,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131,
    "initial_context_length": 40,
    "sliding_window": 7,
    "rope_truncate": True,
    "eos_token_id": 90,
}


def folder(
    path: Path, config: Config, *, dtype: str = "float32", tokenizer: Tokenizer | None = None
) -> Path:
    """A model folder of random numbers, its quantised tensors random bytes with scales about one."""
    rng = np.random.default_rng(5)

    def draw(spec: checkpoint.TensorSpec) -> list[np.ndarray]:
        if spec.name.endswith(".blocks"):
            return [rng.integers(0, 256, spec.shape, np.uint8)]
        if spec.name.endswith(".scales"):
            return [rng.integers(120, 128, spec.shape, np.uint8)]
        kind = np.dtype(getattr(ml_dtypes, spec.dtype, spec.dtype))
        return [rng.standard_normal(spec.shape, np.float32).astype(kind)]

    specs = [
        checkpoint.TensorSpec(
            name,
            axes.shape(word, config.axes),
            "uint8" if name.endswith((".blocks", ".scales")) else dtype,
        )
        for name, word in config.tensors().items()
    ]
    files = tokenizer.files() if tokenizer is not None else {}
    checkpoint.write(path, config=config, specs=specs, read=draw, files=files)
    return path


def gpt2(**variant: Any) -> GPT2Config:
    return GPT2Config(
        **{"vocab_size": 37, "n_positions": 11, "n_embd": 14, "n_layer": 2, "n_head": 2, **variant}
    )


def export(model: Path, type: str = "keep") -> tuple[gguf.GGUFReader, list[str]]:
    notes: list[str] = []
    out = model.with_name(f"{model.name}-{type}.gguf")
    convert.export(model, to="gguf", out=out, type=type, on_note=notes.append)
    return gguf.GGUFReader(out), notes


def tensors(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor as numbers, in NumPy's order of axes and exactly as stored; BF16 is widened."""
    return {
        tensor.name: tensor.data
        if tensor.tensor_type in (Kind.F32, Kind.F16)
        else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }


def kinds(reader: gguf.GGUFReader) -> dict[str, Kind]:
    return {tensor.name: tensor.tensor_type for tensor in reader.tensors}


def keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    fields = reader.fields.items()
    return {name: field.contents() for name, field in fields if not name.startswith("GGUF.")}


def as_gguf(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's GPT-2 tensors under GGUF's names and in its layouts, spelled out by hand and not by a table."""
    names = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    result = {
        "token_embd.weight": weights["wte.weight"],
        "position_embd.weight": weights["wpe.weight"],
        "output_norm.weight": weights["ln_f.weight"],
        "output_norm.bias": weights["ln_f.bias"],
    }
    for i in range(hf.L):
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                result[f"blk.{i}.{ours}.{part}"] = weights[f"h.{i}.{theirs}.{part}"].T
    if "lm_head.weight" in weights:
        result["output.weight"] = weights["lm_head.weight"]
    return result


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("untied", [False, True])
def test_gpt2_keeps_every_number_of_the_source(tmp_path: Path, dtype: str, untied: bool):
    source = hf.tensors(dtype)
    if untied:
        source["lm_head.weight"] = source["wte.weight"] * source["wte.weight"]
    config = {**hf.CONFIG, "tie_word_embeddings": not untied}
    path = hf.write(tmp_path / "source", hf.prefixed(source), config=config, files={})
    reader, _ = export(convert.convert(path, out=tmp_path / "model"))
    expected, stored = as_gguf(source), tensors(reader)
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        assert hf.same_bits(
            stored[name].astype(np.float32), np.ascontiguousarray(array.astype(np.float32))
        ), name
    kept = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}[dtype]
    matrices = {"token_embd", "output", "attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    for name, kind in kinds(reader).items():
        *_, layer, part = name.split(".")
        is_matrix = layer in matrices and part == "weight"
        assert kind == (kept if is_matrix else Kind.F32), name


def test_gpt2_has_the_keys_that_llama_cpp_reads(tmp_path: Path):
    model = folder(tmp_path / "mine", gpt2(n_inner=20, layer_norm_epsilon=1e-3))
    found = keys(export(model)[0])
    assert found == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "mine",
        "general.quantization_version": 2,
        "general.file_type": 0,
        "gpt2.context_length": 11,
        "gpt2.embedding_length": 14,
        "gpt2.feed_forward_length": 20,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-3),
        "gpt2.vocab_size": 37,
        "tokenizer.ggml.model": "none",
    }


def test_a_model_without_biases_gets_zeros_and_says_so(tmp_path: Path):
    reader, notes = export(folder(tmp_path / "m", gpt2(use_bias=False)))
    found = tensors(reader)
    biases = [name for name in found if name.endswith(".bias")]
    assert len(biases) == 6 * 2 + 1
    assert found["blk.1.attn_qkv.bias"].shape == (42,)
    assert not any(found[name].any() for name in biases)
    assert any("no biases" in note for note in notes)


@pytest.mark.parametrize(
    ("type", "kind", "bound"),
    # Relative to the largest number of a row of 32: half a step of 127, half a unit of 11 and of 8 bits, nothing.
    [
        ("q8_0", Kind.Q8_0, 1.1 / 254),
        ("f16", Kind.F16, 2**-11),
        ("bf16", Kind.BF16, 2**-8),
        ("f32", Kind.F32, 0),
    ],
)
def test_matrices_are_stored_as_the_type_says_and_nothing_else_is(
    tmp_path: Path, type: str, kind: Kind, bound: float
):
    model = folder(tmp_path / "m", gpt2(n_embd=32, n_inner=96))
    exact, rounded = tensors(export(model)[0]), tensors(export(model, type)[0])
    for name, stored in kinds(export(model.rename(tmp_path / "again"), type)[0]).items():
        is_matrix = exact[name].ndim == 2 and not name.startswith("position_embd")
        assert stored == (kind if is_matrix else Kind.F32), name
        largest = np.abs(exact[name]).reshape(-1, 32).max(-1, keepdims=True) if is_matrix else 0
        error = np.abs(exact[name] - rounded[name]).reshape(-1, 32 if is_matrix else 1)
        assert (error <= bound * largest).all(), name


def test_rows_that_are_no_multiple_of_a_block_stay_as_they_are_and_it_is_said(tmp_path: Path):
    model = folder(tmp_path / "m", gpt2(n_embd=32, n_inner=20), dtype="bfloat16")
    reader, notes = export(model, "q8_0")
    assert kinds(reader)["blk.0.ffn_down.weight"] == Kind.BF16
    assert kinds(reader)["blk.0.ffn_up.weight"] == Kind.Q8_0
    assert notes[0].startswith("2 matrices are stored as they were")
    assert "blk.0.ffn_down.weight have 20" in notes[0]


@pytest.mark.parametrize(("type", "value"), [("f16", 1e6), ("q8_0", 1e8)])
def test_a_value_beyond_the_type_is_refused_and_nothing_is_left(
    tmp_path: Path, type: str, value: float
):
    config = gpt2(n_embd=32)
    flat = {n: np.zeros(axes.shape(w, config.axes), "f4") for n, w in config.tensors().items()}
    flat["blocks.1.mlp.up.kernel"][3, 5] = value
    specs = [checkpoint.TensorSpec(name, x.shape, "float32") for name, x in flat.items()]
    checkpoint.write(
        tmp_path / "m", config=config, specs=specs, read=lambda spec: [flat[spec.name]]
    )
    with pytest.raises(ConvertError, match=r"blk\.1\.ffn_up\.weight: 1e\+0\d does not fit"):
        export(tmp_path / "m", type)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_everything_that_llama_cpp_computes_otherwise_is_named_at_once(tmp_path: Path):
    config = gpt2(
        activation_function="relu", scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True
    )
    big = Tokenizer.utf8()
    with pytest.raises(ConvertError) as caught:
        export(folder(tmp_path / "m", config, tokenizer=big))
    for part in ("relu", "scale_attn_weights", "inverse_layer_idx", "257 tokens, the model 37"):
        assert part in str(caught.value)


@pytest.mark.parametrize("activation", ["silu", "quick_gelu"])
def test_an_activation_that_llama_cpp_lacks_is_refused(tmp_path: Path, activation: str):
    with pytest.raises(ConvertError, match=activation):
        export(folder(tmp_path / "m", gpt2(activation_function=activation)))


def test_the_exact_gelu_is_exported_with_a_note(tmp_path: Path):
    _, notes = export(folder(tmp_path / "erf", gpt2(activation_function="gelu")))
    assert any("erf" in note for note in notes)
    _, notes = export(folder(tmp_path / "tanh", gpt2(activation_function="gelu_fast")))
    assert not any("erf" in note for note in notes)


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path):
    model = folder(tmp_path / "m", gpt2(vocab_size=300), tokenizer=Tokenizer.utf8())
    files = [
        convert.export(model, to="gguf", out=tmp_path / f"{i}.gguf", type="q8_0") for i in (1, 2)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_only_another_gguf_file_is_replaced(tmp_path: Path):
    model = folder(tmp_path / "m", gpt2())
    out = tmp_path / "out"
    out.write_bytes(b"something else")
    with pytest.raises(ConvertError, match="remove it yourself"):
        convert.export(model, to="gguf", out=out, overwrite=True)
    out.write_bytes(b"GGUF\3\0\0\0")
    convert.export(model, to="gguf", out=out, overwrite=True)
    assert tensors(gguf.GGUFReader(out))
    assert not gguf_target.is_own(model)


@pytest.mark.parametrize("type", ["keep", "q8_0"])
def test_the_memory_is_that_of_a_part_and_not_of_a_matrix(tmp_path: Path, type: str):
    config = gpt2(vocab_size=20_000, n_embd=1024, n_layer=1, n_inner=8192)
    model = folder(tmp_path / "m", config)
    tracemalloc.start()
    try:
        export(model, type)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32e6  # the embedding is 82 MB, ffn_down, which is turned, 34 MB


def test_the_command_writes_a_file_and_keeps_type_for_gguf(tmp_path: Path):
    folder(tmp_path / "m", gpt2(n_embd=32))
    flags = ("--model=m", "--out=m.gguf", "--type=q8_0")
    done = hf.run("convert.export", "--to=gguf", *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "m.gguf\n"), done.stderr
    assert done.stderr.startswith("note: the folder has no tokenizer")
    assert kinds(gguf.GGUFReader(tmp_path / "m.gguf"))["token_embd.weight"] == Kind.Q8_0
    refused = hf.run("convert.export", "--to=hf", *flags, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--type is for --to=gguf" in refused.stderr


# The tokenizer


def test_a_byte_level_bpe_is_taken_over_with_rows_to_spare(tmp_path: Path):
    tokenizer = Tokenizer.train(["the flax mill mills flax", "naïve"] * 3, 270)
    config = gpt2(vocab_size=280, eos_token_id=tokenizer.eos_id)
    found = keys(export(folder(tmp_path / "m", config, tokenizer=tokenizer))[0])
    spec = json.loads(tokenizer.files()["tokenizer.json"])
    n = tokenizer.vocab_size
    assert n < 280
    by_id = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.tokens"][: n - 1] == by_id[: n - 1]
    assert found["tokenizer.ggml.tokens"][n - 1 :] == [
        "<|endoftext|>",
        *(f"[PAD{i}]" for i in range(n, 280)),
    ]
    types = [TokenType.NORMAL] * (n - 1) + [TokenType.CONTROL] + [TokenType.UNUSED] * (280 - n)
    assert found["tokenizer.ggml.token_type"] == types
    assert found["tokenizer.ggml.merges"] == [" ".join(m) for m in spec["model"]["merges"]]
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"] == n - 1
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_gpt2s_own_files_are_a_vocabulary(tmp_path: Path, testdata: Path):
    tokenizer = Tokenizer.from_bpe_files(
        testdata / "gpt2_encoder.json", testdata / "gpt2_vocab.bpe"
    )
    config = gpt2(vocab_size=50304, bos_token_id=50256, eos_token_id=50256)
    model = folder(tmp_path / "m", config, tokenizer=tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "vocab.json").write_bytes((testdata / "gpt2_encoder.json").read_bytes())
    (model / "merges.txt").write_bytes((testdata / "gpt2_vocab.bpe").read_bytes())
    found = keys(export(model)[0])
    vocab = json.loads((testdata / "gpt2_encoder.json").read_text())
    assert found["tokenizer.ggml.tokens"][:50257] == list(vocab)
    assert found["tokenizer.ggml.tokens"][50257:] == [f"[PAD{i}]" for i in range(50257, 50304)]
    lines = (testdata / "gpt2_vocab.bpe").read_text().splitlines()
    assert found["tokenizer.ggml.merges"] == lines[1:]
    assert found["tokenizer.ggml.token_type"][50255:50258] == [1, 3, 5]
    assert found["tokenizer.ggml.eos_token_id"] == 50256


def test_added_tokens_are_control_or_the_users_own(tmp_path: Path):
    backend = tokenizers.Tokenizer(
        models.BPE(
            {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())} | {"ab": 256},
            [("a", "b")],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.add_tokens(["mine"])
    model = folder(tmp_path / "m", gpt2(vocab_size=259), tokenizer=Tokenizer(backend, eos="<s>"))
    settings = {"unk_token": "<s>", "pad_token": {"content": "mine"}, "chat_template": "{{ x }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    found = keys(export(model)[0])
    assert found["tokenizer.ggml.tokens"][256:] == ["ab", "<s>", "mine"]
    assert found["tokenizer.ggml.token_type"][256:] == [1, 3, 4]
    assert found["tokenizer.ggml.unknown_token_id"] == 257
    assert found["tokenizer.ggml.padding_token_id"] == 258
    assert found["tokenizer.chat_template"] == "{{ x }}"


def test_characters_and_bytes_become_the_tokenizer_of_longest_tokens(tmp_path: Path):
    model = folder(tmp_path / "c", gpt2(vocab_size=8), tokenizer=Tokenizer.characters("a\\ b\n~"))
    reader, notes = export(model)
    found = keys(reader)
    assert found["tokenizer.ggml.model"] == "rwkv"
    assert found["tokenizer.ggml.tokens"] == [
        *("\\x0a", " ", "\\x5c", "a", "b", "~"),
        *("\\x0a\\xff[PAD6]", "\\x0a\\xff[PAD7]"),
    ]
    assert (
        "tokenizer.ggml.eos_token_id" not in found
    )  # and so llama.cpp takes none, as it would elsewhere
    assert notes == []
    found = keys(
        export(folder(tmp_path / "b", gpt2(vocab_size=257), tokenizer=Tokenizer.utf8()))[0]
    )
    assert found["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert sorted(found["tokenizer.ggml.tokens"])[-3:] == ["|", "}", "~"]
    assert found["tokenizer.ggml.tokens"].count("\\xff") == 1
    assert found["tokenizer.ggml.eos_token_id"] == 256


def bpe(pre: Any, *, normalizer: Any = None, **model: Any) -> tokenizers.Tokenizer:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"ab": 256, "abc": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")], **model))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def split(regex: str, behavior: str = "isolated", **kinds: Any) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    first = pre_tokenizers.Split(tokenizers.Regex(regex), behavior, **kinds)
    return pre_tokenizers.Sequence([first, level])


@pytest.mark.parametrize(
    ("backend", "pre"),
    [(bpe(split(GPT2_REGEX)), "gpt-2"), (bpe(split(O200K_REGEX)), "gpt-4o")],
)
def test_a_split_that_llama_cpp_has_is_known_by_its_expression(
    tmp_path: Path, backend: tokenizers.Tokenizer, pre: str
):
    model = folder(tmp_path / "m", gpt2(vocab_size=258), tokenizer=Tokenizer(backend))
    reader, notes = export(model)
    assert keys(reader)["tokenizer.ggml.pre"] == pre
    assert "takes token 11" in notes[0]


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (Tokenizer(bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))), "pre_tokenizer"),
        (Tokenizer(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))), "pre_"),
        (Tokenizer(bpe(split(r"\p{L}+|."))), "pre_tokenizer"),
        (Tokenizer(bpe(split(GPT2_REGEX, "removed"))), "pre_tokenizer"),
        (Tokenizer(bpe(split(GPT2_REGEX, invert=True))), "pre_tokenizer"),
        (Tokenizer(bpe(PLAIN, normalizer=normalizers.NFC())), "normalizer is NFC"),
        (Tokenizer(bpe(PLAIN, ignore_merges=True)), "no merges lead to 'abc'"),
        (Tokenizer(bpe(PLAIN, end_of_word_suffix="</w>")), "end_of_word_suffix"),
        (Tokenizer.characters("naïve"), "not all ASCII"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_left_out_and_it_is_said(
    tmp_path: Path, tokenizer: Tokenizer, why: str
):
    reader, notes = export(folder(tmp_path / "m", gpt2(vocab_size=300), tokenizer=tokenizer))
    found = keys(reader)
    assert found["tokenizer.ggml.model"] == "none"
    assert found["gpt2.vocab_size"] == 300
    assert not any(name.startswith("tokenizer.ggml.t") for name in found)
    assert why in notes[0]
    assert "token ids" in notes[0]


def test_a_damaged_tokenizer_is_refused(tmp_path: Path):
    model = folder(tmp_path / "m", gpt2())
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConvertError, match="is not a tokenizer"):
        export(model)


# GPT-OSS

CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers of MXFP4 blocks as a checkpoint stores them: byte b has number 2b low and 2b + 1 high."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1)
    numbers = CODES[codes].reshape(*scales.shape, 32) * np.exp2(scales[..., None] - np.float32(127))
    return numbers.reshape(*scales.shape[:-1], -1)


def test_the_nibbles_are_those_of_the_halves():
    upwards = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    downwards = [0xEF, 0xCD, 0xAB, 0x89, 0x67, 0x45, 0x23, 0x01]
    blocks = np.array([[*upwards, *downwards]], np.uint8)
    packed = weights.repack_mxfp4(blocks, np.array([127], np.uint8))
    assert packed.tolist() == [[127, *(code + 16 * (15 - code) for code in range(16))]]
    assert gguf.quants.dequantize(packed, Kind.MXFP4).tolist() == [[*CODES, *CODES[::-1]]]


def test_gpt_oss_keeps_every_packed_number(tmp_path: Path):
    config = GptOssConfig(**GPT_OSS, quantization="mxfp4")
    model = folder(tmp_path / "m", config, dtype="bfloat16")
    reader, notes = export(model)
    ours, stored = checkpoint.open(model).tensors, tensors(reader)
    assert not any("YaRN" in note for note in notes)
    assert keys(reader)["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    for i in range(3):
        moe, blk = f"blocks.{i}.moe.", f"blk.{i}."
        blocks, scales = ours[f"{moe}gate_up.kernel.blocks"], ours[f"{moe}gate_up.kernel.scales"]
        rows = decoded(blocks, scales)  # EF2D
        assert rows.shape == (9, 96, 2, 64)
        experts = {
            "ffn_gate_exps": rows[:, :, 0],
            "ffn_up_exps": rows[:, :, 1],
            "ffn_down_exps": decoded(
                ours[f"{moe}down.kernel.blocks"], ours[f"{moe}down.kernel.scales"]
            ),
        }
        for name, expected in experts.items():
            assert kinds(reader)[f"{blk}{name}.weight"] == Kind.MXFP4
            np.testing.assert_array_equal(stored[f"{blk}{name}.weight"], expected)


def test_gpt_oss_keeps_every_dense_number(tmp_path: Path):
    model = folder(tmp_path / "m", GptOssConfig(**GPT_OSS), dtype="bfloat16")
    reader, _ = export(model)
    stored = tensors(reader)
    for name, expected in as_gpt_oss(checkpoint.open(model).tensors).items():
        np.testing.assert_array_equal(stored.pop(name), expected.astype(np.float32), err_msg=name)
    assert not stored
    f32 = {name for name, kind in kinds(reader).items() if kind == Kind.F32}
    assert {name.partition(".")[2].lstrip("0123456789.") for name in f32 if "blk.1." in name} == {
        *("attn_norm.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
        *("attn_sinks.weight", "post_attention_norm.weight", "ffn_gate_inp.weight"),
        *("ffn_gate_inp.bias", "ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_down_exps.bias"),
    }
    assert kinds(reader)["blk.1.ffn_up_exps.weight"] == Kind.BF16


def as_gpt_oss(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A dense GPT-OSS under GGUF's names and in its layouts, spelled out by hand."""
    result = {
        "token_embd.weight": ours["wte.embedding"],
        "output_norm.weight": ours["norm_f.scale"],
        "output.weight": ours["lm_head.kernel"],
    }
    for i in range(3):
        a, m = f"blocks.{i}.attn.", f"blocks.{i}.moe."
        rows = {
            "attn_norm.weight": ours[f"blocks.{i}.norm_1.scale"],
            "post_attention_norm.weight": ours[f"blocks.{i}.norm_2.scale"],
            "attn_output.weight": ours[f"{a}out.kernel"].reshape(48, 64).T,
            "attn_output.bias": ours[f"{a}out.bias"],
            "attn_sinks.weight": ours[f"{a}sinks"],
            "ffn_gate_inp.weight": ours[f"{m}router.kernel"].T,
            "ffn_gate_inp.bias": ours[f"{m}router.bias"],
            "ffn_gate_exps.weight": ours[f"{m}gate_up.kernel"][..., 0].transpose(0, 2, 1),
            "ffn_up_exps.weight": ours[f"{m}gate_up.kernel"][..., 1].transpose(0, 2, 1),
            "ffn_gate_exps.bias": ours[f"{m}gate_up.bias"][..., 0],
            "ffn_up_exps.bias": ours[f"{m}gate_up.bias"][..., 1],
            "ffn_down_exps.weight": ours[f"{m}down.kernel"].transpose(0, 2, 1),
            "ffn_down_exps.bias": ours[f"{m}down.bias"],
        }
        for part in "qkv":
            rows[f"attn_{part}.weight"] = ours[f"{a}{part}.kernel"].reshape(64, -1).T
            rows[f"attn_{part}.bias"] = ours[f"{a}{part}.bias"].reshape(-1)
        result |= {f"blk.{i}.{name}": array for name, array in rows.items()}
    return result


def test_gpt_oss_has_the_keys_that_llama_cpp_reads(tmp_path: Path):
    found = keys(export(folder(tmp_path / "m", GptOssConfig(**GPT_OSS)))[0])
    assert {name.removeprefix("gpt-oss."): x for name, x in found.items() if "oss." in name} == {
        "context_length": 131,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 3,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.key_length": 6,
        "attention.value_length": 6,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "attention.sliding_window": 7,
        "expert_count": 9,
        "expert_used_count": 4,
        "expert_feed_forward_length": 96,
        "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 40,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "vocab_size": 97,
    }
    assert found["general.architecture"] == "gpt-oss"


def test_a_gpt_oss_that_llama_cpp_computes_otherwise_is_refused(tmp_path: Path):
    config = GptOssConfig(
        **GPT_OSS,
        layer_types=("full_attention",) * 3,
        swiglu_limit=0.5,
        rope_beta_fast=16.0,
    )
    with pytest.raises(ConvertError, match=r"layer_types .*swiglu_limit=0\.5.*beta_fast=16"):
        export(folder(tmp_path / "m", config))


def test_yarn_untruncated_is_exported_with_a_note_of_where_it_blends(tmp_path: Path):
    published = {"head_dim": 64, "initial_context_length": 4096, "rope_truncate": False}
    _, notes = export(folder(tmp_path / "m", GptOssConfig(**{**GPT_OSS, **published})))
    assert "between dimensions 8.09 and 17.40, llama.cpp's between 8 and 18" in notes[0]
    _, notes = export(
        folder(tmp_path / "same", GptOssConfig(**{**GPT_OSS, "rope_truncate": False}))
    )
    assert not any(
        "YaRN" in note for note in notes
    )  # -0.41 and 0.47 of 3: rounding changes nothing


def test_a_tied_gpt_oss_stores_its_head(tmp_path: Path):
    config = GptOssConfig(**GPT_OSS, tie_word_embeddings=True)
    found = tensors(export(folder(tmp_path / "m", config))[0])
    np.testing.assert_array_equal(found["output.weight"], found["token_embd.weight"])


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path):
    config = GptOssConfig(**GPT_OSS, quantization="mxfp4")
    model = checkpoint.open(folder(tmp_path / "m", config))
    name = "blocks.2.moe.down.kernel.scales"
    damaged = {**model.tensors, name: np.full_like(model.tensors[name], 255)}
    with pytest.raises(ConvertError, match=r"blk\.2\.ffn_down_exps\.weight: a scale is 255"):
        gguf_target.write(
            dataclasses.replace(model, tensors=damaged), tmp_path / "x", lambda n: None
        )
