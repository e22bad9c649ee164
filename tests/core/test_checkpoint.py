import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

import core
import tiny
from core import axes, checkpoint, folders
from core.checkpoint import CheckpointError, TensorSpec
from core.tokenizer import Tokenizer

CONFIG = tiny.config()
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def flat(params: Any) -> dict[str, np.ndarray]:
    return {n: np.asarray(x) for n, x in traverse_util.flatten_dict(params, sep=".").items()}


def assert_same_bits(found: Any, expected: Any) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert found[name].tobytes() == x.tobytes(), name
        assert found[name].shape == x.shape


def cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def specs(dtype: str = "float32") -> list[TensorSpec]:
    return [
        TensorSpec(name, axes.shape(word, CONFIG.axes), dtype)
        for name, word in CONFIG.tensors().items()
    ]


@pytest.fixture
def folder(tmp_path, params) -> Path:
    checkpoint.save(tmp_path / "model", CONFIG, params, tokenizer=Tokenizer.characters("abc"))
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_is_what_is_loaded_to_the_bit(tmp_path, params, dtype):
    tokenizer = Tokenizer.characters("flax mill")
    params = cast(params, dtype)
    checkpoint.save(tmp_path / "model", CONFIG, params, tokenizer=tokenizer)
    model, loaded, spoken = core.load(tmp_path / "model")
    assert model == core.build(CONFIG)
    assert_same_bits(loaded, params)
    assert spoken is not None
    assert spoken.encode("mill") == tokenizer.encode("mill")


def test_loading_casts_if_asked(folder, params):
    _, loaded, _ = core.load(folder, dtype=jnp.bfloat16)
    assert_same_bits(loaded, cast(params, "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_jax_program_gets_the_params_in_two_lines(tmp_path, params, dtype):
    checkpoint.save(tmp_path / "model", CONFIG, cast(params, dtype))
    file = tmp_path / "model" / "model-00001-of-00001.safetensors"

    tensors = safetensors.flax.load_file(file)
    theirs = traverse_util.unflatten_dict(tensors, sep=".")

    assert_same_bits(theirs, checkpoint.open(tmp_path / "model").params())
    if (
        dtype != "bfloat16"
    ):  # a NumPy array of which needs ml_dtypes, of which safetensors knows nothing
        in_numpy = safetensors.numpy.load_file(file)
        assert_same_bits(traverse_util.unflatten_dict(in_numpy, sep="."), cast(params, dtype))


def test_parameters_of_a_mapped_folder_compute(folder, model, params, apply):
    tokens_BT = tiny.tokens(CONFIG, 2, 9)
    _, loaded, _ = core.load(folder)
    np.testing.assert_array_equal(apply(loaded, tokens_BT), apply(params, tokens_BT))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_whose_size_divides_by_64_are_aligned_and_not_copied(tmp_path, params, dtype):
    checkpoint.save(tmp_path / "model", CONFIG, cast(params, dtype))
    opened = checkpoint.open(tmp_path / "model")
    arrays: dict[str, Any] = traverse_util.flatten_dict(opened.params(), sep=".")
    entries = opened.manifest["tensors"]
    divisible = [name for name, x in opened.tensors.items() if x.nbytes % 64 == 0]
    assert 5 < len(divisible) < len(entries)
    for name in divisible:
        assert entries[name]["offset"] % 64 == 0
        address = opened.tensors[name].__array_interface__["data"][0]
        assert address % 64 == 0
        assert arrays[name].unsafe_buffer_pointer() == address, name


def test_opened_tensors_cannot_be_written_to(folder):
    tensors = checkpoint.open(folder).tensors
    with pytest.raises(ValueError, match="read-only"):
        tensors["ln_f.scale"][0] = 1


def test_manifest_tells_of_every_byte(folder):
    manifest = checkpoint.open(folder).manifest
    assert manifest["parameters"] == CONFIG.parameter_count
    assert list(manifest["tensors"]) == list(CONFIG.tensors())
    for entry in manifest["tensors"].values():
        data = (folder / entry["shard"]).read_bytes()[entry["offset"] :][: entry["nbytes"]]
        (folder / "one").write_bytes(data)
        assert checkpoint.sha256(folder / "one") == entry["sha256"]
    for name, entry in manifest["files"].items():
        assert checkpoint.sha256(folder / name) == entry["sha256"]
    assert set(manifest["files"]) == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_many_shards_hold_what_one_holds_and_none_is_too_large(tmp_path, params):
    tensors, limit = flat(params), 10_000
    checkpoint.write(
        tmp_path / "many",
        config=CONFIG,
        specs=specs(),
        read=lambda spec: [tensors[spec.name]],
        shard_bytes=limit,
    )
    opened = checkpoint.open(tmp_path / "many")
    assert_same_bits(opened.params(), params)
    shards = opened.manifest["shards"]
    assert len(shards) > 3
    assert list(shards) == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    for shard in shards:
        sizes = [e["nbytes"] for e in opened.manifest["tensors"].values() if e["shard"] == shard]
        assert sum(sizes) <= limit or len(sizes) == 1


def test_the_same_input_gives_the_same_bytes(tmp_path, folder, params):
    checkpoint.save(tmp_path / "again", CONFIG, params, tokenizer=Tokenizer.characters("cba"))
    assert contents(tmp_path / "again") == contents(folder)


def test_writing_reads_each_tensor_once_and_reports_every_byte(tmp_path, params):
    tensors, asked, written = flat(params), [], []

    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        asked.append(spec.name)
        yield tensors[spec.name]

    checkpoint.write(
        tmp_path / "model", config=CONFIG, specs=specs(), read=read, on_bytes=written.append
    )
    assert sorted(asked) == sorted(CONFIG.tensors())
    assert sum(written) == 4 * CONFIG.parameter_count


@pytest.mark.parametrize("error", [OSError("the source is gone"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_write_leaves_nothing_and_harms_nothing(folder, error):
    before, neighbours = contents(folder), sorted(folder.parent.iterdir())

    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        if spec.name == "ln_f.scale":
            raise error
        yield np.zeros(spec.shape, np.float32)

    for path, overwrite in ((folder, True), (folder.parent / "new", False)):
        with pytest.raises(type(error)):
            checkpoint.write(path, config=CONFIG, specs=specs(), read=read, overwrite=overwrite)
    assert contents(folder) == before
    assert sorted(folder.parent.iterdir()) == neighbours


def test_an_existing_folder_is_kept_unless_overwriting(folder, params):
    before = contents(folder)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    with pytest.raises(CheckpointError, match="exists; choose another folder or pass --overwrite"):
        checkpoint.save(folder, CONFIG, doubled)
    assert contents(folder) == before
    mapped = checkpoint.open(folder)
    checkpoint.save(folder, CONFIG, doubled, overwrite=True)
    assert_same_bits(checkpoint.open(folder).params(), doubled)
    assert_same_bits(mapped.params(), params)  # who had it open still sees the old
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": "{}"},
        {"manifest.json": '{"format_version": 1}', "config.json": '{"model_type": "gpt2"}'},
        {"manifest.json": '{"other": 1}', "config.json": '{"family": "gpt2"}'},
        {"config.json": '{"family": "gpt2"}'},
        {"manifest.json": "[]", "config.json": "{"},
    ],
    ids=str,
)
def test_overwriting_never_replaces_another_s_folder(tmp_path, params, files):
    (tmp_path / "there").mkdir()
    for name, content in files.items():
        (tmp_path / "there" / name).write_text(content)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="is not a model folder and is not overwritten"):
        checkpoint.save(tmp_path / "there", CONFIG, params, overwrite=True)
    assert contents(tmp_path) == before


def test_overwriting_replaces_an_empty_folder_and_a_damaged_model(tmp_path, folder, params):
    (tmp_path / "empty").mkdir()
    (folder / "model-00001-of-00001.safetensors").unlink()
    for path in (tmp_path / "empty", folder):
        checkpoint.save(path, CONFIG, params, overwrite=True)
        assert_same_bits(checkpoint.open(path).params(), params)


def test_the_working_directory_may_be_the_folder(tmp_path, params, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    checkpoint.save(".", CONFIG, params, overwrite=True)
    assert_same_bits(checkpoint.open(tmp_path / "empty").params(), params)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_writers_of_one_folder_each_writes_a_whole_one(tmp_path, params, overwrite):
    """The second begins and ends while the first is in the middle."""
    tensors, doubled = flat(params), jax.tree.map(lambda x: 2 * x, params)
    path = tmp_path / "model"
    if overwrite:
        checkpoint.save(path, CONFIG, jax.tree.map(lambda x: 3 * x, params))

    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        if spec.name == "ln_f.scale":
            checkpoint.save(path, CONFIG, doubled, overwrite=overwrite)
        yield tensors[spec.name]

    def write() -> None:
        checkpoint.write(path, config=CONFIG, specs=specs(), read=read, overwrite=overwrite)

    if overwrite:
        write()
    else:
        with pytest.raises(FileExistsError, match="something else was written there meanwhile"):
            write()
    assert_same_bits(checkpoint.open(path).params(), params if overwrite else doubled)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_all_is_on_the_disk_before_it_takes_the_name(tmp_path, params, monkeypatch):
    synced, taken = [], []
    fsync, rename = os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noting_rename(self: Path, target: Path) -> Path:
        taken.append({path.name: path.stat().st_ino in synced for path in self.iterdir()})
        assert self.stat().st_ino in synced
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    checkpoint.save(tmp_path / "model", CONFIG, params, tokenizer=Tokenizer.utf8())
    assert taken == [dict.fromkeys(contents(tmp_path / "model"), True)]
    assert tmp_path.stat().st_ino in synced


def test_a_new_folder_has_the_permissions_that_any_has(tmp_path, folder):
    (tmp_path / "any").mkdir()
    assert folder.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_remains_of_a_killed_write_are_no_model_and_do_not_hinder(folder, params):
    partial = folder.with_name("other.partial.0123abcd")
    shutil.copytree(folder, partial)
    (partial / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        checkpoint.open(partial)
    before = contents(partial)
    checkpoint.save(folder.with_name("other"), CONFIG, params)
    assert contents(partial) == before  # whose it is cannot be known


def damage(folder: Path, kind: str) -> None:
    shard, config = folder / "model-00001-of-00001.safetensors", folder / "config.json"
    manifest = folder / "manifest.json"
    match kind:
        case "no folder":
            shutil.rmtree(folder)
        case "a file":
            shutil.rmtree(folder)
            folder.write_text("not a folder")
        case "no manifest":
            manifest.unlink()
        case "manifest of another format":
            manifest.write_text(json.dumps({"format_version": 99}))
        case "manifest without shards":
            manifest.write_text(json.dumps({"format_version": 1}))
        case "manifest without tensors" | "tensors no object" | "tensor no object":
            content = json.loads(manifest.read_text())
            tensors = {"tensors no object": [], "tensor no object": {"a": 1}}.get(kind)
            manifest.write_text(json.dumps(content | {"tensors": tensors}))
        case "manifest nested deeply":
            manifest.write_text("[" * 100_000)
        case "config nested deeply":
            config.write_text("[" * 100_000)
        case "header nested deeply":
            text = b"[" * 100_000
            shard.write_bytes(len(text).to_bytes(8, "little") + text)
            content = json.loads(manifest.read_text())
            content["shards"] = {shard.name: 8 + len(text)}
            manifest.write_text(json.dumps(content))
        case "manifest not JSON":
            manifest.write_text("{")
        case "manifest no object":
            manifest.write_text("[]")
        case "no shard":
            shard.unlink()
        case "truncated shard":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "damaged header":
            shard.write_bytes(shard.read_bytes().replace(b'"dtype"', b'"dtipe"', 1))
        case "header of another kind":
            size = int.from_bytes(shard.read_bytes()[:8], "little")
            shard.write_bytes(
                shard.read_bytes()[:8] + b"[]".ljust(size) + shard.read_bytes()[8 + size :]
            )
        case "offsets of another size":
            shard.write_bytes(shard.read_bytes().replace(b'offsets":[0,', b'offsets":[9,', 1))
        case "no config":
            config.unlink()
        case "unknown config key" | "wrong shape" | "another family" | "missing tensor":
            change = {
                "unknown config key": {"n_heads": 4},
                "wrong shape": {"n_inner": 95},
                "another family": {"family": "llama"},
                "missing tensor": {"tie_word_embeddings": False},
            }[kind]
            config.write_text(json.dumps(json.loads(config.read_text()) | change))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no folder", "no such model folder; make one with"),
        ("a file", "no such model folder; make one with"),
        ("no manifest", "manifest.json is missing"),
        ("manifest of another format", "format_version is 99, this version reads 1"),
        ("manifest without shards", "names no shards"),
        ("manifest without tensors", "names no tensors; convert or copy the model again"),
        ("tensors no object", "names no tensors"),
        ("tensor no object", "1 is no entry of a tensor or file"),
        ("manifest nested deeply", "manifest.json is not JSON: maximum recursion"),
        ("config nested deeply", "config.json is not JSON: maximum recursion"),
        ("header nested deeply", "the safetensors header is damaged: maximum recursion"),
        ("manifest not JSON", "manifest.json is not JSON"),
        ("manifest no object", "should hold a JSON object"),
        ("no shard", "00001-of-00001.safetensors is missing; convert or copy the model again"),
        ("truncated shard", "bytes, found"),
        ("damaged header", "the safetensors header is damaged"),
        ("header of another kind", "the safetensors header is damaged"),
        ("offsets of another size", "do not fill"),
        ("no config", "config.json is missing"),
        ("unknown config key", "unknown key 'n_heads' (did you mean 'n_head'?)"),
        ("wrong shape", "blocks.0.mlp.up.kernel should be [24, 95], is [24, 96]"),
        ("another family", "family is 'llama'; expected one of gpt2"),
        ("missing tensor", "missing lm_head.kernel"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder, kind, says):
    damage(folder, kind)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: [*s[:-1]], "missing ln_f.bias"),
        (lambda s: [*s, s[0]], "planned twice"),
        (lambda s: [TensorSpec("h.0.x", (2,), "float32"), *s], "not expected h.0.x"),
        (lambda s: [TensorSpec(s[0].name, (24, 97), "float32"), *s[1:]], "[97, 24], is [24, 97]"),
        (lambda s: [TensorSpec(s[0].name, s[0].shape, "float64"), *s[1:]], "would not be float32"),
        (
            lambda s: [TensorSpec(s[0].name, s[0].shape, "uint8"), *s[1:]],
            "wte.embedding should be floating point, is uint8",
        ),
    ],
    ids=["missing", "twice", "unknown", "wrong shape", "unplanned dtype", "quantised"],
)
def test_a_plan_that_is_not_the_configuration_s_writes_nothing(tmp_path, change, says):
    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        raise AssertionError("asked for a tensor")

    with pytest.raises(CheckpointError) as caught:
        checkpoint.write(tmp_path / "model", config=CONFIG, specs=change(specs()), read=read)
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([(97, 24, "float16")], "float16, 4656 bytes"),
        ([(97, 24, "float32"), (1, 1, "float32")], "float32, 9316 bytes"),
        ([(96, 24, "float32")], "float32, 9216 bytes"),
        ([(96, 24, "float32"), (2, 24, "float16")], "float16, 9312 bytes"),
        ([], "float32, 0 bytes"),
    ],
    ids=["another type", "too many", "too few", "another type later", "none"],
)
def test_parts_that_are_not_the_tensor_write_nothing(tmp_path, parts, found):
    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        if spec.name != "wte.embedding":
            yield np.zeros(spec.shape, np.float32)
        else:
            yield from (np.zeros(shape, dtype) for *shape, dtype in parts)

    with pytest.raises(CheckpointError) as caught:
        checkpoint.write(tmp_path / "model", config=CONFIG, specs=specs(), read=read)
    expected = "wte.embedding: expected float32[97, 24], 9312 bytes, was given "
    assert str(caught.value) == expected + found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part_bytes", [1, 100, 10_000, 2**24])
def test_a_tensor_in_parts_is_the_tensor(tmp_path, folder, params, part_bytes):
    tensors = flat(params)
    told: list[int] = []
    checkpoint.write(
        tmp_path / "parts",
        config=CONFIG,
        specs=specs(),
        read=lambda spec: checkpoint.parts(tensors[spec.name], part_bytes),
        files=Tokenizer.characters("abc").files(),
        on_bytes=told.append,
    )
    assert contents(tmp_path / "parts") == contents(folder)
    assert max(told) <= max(part_bytes, 4)
    assert sum(told) == 4 * CONFIG.parameter_count


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 0, 1), (2, 1, 0), (0, 2, 1)])
def test_parts_of_a_transposed_array_are_in_c_order(axes):
    array = np.arange(3 * 50 * 70, dtype=np.float32).reshape(3, 50, 70).transpose(axes)
    for part_bytes in (100, 10_000, 10**6):
        parts = list(checkpoint.parts(array, part_bytes))
        assert all(part.flags.c_contiguous for part in parts)
        assert b"".join(part.tobytes() for part in parts) == array.tobytes()


@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    part_bytes=st.integers(1, 100),
    turned=st.booleans(),
)
def test_parts_joined_are_the_array_in_c_order(shape, part_bytes, turned):
    array = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape)
    array = array.T if turned else array
    parts = list(checkpoint.parts(array, part_bytes))
    assert b"".join(part.tobytes() for part in parts) == array.tobytes()
    assert all(part.nbytes <= max(part_bytes, 2) for part in parts)
    if not turned and array.size:
        assert all(np.shares_memory(part, array) for part in parts)


def test_saving_another_model_s_parameters_names_the_difference(tmp_path, params):
    with pytest.raises(CheckpointError, match=r"missing lm_head\.kernel; not expected nothing"):
        checkpoint.save(tmp_path / "model", tiny.config(tie_word_embeddings=False), params)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.down\.kernel should be \[50, 24\]"):
        checkpoint.save(tmp_path / "model", tiny.config(n_inner=50), params)
    assert list(tmp_path.iterdir()) == []


def test_opening_takes_no_memory_of_its_own(tmp_path):
    """40 MB of parameters: what the process holds privately grows by less than a twentieth of that."""
    config = tiny.config(vocab_size=50_000, n_embd=192, n_head=3)
    checkpoint.write(
        tmp_path / "big",
        config=config,
        specs=[
            TensorSpec(n, axes.shape(w, config.axes), "float32")
            for n, w in config.tensors().items()
        ],
        read=lambda spec: [np.zeros(spec.shape, np.float32)],
    )
    before = _private_bytes()
    opened = checkpoint.open(tmp_path / "big")
    params = opened.params()
    assert sum(x.nbytes for x in jax.tree.leaves(params)) > 40e6
    assert _private_bytes() - before < 2e6


def _private_bytes() -> int:
    """Anonymous memory of this process, from /proc; pages of a mapped file do not count."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc/self/status")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_a_disk_without_room_is_one_clear_error_before_anything_is_made(tmp_path):
    with pytest.raises(CheckpointError, match=r"4611686018\.43 GB are needed, .* GB are free"):
        folders.check_space(tmp_path / "not" / "there", 2**62)
    assert list(tmp_path.iterdir()) == []
    folders.check_space(tmp_path / "not" / "there", 1)
