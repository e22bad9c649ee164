"""llm.c's model files: the same folder as Hugging Face's file gives, and every other file of llm.c's told apart."""

import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_checkpoints as hf
import openai_checkpoints as openai
from convert import ConvertError, convert
from convert.sources import llmc, open_source
from convert.tables import llmc as table
from core import checkpoint
from core.config import PRESETS

V, P, D, L, N = openai.V, openai.P, openai.D, openai.L, openai.N
PADDED = 128
FP32, BF16 = (3, np.dtype("<f4")), (5, np.dtype(ml_dtypes.bfloat16))
HF_CONFIG = {
    "model_type": "gpt2",
    "vocab_size": V,
    "n_positions": P,
    "n_embd": D,
    "n_head": N,
    "n_layer": L,
}

# What `write_tensors` of llm.c's train_gpt2.py writes, in its order; torch's Linear is the transpose of a Conv1D.
KINDS = [
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
]


def model(
    weights: Mapping[str, np.ndarray], version: int, dtype: np.dtype, padding: float = 0
) -> bytes:
    """The file that llm.c's `write_model` makes of a GPT-2 in Hugging Face's names."""
    header = struct.pack("<8i", 20240326, version, P, V, L, N, D, PADDED).ljust(1024, b"\0")
    rows = np.full((PADDED - V, D), padding, np.float32)
    arrays = [np.concatenate([weights["wte.weight"], rows]), weights["wpe.weight"]]
    for kind in KINDS:
        for i in range(L):
            array = weights[f"h.{i}.{kind}"]
            arrays.append(array.T if array.ndim == 2 else array)
    arrays += [weights["ln_f.weight"], weights["ln_f.bias"]]
    return header + b"".join(array.astype(dtype).tobytes() for array in arrays)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return openai.as_hf(openai.tensors())


@pytest.fixture(scope="module")
def content(weights: dict[str, np.ndarray]) -> bytes:
    return model(weights, *FP32)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "gpt2_tiny.bin"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("version", "dtype"), [FP32, BF16])
def test_a_model_is_the_folder_that_hugging_faces_file_gives(
    tmp_path: Path, weights: dict[str, np.ndarray], version: int, dtype: np.dtype
):
    (tmp_path / "x.bin").write_bytes(model(weights, version, dtype))
    convert(tmp_path / "x.bin", out=tmp_path / "llmc")
    stored = {name: array.astype(dtype) for name, array in weights.items()}
    convert(hf.write(tmp_path / "src", stored, config=HF_CONFIG, files={}), out=tmp_path / "hf")
    ours, theirs = hf.digests(tmp_path / "llmc"), hf.digests(tmp_path / "hf")
    assert ours.pop("manifest.json") != theirs.pop("manifest.json")
    assert ours == theirs


def test_a_layers_part_of_a_piece_is_mapped_and_not_copied(file: Path, weights):
    source = open_source(file)
    assert (source.format, len(source.tensors)) == ("llmc", 12 * L + 4)
    part = source.tensors["fcprojw.1"].read()
    assert not part.flags.owndata
    assert hf.same_bits(part, np.ascontiguousarray(weights["h.1.mlp.c_proj.weight"].T))


def test_rows_beyond_the_vocabulary_are_left_out_and_the_user_hears_of_it(tmp_path: Path, weights):
    path = tmp_path / "x.bin"
    path.write_bytes(model(weights, *FP32))
    assert open_source(path).notes == (
        "31 rows of wte beyond vocab_size=97 are left out: padding, all zero",
    )
    out = convert(path, out=tmp_path / "out")
    assert checkpoint.open(out).manifest["source"]["notes"] == list(open_source(path).notes)
    path.write_bytes(model(weights, *BF16, padding=0.5))
    assert "padding, not zero, though llm.c never uses them" in open_source(path).notes[0]


def test_the_published_sizes_are_the_published_config():
    sizes = {"max_seq_len": 1024, "vocab_size": 50257, "num_layers": 12, "num_heads": 12}
    config = table.read_config({**sizes, "channels": 768, "padded_vocab_size": 50304})
    assert config == PRESETS["gpt2"]


@pytest.mark.parametrize(("change", "state"), [(-1, "cut short: "), (1, "")])
def test_a_file_of_another_size_than_its_header_says_is_refused(
    file: Path, content: bytes, change: int, state: str
):
    file.write_bytes((content + b"\0")[: len(content) + change])
    expected = (
        f"{state}found {len(content) + change} bytes, expected {len(content)} from its header"
    )
    with pytest.raises(ConvertError, match=expected):
        open_source(file)


@pytest.mark.parametrize(
    ("magic", "what"),
    [
        (20240327, "debug state"),
        (20240328, "tokenizer"),
        (20240520, "training tokens"),
        (20240522, "evaluation set"),
        (20240527, "optimizer state"),
        (20240801, "Llama 3 training tokens"),
        (20240803, "Llama 3 model"),
    ],
)
def test_llmcs_other_files_are_told_apart(file: Path, content: bytes, magic: int, what: str):
    file.write_bytes(struct.pack("<i", magic) + content[4:])
    with pytest.raises(ConvertError, match=f"llm.c's {what}; expected its GPT-2, which begins"):
        open_source(file)


def test_no_file_of_llmcs_is_refused_when_it_is_said_to_be_one(file: Path, content: bytes):
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(ConvertError, match=r"no file of llm\.c's \(0\)"):
        open_source(file, format="llmc")
    file.write_bytes(content[:1000])
    with pytest.raises(ConvertError, match="cut short: found 1000 bytes, a header has 1024"):
        open_source(file)


def with_header(content: bytes, numbers: Mapping[str, int]) -> bytes:
    names = "magic version max_seq_len vocab_size num_layers num_heads channels padded_vocab_size"
    header = dict(enumerate(struct.unpack("<256i", content[:1024])))
    header |= {i: numbers[name] for i, name in enumerate(names.split()) if name in numbers}
    return struct.pack("<256i", *header.values()) + content[1024:]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        # Before May 2024 version 3 was bfloat16 with float32 norms at the end, and no padding.
        ({"padded_vocab_size": 0}, "version 3, from before the padded vocabulary"),
        ({"version": 1}, "version 1; expected 3"),
        ({"num_layers": -2}, "num_layers=-2 must be at least 1"),
        ({"padded_vocab_size": V - 1}, "padded_vocab_size=96 is below vocab_size"),
        ({"num_layers": 2**31 - 1}, "cut short"),
        ({"version": 5}, "expected"),
        ({"num_heads": 5}, "n_embd=24 does not divide into n_head=5 heads"),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    file: Path, content: bytes, numbers: dict[str, int], message: str
):
    file.write_bytes(with_header(content, numbers))
    with pytest.raises(ConvertError, match=message):
        convert(file, out=file.with_name("out"))


def test_a_log_folder_is_its_latest_finished_checkpoint(tmp_path: Path, content: bytes):
    for step in (100, 200, 300):
        (tmp_path / f"model_{step:08d}.bin").write_bytes(content)
        (tmp_path / f"state_{step:08d}_00000.bin").write_bytes(b"\0")
    with pytest.raises(ConvertError, match=r"without DONE_STEP, so llm\.c had not finished"):
        open_source(tmp_path)
    for step in (100, 200):
        (tmp_path / f"DONE_{step:08d}").touch()
    source = open_source(tmp_path)
    assert [path.name for path in source.files] == ["model_00000200.bin"]
    assert source.notes[0].startswith("model_00000300.bin passed over for model_00000200.bin")


def test_a_checkpoint_without_its_marker_is_taken_with_a_note(tmp_path: Path, content: bytes):
    path = tmp_path / "model_00000300.bin"
    path.write_bytes(content)
    assert "has no DONE_00000300 beside it" in open_source(path).notes[0]
    (tmp_path / "DONE_00000300").touch()
    assert len(open_source(path).notes) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_no_header_escapes_as_another_exception(tmp_path: Path, content: bytes, data):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(4, 31))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.bin"
    path.write_bytes(changed[: data.draw(st.sampled_from([10, 1024, len(content)]))])
    with contextlib.suppress(ConvertError):
        for tensor in llmc.open(path).tensors.values():
            tensor.read()
