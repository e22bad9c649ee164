"""Names and layouts: what fits is found, and everything that does not is reported at once."""

import time
from pathlib import Path

import numpy as np
import pytest

import hf_checkpoints as hf
from convert import ConvertError, importer, mapping, tables
from convert.sources import SourceTensor, open_source
from convert.tables import gpt2
from core import axes
from core.config import GPT2Config
from core.config.gpt2 import PRESETS as GPT2S


def plan(tmp_path: Path, weights: dict[str, np.ndarray], **config) -> importer.Plan:
    return importer.plan_source(
        hf.write(tmp_path / "source", weights, config={**hf.CONFIG, **config})
    )


def problems(tmp_path: Path, weights: dict[str, np.ndarray], **config) -> tuple[str, ...]:
    with pytest.raises(ConvertError) as told:
        plan(tmp_path, weights, **config)
    return told.value.problems


@pytest.mark.parametrize("config", [*GPT2S.values(), GPT2Config(tie_word_embeddings=False)])
def test_the_table_has_one_row_for_every_tensor_and_inverts(config: GPT2Config):
    moves = mapping.moves(tables.HF.table(config), config)
    assert [move.target for move in moves] == list(config.tensors())
    assert len({move.source for move in moves}) == len(moves)
    for move in moves:
        left, right = move.layout.split(" -> ")
        assert right == config.tensors()[move.target]
        assert axes.inverse(axes.inverse(move.layout)) == move.layout
        assert np.prod(axes.shape(left, config.axes)) == np.prod(axes.shape(right, config.axes))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_prefix_and_mask_buffers_make_no_difference(tmp_path: Path, prefix: bool, masks: bool):
    weights = hf.tensors() | (hf.masks() if masks else {})
    match = plan(tmp_path, hf.prefixed(weights) if prefix else weights).match
    assert len(match.moves) == 12 * hf.L + 4
    assert len(match.dropped) == (2 * hf.L if masks else 0)
    assert not any(name.endswith("c_attn.bias") for name in match.dropped)


def test_all_mismatches_are_reported_together(tmp_path: Path):
    weights = hf.tensors()
    weights["h.1.attn.c_atn.weight"] = weights.pop("h.1.attn.c_attn.weight")
    weights["h.2.mlp.c_fc.weight"] = weights["h.2.mlp.c_fc.weight"].T.copy()
    weights["ln_f.bias"] = weights["ln_f.bias"].astype(np.float64)
    weights["transformer.wpe.weight"] = weights["wpe.weight"]
    assert sorted(problems(tmp_path, weights)) == [
        "blocks.1.attn.qkv.kernel is missing, looked for transformer.h.1.attn.c_attn.weight",
        "h.1.attn.c_atn.weight is not of this model (nearest of the missing: "
        "transformer.h.1.attn.c_attn.weight)",
        "h.2.mlp.c_fc.weight has shape [20, 14], expected [14, 20]",
        "ln_f.bias is float64, expected one of float32, bfloat16, float16",
        "transformer.wpe.weight and wpe.weight are the same tensor twice",
    ]


def test_a_wrong_config_is_reported_in_one_line_with_its_sizes(tmp_path: Path):
    with pytest.raises(ConvertError) as told:
        plan(tmp_path, hf.tensors(), n_layer=2)
    assert len(told.value.problems) == 12
    message = str(told.value)
    assert (
        "12 mismatches with the config (vocab_size=37, n_positions=11, n_embd=14, n_layer=2"
        in message
    )
    assert message.endswith("; and 4 more")
    assert "\n" not in message


def test_a_layer_too_few_is_missing(tmp_path: Path):
    found = problems(tmp_path, hf.tensors(), n_layer=4)
    assert len(found) == 12
    assert all(problem.startswith("blocks.3.") for problem in found)


def test_a_head_that_repeats_the_embedding_is_tied(tmp_path: Path):
    weights = hf.tensors()
    match = plan(tmp_path, weights | {"lm_head.weight": weights["wte.weight"].copy()}).match
    assert match.config.tie_word_embeddings
    assert match.dropped == {"lm_head.weight": "repeats wte.weight: the head is tied"}


def test_a_head_of_its_own_is_untied(tmp_path: Path):
    weights = hf.tensors()
    head = weights["wte.weight"].copy()
    head[-1, -1] = np.nextafter(head[-1, -1], np.float32(9))
    planned = plan(tmp_path, weights | {"lm_head.weight": head})
    assert not planned.match.config.tie_word_embeddings
    assert planned.match.moves[-1].target == "lm_head.kernel"
    assert "the file holds another head" in planned.source.notes[0]
    assert plan(tmp_path, weights | {"lm_head.weight": weights["wte.weight"]}).source.notes == ()


def test_a_head_declared_untied_is_kept_even_if_equal_and_missed_if_absent(tmp_path: Path):
    weights = hf.tensors()
    head = {"lm_head.weight": weights["wte.weight"].copy()}
    match = plan(tmp_path / "equal", weights | head, tie_word_embeddings=False).match
    assert not match.config.tie_word_embeddings
    assert not match.dropped
    assert problems(tmp_path / "absent", weights, tie_word_embeddings=False) == (
        "lm_head.kernel is missing, looked for lm_head.weight",
    )


def test_a_head_of_the_wrong_shape_is_a_mismatch(tmp_path: Path):
    head = {"lm_head.weight": np.zeros((hf.V + 1, hf.D), np.float32)}
    assert problems(tmp_path, hf.tensors() | head) == (
        "lm_head.weight has shape [38, 14], expected [37, 14]",
    )


def test_a_difference_late_in_a_large_head_is_seen():
    from convert.sources import SourceTensor

    a, b = np.zeros((70, 100), np.uint8), np.zeros((70, 100), np.uint8)
    b[-1, -1] = 1
    tensors = [SourceTensor("t", "uint8", x.shape, lambda x=x: x) for x in (a, b, a.copy())]
    assert not mapping._same_bytes(tensors[0], tensors[1], chunk=64)
    assert mapping._same_bytes(tensors[0], tensors[2], chunk=64)


def test_unknown_and_unsupported_config_keys_are_refused_together(tmp_path: Path):
    folder = hf.write(
        tmp_path / "gpt",
        hf.tensors(),
        config={**hf.CONFIG, "n_embed": 3, "add_cross_attention": True},
    )
    with pytest.raises(ConvertError, match="n_embed") as told:
        importer.plan_source(folder)
    assert "did you mean 'n_embd'" in str(told.value)
    assert "add_cross_attention=True is not implemented" in str(told.value)
    assert "\n" not in str(told.value)


def test_another_family_is_refused_by_name(tmp_path: Path):
    folder = hf.write(tmp_path / "llama", hf.tensors(), config={"model_type": "llama"})
    with pytest.raises(ConvertError, match="model_type is 'llama'; expected one of gpt2"):
        importer.plan_source(folder)


def test_planning_reads_no_weights(tmp_path: Path):
    folder = hf.write(tmp_path / "gpt", hf.tensors())
    source = open_source(folder)
    (folder / "model.safetensors").unlink()
    config = tables.read_config(folder, source.config)
    assert mapping.match(tables.table(source, config), config, source.tensors).moves


@pytest.mark.parametrize("shape", [(), (0, 2**61), (2**61, 0)])
def test_a_head_and_an_embedding_of_no_possible_shape_are_two_mismatches(shape: tuple[int, ...]):
    def read() -> np.ndarray:
        return np.ndarray(shape, np.float32, bytes(4))

    names = ("lm_head.weight", "transformer.wte.weight")
    tensors = {name: SourceTensor(name, "float32", shape, read) for name in names}
    with pytest.raises(ConvertError) as told:
        mapping.match(gpt2.HF, GPT2Config(n_layer=1), tensors)
    assert sum("expected [50257, 768]" in problem for problem in told.value.problems) == 2


def test_a_checkpoint_of_another_model_is_told_without_comparing_all_names():
    tensors = {
        name: SourceTensor(name, "float32", (1,), lambda: np.zeros(1, np.float32))
        for i in range(2000)
        for name in [f"model.layers.{i}.self_attn.q_proj.weight"]
    }
    start = time.perf_counter()
    with pytest.raises(ConvertError, match=r"and 257\d more"):
        mapping.match(gpt2.HF, GPT2S["gpt2-xl"], tensors)
    assert time.perf_counter() - start < 10
