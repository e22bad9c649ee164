"""OpenAI's TensorFlow checkpoints: what TensorFlow wrote is read to the bit, and no damage passes or escapes."""

import contextlib
import json
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_checkpoints as hf
import openai_checkpoints as openai
import tf_bundles as tf
from convert import ConvertError, convert, importer, verify
from convert.sources import open_source, tf_bundle
from convert.tables import openai_tf
from core import checkpoint
from core.config import PRESETS, ConfigError
from core.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
HF_CONFIG = {
    "model_type": "gpt2",
    "vocab_size": openai.V,
    "n_positions": openai.P,
    "n_embd": openai.D,
    "n_head": openai.N,
    "n_layer": openai.L,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A copy of the checkpoint that TensorFlow saved."""
    return Path(shutil.copytree(GOLDEN / "tf_gpt2", tmp_path / "saved"))


def read(index: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in tf_bundle.read_bundle(index)[0].items()}


def put_table(
    path: Path, *, data: list[bytes], metaindex: bytes, index: list[tuple[bytes, bytes]]
) -> Path:
    """Writes an index file of these blocks; `index` has what precedes the handle of each data block."""
    out = b""

    def put(content: bytes) -> bytes:
        nonlocal out
        handle = tf.varint(len(out)) + tf.varint(len(content))
        signed = content + b"\0"
        out += signed + struct.pack("<I", tf.masked(google_crc32c.value(signed)))
        return handle

    handles = [put(block) for block in data]
    entries = b"".join(
        lengths + tf.varint(len(handle)) + name + handle
        for (lengths, name), handle in zip(index, handles, strict=True)
    )
    footer = put(metaindex) + put(entries + RESTARTS)
    path.write_bytes(out + footer.ljust(40, b"\0") + struct.pack("<Q", tf.MAGIC))
    return path


RESTARTS = struct.pack("<2I", 0, 1)
LONG = 1 << 20


def test_names_that_share_their_beginnings_do_not_fill_the_memory(tmp_path: Path):
    start = tf.varint(0) + tf.varint(LONG) + tf.varint(0) + b"a" * LONG
    more = (tf.varint(LONG - 1) + tf.varint(1) + tf.varint(0) + b"a") * 1000
    path = put_table(tmp_path / "x.index", data=[], metaindex=start + more + RESTARTS, index=[])
    tracemalloc.start()
    with pytest.raises(ConvertError, match="the metaindex holds what TensorFlow never writes"):
        tf_bundle.read_index(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * LONG


def test_names_of_blocks_have_an_end(tmp_path: Path):
    index = [(tf.varint(0) + tf.varint(LONG), b"a" * LONG)]
    index += [(tf.varint(LONG - 1) + tf.varint(1), b"a")] * 99
    data = [tf.block([(b"%03d" % i, b"")]) for i in range(100)]
    path = put_table(tmp_path / "x.index", data=data, metaindex=tf.block([]), index=index)
    with pytest.raises(ConvertError, match="names of more than"):
        tf_bundle.read_index(path)


def test_no_block_is_empty(tmp_path: Path):
    """A sum over the same large block, for every entry of an index, would take hours."""
    index = [(tf.varint(0) + tf.varint(1), b"a")]
    path = put_table(tmp_path / "x.index", data=[tf.block([])], metaindex=tf.block([]), index=index)
    with pytest.raises(ConvertError, match="a block with nothing in it"):
        tf_bundle.read_index(path)


def test_what_tensorflow_saved_is_the_folder_that_hugging_faces_file_gives(tmp_path: Path):
    convert(GOLDEN / "tf_gpt2", out=tmp_path / "tf")
    weights = openai.as_hf(openai.tensors())
    convert(hf.write(tmp_path / "src", weights, config=HF_CONFIG, files={}), out=tmp_path / "hf")
    ours, theirs = hf.digests(tmp_path / "tf"), hf.digests(tmp_path / "hf")
    assert ours.pop("manifest.json") != theirs.pop("manifest.json")
    assert ours == theirs
    assert len(checkpoint.open(tmp_path / "tf").tensors) == 28


def test_the_folder_is_verified_against_the_checkpoint_and_the_plan_counts_layers(
    saved: Path, tmp_path: Path
):
    out = convert(saved, out=tmp_path / "out")
    verify(out, against=saved)
    text = importer.plan_source(saved).describe()
    assert "2 x blocks.*.attn.qkv.bias" in text
    assert "<- model/h*/attn/c_attn/b  (3NH) -> 3NH" in text
    shifted = openai.tensors() | {"model/ln_f/b": openai.values((openai.D,), 999)}
    tf.write(saved, shifted)
    with pytest.raises(ConvertError, match=r"ln_f\.bias"):
        verify(out, against=saved)


def test_a_kernel_loses_its_leading_axis_and_nothing_else(tmp_path: Path):
    convert(GOLDEN / "tf_gpt2", out=tmp_path / "out")
    w = openai.tensors()["model/h1/attn/c_attn/w"]
    found = checkpoint.open(tmp_path / "out").tensors["blocks.1.attn.qkv.kernel"]
    assert hf.same_bits(found, w.reshape(openai.D, 3, openai.N, openai.H))


def test_every_type_scalar_and_empty_tensor_is_read_from_two_data_files():
    found = tf_bundle.read_bundle(GOLDEN / "tf_odd" / "model.ckpt.index")[0]
    steps = np.arange(15).reshape(5, 3)
    kinds = "float32 float64 float16 int8 int16 int32 int64 uint8 bool bfloat16".split()
    for kind in kinds:
        expected = steps.astype(getattr(ml_dtypes, kind, kind))
        assert hf.same_bits(found.pop(f"kinds/{kind}").read(), expected)
    assert hf.same_bits(found.pop("global_step").read(), np.array(1234567890123))
    assert hf.same_bits(found.pop("empty").read(), np.zeros((0, 3), np.float32))
    assert (found["name"].dtype, found["name"].shape) == ("string", ())
    with pytest.raises(ConvertError, match="name holds text, which is no weight"):
        found["name"].read()


def test_an_index_of_several_blocks_is_read_whole(tmp_path: Path):
    with zipfile.ZipFile(GOLDEN / "tf_blocks.zip") as packed:
        packed.extractall(tmp_path)
    assert (tmp_path / "model.ckpt.index").stat().st_size > 2 * 2**18
    found = read(tmp_path / "model.ckpt.index")
    assert found == {f"{i:03d}{'x' * 4000}": i for i in range(140)}


def test_a_partitioned_variable_is_refused_by_name():
    with pytest.raises(ConvertError, match="whole is a partitioned variable"):
        tf_bundle.read_bundle(GOLDEN / "tf_slices" / "model.ckpt.index")


@pytest.mark.parametrize(
    "part", ["", "checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"]
)
def test_a_checkpoint_is_found_by_its_folder_and_by_any_of_its_files(part: str):
    source = open_source(GOLDEN / "tf_gpt2" / part)
    assert (source.format, len(source.tensors)) == ("tensorflow", 28)
    assert [file.name for file in source.files] == [
        "hparams.json",
        "model.ckpt.index",
        "model.ckpt.data-00000-of-00001",
    ]


def test_the_latest_checkpoint_of_several_is_the_one_that_the_folder_names(saved: Path):
    tf.write(saved, openai.tensors(), prefix="model-1000")
    text = 'model_checkpoint_path: "/another/machine/model-1000"\nall_model_checkpoint_paths: "a"\n'
    (saved / "checkpoint").write_text(text)
    assert open_source(saved).files[1].name == "model-1000.index"
    (saved / "checkpoint").unlink()
    with pytest.raises(ConvertError, match=r"found model-1000\.index, model\.ckpt\.index"):
        open_source(saved)


def test_without_hparams_nothing_is_guessed(saved: Path):
    (saved / "hparams.json").unlink()
    with pytest.raises(ConvertError, match=r"no hparams\.json; it says what the tensors are"):
        open_source(saved)


def test_hparams_are_understood_to_the_last_key(saved: Path):
    hparams = {key: value for key, value in openai.HPARAMS.items() if key != "n_ctx"}
    (saved / "hparams.json").write_text(json.dumps({**hparams, "n_ctx": 9, "attn_dropout": 0.5}))
    with pytest.raises(ConvertError, match="unknown key 'attn_dropout'"):
        convert(saved, out=saved / "out")
    with pytest.raises(ConfigError, match="'n_embd' is missing; 'n_head' is missing"):
        openai_tf.read_config({"n_vocab": 1, "n_ctx": 1, "n_layer": 1})
    with pytest.raises(ConfigError, match="vocab_size='97' is not int"):
        openai_tf.read_config({**openai.HPARAMS, "n_vocab": "97"})


def test_openais_hparams_are_the_published_configs():
    sizes = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48}
    assert openai_tf.read_config(sizes) == PRESETS["gpt2-xl"]


def test_the_tokenizer_takes_the_names_that_everybody_reads(
    saved: Path, testdata: Path, tmp_path: Path
):
    vocab, merges = testdata / "gpt2_encoder.json", testdata / "gpt2_vocab.bpe"
    shutil.copyfile(vocab, saved / "encoder.json")
    shutil.copyfile(merges, saved / "vocab.bpe")
    out = convert(saved, out=tmp_path / "out")
    assert (out / "vocab.json").read_bytes() == vocab.read_bytes()
    assert (out / "merges.txt").read_bytes() == merges.read_bytes()
    text = "Weiß der Geier, it's 2019.<|endoftext|>"
    assert Tokenizer.open(out).encode(text) == Tokenizer.from_bpe_files(vocab, merges).encode(text)


def test_what_an_optimizer_left_beside_the_weights_is_left_out(saved: Path, tmp_path: Path):
    slots = {"beta1_power": np.float32(0.9), "global_step": np.int64(7)}
    slots |= {f"{name}/Adam": np.zeros(3, np.float32) for name in openai.tensors()}
    extra = {name: np.asarray(value) for name, value in slots.items()}
    tf.write(saved, openai.tensors() | extra)
    convert(saved, out=tmp_path / "out")
    tf.write(saved, openai.tensors() | {"model/extra": np.zeros(3, np.float32)})
    with pytest.raises(ConvertError, match="model/extra is not of this model"):
        convert(saved, out=tmp_path / "no")


def test_a_flipped_bit_of_a_weight_stops_the_conversion_and_is_named(saved: Path, tmp_path: Path):
    data = saved / "model.ckpt.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    at = content.find(openai.tensors()["model/h1/mlp/c_fc/w"].tobytes())
    content[at + 4321] ^= 4
    data.write_bytes(content)
    with pytest.raises(ConvertError, match="model/h1/mlp/c_fc/w is damaged: its CRC32C is"):
        convert(saved, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_and_a_short_data_file_are_told(saved: Path):
    data = saved / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ConvertError, match="cut short: found 73151 bytes, expected 73152"):
        open_source(saved)
    data.unlink()
    with pytest.raises(ConvertError, match=r"data-00000-of-00001 is missing"):
        open_source(saved)


def refused(folder: Path, index: bytes) -> str:
    (folder / "model.ckpt.index").write_bytes(index)
    with pytest.raises(ConvertError) as told:
        tf_bundle.read_bundle(folder / "model.ckpt.index")
    assert "model.ckpt.index" in str(told.value)
    return str(told.value)


def test_what_is_no_uncompressed_little_endian_bundle_is_refused_by_name(tmp_path: Path):
    bundle = {b"": tf.header(1)}
    assert "compressed (snappy)" in refused(tmp_path, tf.table(bundle, kind=1))
    assert "big-endian" in refused(tmp_path, tf.table({b"": tf.header(1, endianness=1)}))
    newer = tf.header(1, version=tf.field(2, 2))
    assert "needs a reader of version 2" in refused(tmp_path, tf.table({b"": newer}))
    assert "not a TensorFlow checkpoint" in refused(tmp_path, tf.table({b"a": b""}))
    assert "cut short, or not one" in refused(tmp_path, tf.table(bundle)[:-1])


def test_entries_that_contradict_themselves_are_told_together(tmp_path: Path):
    pairs = {
        b"": tf.header(1),
        b"far": tf.entry(1, (1,), 3, 0, 4, 0),
        b"huge": tf.entry(1, (0, 2**62, 2**62), 0, 0, 0, 0),
        b"size": tf.entry(1, (2, 3), 0, 0, 4, 0),
        b"type": tf.entry(99, (), 0, 0, 4, 0),
    }
    told = refused(tmp_path, tf.table(pairs))
    assert "far lies in data file 3 of 1" in told
    assert "huge has no possible shape" in told
    assert "size is float32[2, 3], 24 bytes, but 4 are stored" in told
    assert "type has TensorFlow's type 99" in told
    ranks = {b"": tf.header(1), b"deep": tf.entry(1, (1,) * 33, 0, 0, 4, 0)}
    assert "no possible rank" in refused(tmp_path, tf.table(ranks))


def test_nonsense_with_right_sums_is_refused(tmp_path: Path):
    def data_block(content: bytes) -> bytes:
        def replace(block: bytes) -> bytes:
            return content if b"keys" in block and b"keys~" not in block else block

        return tf.table({b"": tf.header(1), b"keys": b""}, tamper=replace)

    twice = tf.block([(b"b", b""), (b"a", b"")])
    assert "its keys do not rise" in refused(tmp_path, data_block(twice))
    shares = tf.varint(9) + tf.varint(1) + tf.varint(0) + b"k" + bytes(4) + bytes([1, 0, 0, 0])
    assert "shares more than the one before" in refused(tmp_path, data_block(shares))
    text = {b"": tf.header(1), b"a": tf.field(1, b"float32")}
    assert "protobuf field 1 is no number" in refused(tmp_path, tf.table(text))
    flat = {b"": tf.header(1), b"a": tf.field(2, 12)}
    assert "protobuf field 2 is no message" in refused(tmp_path, tf.table(flat))
    group = {b"": tf.header(1), b"a": tf.varint(1 << 3 | 3)}
    assert "a protobuf field of wire type 3" in refused(tmp_path, tf.table(group))


def test_a_small_index_cannot_ask_for_much_memory(tmp_path: Path):
    name = b"x" * 1_000_000
    body = tf.varint(0) + tf.varint(len(name)) + tf.varint(0) + name
    for i in range(200):
        body += tf.varint(len(name)) + tf.varint(3) + tf.varint(0) + i.to_bytes(3, "big")

    def bomb(block: bytes) -> bytes:
        is_data = b"keys" in block and b"keys~" not in block
        return body + bytes(4) + (1).to_bytes(4, "little") if is_data else block

    told = refused(tmp_path, tf.table({b"keys": b""}, tamper=bomb))
    assert "names of more than 67,108,864 bytes" in told


TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    st.builds(
        lambda kind, shape, seed: openai.values(shape, seed).astype(getattr(ml_dtypes, kind, kind)),
        st.sampled_from(sorted(tf.ENUMS)),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=12,
)
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


@FUZZ
@given(TENSORS, st.integers(1, 3), st.integers(1, 5), st.integers(1, 17))
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_every_bundle_is_read_back(tmp_path: Path, tensors, shards, per_block, restart_interval):
    index = tf.write(
        tmp_path, tensors, shards=shards, per_block=per_block, restart_interval=restart_interval
    )
    found = read(index)
    assert found.keys() == tensors.keys()
    assert all(hf.same_bits(found[name], tensors[name]) for name in tensors)


@FUZZ
@given(st.data())
def test_damage_never_escapes_as_another_exception(tmp_path: Path, data):
    tensors = {f"t/{i}": openai.values((i, 3), i) for i in range(5)}
    index = tf.write(tmp_path, tensors, shards=2, per_block=2)
    file = data.draw(st.sampled_from(sorted(tmp_path.iterdir())))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read(index)
    except ConvertError:
        return
    assert all(hf.same_bits(found[name], tensors[name]) for name in tensors)


@FUZZ
@given(st.data())
def test_damage_that_is_signed_never_escapes_either(tmp_path: Path, data):
    def tamper(block: bytes) -> bytes:
        content = bytearray(block)
        for _ in range(data.draw(st.integers(0, 2))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        return bytes(content)

    tensors = {f"t/{i}": openai.values((i, 3), i) for i in range(3)}
    index = tf.write(tmp_path, tensors, per_block=2, tamper=tamper)
    with contextlib.suppress(ConvertError):
        read(index)


def test_every_flipped_bit_is_caught(tmp_path: Path):
    index = tf.write(tmp_path, {"a": openai.values((2, 3), 1), "b": openai.values((1,), 2)})
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            with pytest.raises(ConvertError):
                read(index)
        file.write_bytes(whole)
