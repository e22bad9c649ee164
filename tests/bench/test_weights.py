import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from bench import shapes, weights
from bench_contestants import TINY, TINY_GPT_OSS


@pytest.mark.parametrize("shape", [TINY, TINY_GPT_OSS], ids=lambda shape: shape.name)
def test_the_files_hold_what_the_shape_declares(tmp_path, shape):
    folder = weights.write(tmp_path / "model", shape)
    found = {path.name for path in folder.glob("*.safetensors")}
    assert found == set(shape.hf_files())
    total = 0
    for name, declared in shape.hf_files().items():
        # safetensors' numpy side has no bfloat16; sizes and types are in the header.
        raw = (folder / name).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__")
        assert {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items()} == declared
        total += len(raw) - 8 - length
    assert total == shapes.nbytes(shape)
    assert not list(tmp_path.glob("*.partial"))


def test_the_index_names_the_file_of_every_tensor(tmp_path):
    folder = weights.write(tmp_path / "model", TINY_GPT_OSS)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == shapes.nbytes(TINY_GPT_OSS)
    assert index["weight_map"]["lm_head.weight"] == "model-00002-of-00002.safetensors"
    assert len(index["weight_map"]) == sum(len(t) for t in TINY_GPT_OSS.hf_files().values())


def test_the_same_seed_gives_the_same_bytes_and_no_two_matrices_are_alike(tmp_path):
    one, two, other = (
        load_file(weights.write(tmp_path / name, TINY, seed=seed) / "model.safetensors")
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["wte.weight"], other["wte.weight"])
    assert not np.array_equal(one["h.0.mlp.c_fc.weight"], one["h.1.mlp.c_fc.weight"])
    assert len(np.unique(one["wte.weight"], axis=0)) == TINY.vocab_size


def test_a_tensor_longer_than_the_drawn_numbers_goes_on_with_them_from_the_start(monkeypatch):
    monkeypatch.setattr(weights, "PERIOD", 101)
    weights._tile.cache_clear()
    x = np.concatenate(list(weights._parts("h.0.mlp.c_fc.weight", "F32", (9, 31), 0)))
    weights._tile.cache_clear()
    assert x.shape == (9 * 31,)
    assert np.array_equal(x[101:202], x[:101])
    assert len(np.unique(x.reshape(9, 31), axis=0)) == 9


def test_scales_of_experts_are_sane_and_blocks_are_any_bytes(tmp_path):
    folder = weights.write(tmp_path / "model", TINY_GPT_OSS)
    tensors = load_file(folder / "model-00000-of-00002.safetensors")
    scales = tensors["model.layers.0.mlp.experts.down_proj_scales"]
    assert (scales.min(), scales.max()) == (116, 123)
    assert len(np.unique(tensors["model.layers.0.mlp.experts.down_proj_blocks"])) == 256


def test_what_was_half_written_is_no_checkpoint(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        weights.write(tmp_path / "model", TINY)
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    assert weights.write(tmp_path / "model", TINY).exists()
