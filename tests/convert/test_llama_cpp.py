# ruff: noqa: RUF001 - characters that look alike are what the text tests are about
"""GGUF files in llama.cpp itself: the same tokens of a text, the same continuation, the same logits (`make parity`).

llama.cpp looks GELU up in a table of float16, so the logits of a GPT-2 are also compared with a reference that does the
same: what is left then is the order of summation. Half and eight-bit matrices meet activations that llama.cpp rounds to
the same type, so those bounds are of its arithmetic and not of the file, which `test_gguf` compares number by number.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
import core
import llama_cpp_peer
import reference
import tiny
from core import checkpoint
from core.config import GPT2Config
from core.engine import Completion, Request
from core.models import Model
from core.sampling import Sampling
from core.tokenizer import Tokenizer

pytestmark = pytest.mark.parity

EXACT = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "n_inner", "untied", "epsilon", "no_bias")


def model_folder(path: Path, config: GPT2Config, tokenizer: Tokenizer | None = None) -> Path:
    """A tiny GPT-2 with weights so large that every mistake shows."""
    checkpoint.save(path, config, tiny.params(Model(config)), tokenizer=tokenizer)
    return path


def exported(model: Path, type: str = "keep") -> Path:
    out = model.with_name(f"{model.name}-{type}.gguf")
    return convert.export(model, to="gguf", out=out, type=type)


def tabled(gelu: Any) -> Any:
    """GELU as llama.cpp looks it up (ggml-cpu/vec.h: GGML_GELU_FP16)."""

    def look_up(x: np.ndarray) -> np.ndarray:
        y = gelu(x.astype(np.float16).astype(np.float64)).astype(np.float16)
        return np.where(x <= -10, 0, np.where(x >= 10, x, y.astype(np.float64)))

    return look_up


@pytest.mark.parametrize("variant", [*EXACT, "gelu"])
def test_the_logits_are_those_of_the_reference_with_llama_cpps_gelu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
):
    model = model_folder(tmp_path / "m", tiny.config(**tiny.VARIANTS[variant]))
    config, params = checkpoint.open(model).config, checkpoint.open(model).params()
    assert isinstance(config, GPT2Config)
    tokens = np.asarray(tiny.tokens(config, 61))
    table = tabled(reference.ACTIVATIONS["gelu_new"])
    monkeypatch.setitem(reference.ACTIVATIONS, config.activation_function, table)
    expected_TV = reference.logits(config, params, tokens[None])[0]
    with llama_cpp_peer.opened(exported(model)) as llama:
        error_TV = np.abs(llama.logits(tokens.tolist()) - expected_TV)
    assert (
        error_TV.max() < 3e-4
    )  # found: 7e-5, where a sum's last bit takes another row of the table
    assert error_TV.mean() < 2e-6  # found: 4e-7


@pytest.mark.parametrize("variant", EXACT)
def test_llama_cpp_continues_as_the_engine_does(tmp_path: Path, variant: str):
    config = tiny.config(**(tiny.VARIANTS[variant] | {"n_positions": 131}))
    params = tiny.params(Model(config))
    params["wpe"]["embedding"] *= 8  # or it says the same few tokens again and again
    checkpoint.save(tmp_path / "m", config, params)
    prompt = [3, 14, 15, 92, 65]
    request = Request(prompt, Sampling(max_new_tokens=110, temperature=0))
    (ours,) = core.Engine(Model(config), params).complete([request])
    assert isinstance(ours, Completion)
    with llama_cpp_peer.opened(exported(tmp_path / "m")) as llama:
        theirs, logits_TV = llama.continued(prompt, 110)
    assert list(ours.tokens) == theirs
    assert len(set(theirs)) > 20
    second_T, first_T = np.sort(logits_TV)[:, -2:].T
    assert (first_T - second_T).min() > 1e-4  # not by a last bit


@pytest.mark.parametrize(
    ("type", "bound"), [("f32", 3e-3), ("f16", 5e-3), ("bf16", 3e-2), ("q8_0", 1e-1)]
)
def test_a_narrower_type_costs_what_its_bits_cost(tmp_path: Path, type: str, bound: float):
    model = model_folder(tmp_path / "m", tiny.config(n_embd=32))
    config, params = tiny.config(n_embd=32), checkpoint.open(model).params()
    tokens = tiny.tokens(config, 61)
    ours_TV = np.asarray(Model(config).apply(params, tokens[None]))[0]
    with llama_cpp_peer.opened(exported(model, type)) as llama:
        theirs_TV = llama.logits(tokens.tolist())
    assert np.abs(theirs_TV - ours_TV).max() < bound  # of logits with a deviation of 0.57
    assert (theirs_TV.argmax(1) == ours_TV.argmax(1)).mean() > 0.9


# Text

TRICKY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\n x\n",
    "\t\ttabs\t",
    "a\r\nb\r\r\n",
    "trailing   ",
    "   leading",
    "I'm he's we've they'll you'd isn't I'M HE'S",
    "'s 't 're 've 'm 'll 'd 'x ''s",
    "don’t “quote” ‘it’",
    "3.14159 1,000,000 1e-10 0x1F ½ ² Ⅷ ٣٤٥ १२३ 零一二",
    "naïve café Ångström Straße İstanbul ﬁ ǅ",
    "e\u0301 n\u0303 a\u0308\u0308 \u0301 alone",
    "日本語のテキスト、漢字とカナ。",
    "한국어 문장 시험",
    "Привет, мир! Ёлка",
    "שלום עולם مرحبا بالعالم",
    "हिन्दी में कुछ পাঠ্য ไทย",
    "😀👍🏽👩‍👩‍👧‍👦🇩🇪 🏳️‍🌈",
    "zero\u200bwidth\u200djoin\ufeffbom\u2060",
    "no\u00a0break\u202fthin\u2009space\u3000ideographic",
    "line\u2028sep\u2029para\u0085next\x0bvt\x0cff",
    "\x00\x01\x1b[0m\x7f\x80\x9f",
    "<|endoftext|>",
    "before<|endoftext|>after <|endoftext|> <|endoftext|><|endoftext|>",
    "<|endoftext|",
    "<|ENDOFTEXT|> <|im_start|>",
    "https://example.com/a?b=c&d=%20#e user@example.org",
    "def f(x):\n    return {'a': x**2}  # comment\n",
    "!!!???...---___===+++***///\\\\\\",
    "a_b-c.d,e;f:g'h\"i(j)k[l]m{n}o<p>q",
    "x" * 300,
    " " * 70 + "end",
    "ab " * 100,
    "\U0001f9ff\U0010fffd\ue000\ufffd",
    "ΑΒΓ αβγ ς σ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ℵ ℃ №",
]


def strings(count: int) -> list[str]:
    """The tricky strings and random ones: characters and pieces of several kinds, thrown together."""
    draw = random.Random(7)
    ranges = [(32, 127), (0, 64), (160, 592), (0x300, 0x370), (0x370, 0x600), (0x900, 0xE80)]
    ranges += [(0x1F00, 0x2200), (0x2000, 0x2070), (0x3000, 0x3400), (0x4E00, 0x4F00)]
    ranges += [(0xAC00, 0xAD00), (0x1F300, 0x1F700), (0x1D400, 0x1D800)]
    pieces = [" ", "  ", "\n", "'s", "'ll", "the", " flax", "12", "<|endoftext|>", "\u00a0", "…"]
    result = list(TRICKY)
    while len(result) < count:
        parts = []
        for _ in range(draw.randint(1, 25)):
            low, high = draw.choice(ranges)
            parts.append(draw.choice([chr(draw.randrange(low, high)), draw.choice(pieces)]))
        result.append("".join(parts))
    return result


def test_llama_cpp_cuts_text_as_gpt2s_tokenizer_does(tmp_path: Path, testdata: Path):
    files = testdata / "gpt2_encoder.json", testdata / "gpt2_vocab.bpe"
    tokenizer = Tokenizer.from_bpe_files(*files)
    config = tiny.config(vocab_size=50304, eos_token_id=50256, n_layer=1)
    model = model_folder(tmp_path / "m", config, tokenizer)
    with llama_cpp_peer.opened(exported(model)) as llama:
        wrong = [s for s in strings(400) if llama.encode(s) != tokenizer.encode(s)]
        assert llama.eos_id == 50256
        assert wrong == []


def test_llama_cpp_cuts_text_as_a_trained_tokenizer_does(tmp_path: Path):
    tokenizer = Tokenizer.train(["the flax mill mills the flax", "naïve 日本語 12 's"] * 5, 300)
    model = model_folder(tmp_path / "m", tiny.config(vocab_size=310), tokenizer)
    with llama_cpp_peer.opened(exported(model)) as llama:
        assert [s for s in strings(200) if llama.encode(s) != tokenizer.encode(s)] == []
        assert llama.eos_id == tokenizer.eos_id


def test_llama_cpp_cuts_text_into_bytes(tmp_path: Path):
    tokenizer = Tokenizer.utf8()
    model = model_folder(tmp_path / "m", tiny.config(vocab_size=260), tokenizer)
    with llama_cpp_peer.opened(exported(model)) as llama:
        for text in strings(200):
            assert llama.encode(text) == tokenizer.encode(text), text
            assert llama.decode(llama.encode(text)).decode() == text
        assert llama.eos_id == 256


def test_llama_cpp_cuts_text_into_characters_and_ends_at_none_of_them(tmp_path: Path):
    tokenizer = Tokenizer.characters("".join(map(chr, range(32, 127))) + "\n")
    model = model_folder(tmp_path / "m", tiny.config(), tokenizer)
    text = "First Citizen:\nBefore we proceed any further, hear me speak. \\n \\x41 {a|b}~"
    with llama_cpp_peer.opened(exported(model)) as llama:
        assert llama.encode(text) == tokenizer.encode(text)
        assert llama.decode(tokenizer.encode(text)).decode() == text
        assert llama.encode("[PAD96]\u00e9é日")[:7] == tokenizer.encode("[PAD96]")  # and it ends
        assert llama.eos_id == -1


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path: Path):
    model = model_folder(tmp_path / "m", tiny.config())
    with llama_cpp_peer.opened(exported(model)) as llama:
        assert llama.logits([1, 2, 3]).shape == (3, 97)
        assert llama.eos_id == -1


# GPT-OSS


def gpt_oss(
    *, head_dim: int = 6, experts_per_token: int = 4, truncate: bool = True, **rope: Any
) -> Any:
    """A tiny GptOssForCausalLM in float32: sizes pairwise different, weights so large that every mistake shows."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = transformers.GptOssConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=head_dim,
        num_local_experts=9,
        num_experts_per_tok=experts_per_token,
        max_position_embeddings=256,
        sliding_window=7,
        rms_norm_eps=1e-3,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": truncate,
            "original_max_position_embeddings": 40,
            **rope,
        },
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.GptOssForCausalLM(config).float().eval()
    random_numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random_numbers)
            is_matrix = parameter.ndim > 1 and not name.endswith("bias")
            parameter.copy_(noise * (0.15 if is_matrix else 0.3) + ("norm" in name))
    return model


def hf_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


@pytest.mark.parametrize("head_dim", [6, 64])
def test_llama_cpp_continues_as_transformers_gpt_oss_does(tmp_path: Path, head_dim: int):
    model = gpt_oss(head_dim=head_dim)
    model.save_pretrained(tmp_path / "hf")
    gguf = exported(convert.convert(tmp_path / "hf", out=tmp_path / "m"))
    prompt = [3, 14, 15, 92, 65]
    with llama_cpp_peer.opened(gguf) as llama:
        tokens, theirs_TV = llama.continued(prompt, 90)
    expected_TV = hf_logits(model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    np.testing.assert_allclose(theirs_TV, expected_TV, atol=1e-4)  # found: 1e-5
    assert expected_TV.argmax(1).tolist() == tokens
    assert len(set(tokens)) > 20


def test_what_llama_cpp_leaves_of_an_untruncated_yarn_is_no_more_than_said(tmp_path: Path):
    published = {"rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    model = gpt_oss(head_dim=64, truncate=False, **published)
    model.save_pretrained(tmp_path / "hf")
    notes: list[str] = []
    folder = convert.convert(tmp_path / "hf", out=tmp_path / "m")
    gguf = convert.export(folder, to="gguf", out=tmp_path / "m.gguf", on_note=notes.append)
    tokens = np.random.default_rng(0).integers(0, 97, 90).tolist()
    with llama_cpp_peer.opened(gguf) as llama:
        error_TV = np.abs(llama.logits(tokens) - hf_logits(model, tokens))
    assert any("truncate=false" in note for note in notes)
    assert (
        1e-3 < error_TV.max() < 0.1
    )  # found: 0.018 of a deviation of 1.3; with truncate=true 1e-5


CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def packed(model: Any, folder: Path) -> Path:
    """Draws the experts anew as MXFP4: published names and bytes in `folder`, the same numbers in `model`."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    state = model.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(121, 125, blocks.shape[:-1], np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
        numbers = CODES[codes] * np.exp2(scales[..., None] - np.float32(127))
        dense = numbers.reshape(experts, outputs, inputs).transpose(0, 2, 1)
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(dense)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("experts_per_token", [4, 9])
def test_packed_experts_are_transformers_numbers_in_llama_cpp(
    tmp_path: Path, experts_per_token: int
):
    model = gpt_oss(experts_per_token=experts_per_token)
    gguf = exported(convert.convert(packed(model, tmp_path / "hf"), out=tmp_path / "m"))
    tokens = np.random.default_rng(0).integers(0, 97, 90).tolist()
    with llama_cpp_peer.opened(gguf) as llama:
        theirs_TV = llama.logits(tokens)
    error_TV = np.abs(theirs_TV - hf_logits(model, tokens))
    # llama.cpp multiplies packed numbers with activations of eight bits, which moves logits with a deviation of 1.2 by
    # 0.02; where all experts are asked, no router changes its mind over it.
    assert np.median(error_TV) < 0.05
    assert experts_per_token == 4 or error_TV.max() < 0.4  # found: 0.18
