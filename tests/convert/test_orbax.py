"""Orbax, in and out: what Orbax saved is read without it, and what is written is restored by it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from orbax.checkpoint import v1

import convert
import gpt_oss_checkpoints as gpt_oss
import hf_checkpoints as hf
from convert import ConvertError
from convert.sources import open_source
from convert.targets import orbax as target
from core import checkpoint
from core.config import GPT2Config

OURS = GPT2Config.from_hf(hf.CONFIG).to_dict()


def params(dtype: str = "float32") -> dict[str, Any]:
    return traverse_util.unflatten_dict(hf.as_parameters(hf.tensors(dtype)), sep=".")


def save_standard(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_pytree(path: Path, tree: Any) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_zarr3(path: Path, tree: Any) -> None:
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_ocdbt=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def save_folders(path: Path, tree: Any) -> None:
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(path, tree)


def save_v1(path: Path, tree: Any) -> None:
    v1.save(str(path), tree)


def save_steps(path: Path, tree: Any) -> None:
    with ocp.CheckpointManager(path) as manager:
        manager.save(9, args=ocp.args.StandardSave(jax.tree.map(np.zeros_like, tree)))
        manager.save(10, args=ocp.args.StandardSave(tree))


def save_items(path: Path, tree: Any) -> None:
    with ocp.CheckpointManager(path) as manager:
        items = {"params": tree, "opt": {"mu": np.ones(3)}}
        manager.save(
            4, args=ocp.args.Composite(**{k: ocp.args.StandardSave(x) for k, x in items.items()})
        )


LAYOUTS: dict[str, Callable[[Path, Any], None]] = {
    "standard": save_standard,
    "pytree": save_pytree,
    "zarr3": save_zarr3,
    "folders": save_folders,
    "v1": save_v1,
    "steps": save_steps,
    "items": save_items,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_bit_for_bit(tmp_path: Path, layout: str):
    LAYOUTS[layout](tmp_path / "s", params())
    (tmp_path / "s" / "config.json").write_text(json.dumps(OURS))
    folder = checkpoint.open(convert.convert(tmp_path / "s", out=tmp_path / "out"))
    expected = hf.as_parameters(hf.tensors())
    assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.items())
    assert folder.manifest["source"]["format"] == "orbax"
    notes = folder.manifest["source"].get("notes", [])
    assert notes == (["of 2 steps, 10 is read"] if layout == "steps" else [])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_arrays_of_every_type_are_read(tmp_path: Path, dtype: str):
    save_standard(tmp_path / "s", jax.tree.map(jnp.asarray, params(dtype)))
    (tmp_path / "config.json").write_text(json.dumps(hf.CONFIG))  # beside it, and not ours
    folder = checkpoint.open(convert.convert(tmp_path / "s", out=tmp_path / "out"))
    expected = hf.as_parameters(hf.tensors(dtype))
    assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.items())


def test_of_a_training_state_the_parameters_are_read(tmp_path: Path):
    save_standard(tmp_path / "s", {"params": params(), "step": 3, "mu": {"x": np.ones(3)}})
    (tmp_path / "s" / "config.json").write_text(json.dumps(OURS))
    source = open_source(tmp_path / "s")
    assert source.notes == ("2 tensors beside 'params' are left out: mu, step",)
    assert source.tensors.keys() == GPT2Config.from_hf(hf.CONFIG).tensors().keys()


def test_a_training_run_of_ours_is_told_to_use_its_model(tmp_path: Path):
    source = hf.write(tmp_path / "source", hf.tensors())
    convert.convert(source, out=tmp_path / "run" / "model")
    save_standard(tmp_path / "run" / "checkpoints" / "5" / "state", {"x": np.ones(3)})
    for path in ("run", "run/checkpoints", "run/checkpoints/5", "run/checkpoints/5/state"):
        with pytest.raises(ConvertError, match=r"of a training run; its model is .*run/model, use"):
            open_source(tmp_path / path)


def test_no_config_and_no_parameters_are_told(tmp_path: Path):
    save_standard(tmp_path / "s", {"x": np.ones(3)})
    with pytest.raises(ConvertError, match=r"no config\.json beside it"):
        open_source(tmp_path / "s")
    (tmp_path / "s" / "config.json").write_text(json.dumps(OURS))
    with pytest.raises(ConvertError, match="x is not of this model"):
        convert.convert(tmp_path / "s", out=tmp_path / "out")
    save_items(tmp_path / "m", params())
    (tmp_path / "m" / "4" / "params").rename(tmp_path / "m" / "4" / "weights")
    with pytest.raises(ConvertError, match=r"holds opt, weights; give the path of the one"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize("layout", ["standard", "folders", "zarr3"])
def test_what_is_lost_is_never_read_as_zeros(tmp_path: Path, layout: str):
    LAYOUTS[layout](tmp_path / "s", params())
    (tmp_path / "s" / "config.json").write_text(json.dumps(OURS))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "s", whole)
    data = [p for p in sorted(whole.rglob("*")) if p.is_file() and p.parent.name != "whole"]
    refused = 0
    for path in data[:: 1 + len(data) // 12]:
        shutil.rmtree(tmp_path / "s")
        shutil.copytree(whole, tmp_path / "s")
        (tmp_path / "s" / path.relative_to(whole)).unlink()
        try:
            folder = checkpoint.open(
                convert.convert(tmp_path / "s", out=tmp_path / "out", overwrite=True)
            )
        except ConvertError:
            refused += 1
        else:  # Orbax leaves some that nothing refers to
            expected = hf.as_parameters(hf.tensors())
            assert all(hf.same_bits(folder.tensors[n], x) for n, x in expected.items())
    assert refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("tree_metadata"), "no tree_metadata"),
        (lambda m: m["tree_metadata"].update(x=5), "5 is no leaf"),
        (lambda m: _first(m)["key_metadata"].clear(), "no path of a leaf"),
        (lambda m: _first(m)["key_metadata"][0].update(key=".."), "no path of a leaf"),
        (lambda m: _first(m)["key_metadata"][0].update(key="../../x"), "no path of a leaf"),
        (lambda m: _first(m)["key_metadata"][0].update(key="none"), "cannot be opened"),
        (lambda m: m.update(use_ocdbt=False), "cannot be opened"),
        (lambda m: m.update(use_zarr3=True), "cannot be opened"),
    ],
)
def test_hand_made_metadata_is_refused(tmp_path: Path, change, message: str):
    save_standard(tmp_path / "s", {"a": {"b": np.ones(3)}})
    (tmp_path / "s" / "config.json").write_text(json.dumps(OURS))
    metadata = json.loads((tmp_path / "s" / "_METADATA").read_text())
    change(metadata)
    (tmp_path / "s" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ConvertError, match=message):
        open_source(tmp_path / "s")


def _first(metadata: dict[str, Any]) -> dict[str, Any]:
    return next(iter(metadata["tree_metadata"].values()))


def test_damaged_files_are_refused_or_change_only_numbers(tmp_path: Path):
    save_standard(tmp_path / "s", params())
    (tmp_path / "s" / "config.json").write_text(json.dumps(OURS))
    rng = np.random.default_rng(0)
    files = [
        p for p in sorted((tmp_path / "s").rglob("*")) if p.is_file() and p.name != "config.json"
    ]
    refused = 0
    for file in files:
        whole = file.read_bytes()
        for _ in range(6):
            data = bytearray(whole[: rng.integers(len(whole))] if rng.integers(2) else whole)
            for at in rng.integers(0, max(1, len(data)), 2):
                data[at : at + 1] = bytes(rng.integers(0, 256, 1, np.uint8))
            file.write_bytes(data)
            try:
                tensors = open_source(tmp_path / "s").tensors
                for tensor in tensors.values():  # Orbax keeps no checksums of chunks
                    array = tensor.read()
                    assert (array.dtype.name, array.shape) == (tensor.dtype, tensor.shape)
            except ConvertError:
                refused += 1
        file.write_bytes(whole)
    assert refused > len(files)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "mxfp4"])
def test_an_export_is_restored_by_orbax_and_comes_back(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(target, "PART_BYTES", 700)  # so that chunks are cut along one axis and two
    if kind == "mxfp4":
        source = gpt_oss.write(tmp_path / "s", gpt_oss.packed(), gpt_oss.PACKED_CONFIG)
        monkeypatch.setattr(target, "PART_BYTES", 9000)
    else:
        source = hf.write(tmp_path / "s", hf.tensors(kind))
    model = convert.convert(source, out=tmp_path / "model")
    out = convert.export(model, to="orbax", out=tmp_path / "out")
    expected = checkpoint.open(model).tensors
    with ocp.StandardCheckpointer() as checkpointer:
        restored = [checkpointer.restore(out)]
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, checkpoint.open(model).params())
        restored.append(checkpointer.restore(out, abstract))
    restored.append(v1.load(str(out)))
    for tree in restored:
        flat = traverse_util.flatten_dict(tree, sep=".")
        assert flat.keys() == expected.keys()
        assert all(hf.same_bits(np.asarray(flat[n]), x) for n, x in expected.items())
    back = checkpoint.open(convert.convert(out, out=tmp_path / "back"))
    assert all(hf.same_bits(back.tensors[n], x) for n, x in expected.items())
    assert back.config == checkpoint.open(model).config
    convert.export(model, to="orbax", out=out, overwrite=True)


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((10, 4), 4, (6, 4)),
        ((10, 4), 8, (3, 4)),
        ((2, 3, 40), 4, (1, 1, 25)),
        ((2, 30, 4), 4, (1, 6, 4)),
        ((3,), 4, (3,)),
        ((), 4, ()),
    ],
)
def test_chunks_are_consecutive_and_no_larger_than_a_part(
    monkeypatch: pytest.MonkeyPatch, shape, itemsize: int, expected
):
    monkeypatch.setattr(target, "PART_BYTES", 100)
    assert target.chunk_shape(shape, itemsize) == expected


def test_an_export_replaces_only_an_export(tmp_path: Path):
    model = convert.convert(hf.write(tmp_path / "s", hf.tensors()), out=tmp_path / "model")
    save_standard(tmp_path / "theirs", params())
    for config in (None, hf.CONFIG):
        if config is not None:
            (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConvertError, match="is not an exported model"):
            convert.export(model, to="orbax", out=tmp_path / "theirs", overwrite=True)


_MEASURED = """
import sys, threading, time
import convert, ml_dtypes, tensorstore
from convert.targets import orbax
import convert.sources.orbax

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

peak = before = anonymous()
work = {
    "export": lambda: convert.export("model", to="orbax", out="out"),
    "import": lambda: convert.convert("out", out="back"),
}[sys.argv[1]]
worker = threading.Thread(target=work)
worker.start()
while worker.is_alive():
    peak = max(peak, anonymous())
    time.sleep(0.002)
print(peak - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    config = {**hf.CONFIG, "n_embd": 256, "n_layer": 24, "n_inner": 1024, "vocab_size": 20_000}
    source = hf.write(tmp_path / "source", hf.tensors(config=config), config=config)
    convert.convert(source, out=tmp_path / "model")
    peaks = {}
    for what in ("export", "import"):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, what],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[what] = int(done.stdout)
    # The model has 97 MB. Written part by part; read leaf by leaf, the largest has 20 MB and several threads read.
    assert peaks["export"] < 60e6
    assert peaks["import"] < 75e6
