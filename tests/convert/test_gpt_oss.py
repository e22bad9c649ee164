"""GPT-OSS: as Hugging Face and OpenAI store it, packed and dense, there and back."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import convert
import gpt_oss_checkpoints as oss
import hf_checkpoints as hf
from convert import ConvertError, importer, mapping, mxfp4, tables
from convert.tables import gpt_oss
from core import axes, checkpoint
from core.checkpoint import ModelFolder
from core.config import PRESETS, GptOssConfig
from hub_server import Hub, serve

Weights = dict[str, np.ndarray]
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def holds(out: Path, wanted: Mapping[str, np.ndarray]) -> ModelFolder:
    """Opens a model folder after checking that it holds just these parameters, to the bit."""
    folder = checkpoint.open(out)
    assert folder.tensors.keys() == wanted.keys()
    for name, array in wanted.items():
        assert hf.same_bits(folder.tensors[name], np.ascontiguousarray(array)), name
    return folder


def converted(source: Path, tmp_path: Path, **options: Any) -> Path:
    return convert.convert(source, out=tmp_path / "out", **options)


def refused(source: Path, tmp_path: Path, **options: Any) -> ConvertError:
    with pytest.raises(ConvertError) as told:
        converted(source, tmp_path, **options)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(told.value)
    return told.value


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return oss.write(tmp_path / "source", oss.packed(), oss.PACKED_CONFIG)


class TestHuggingFace:
    def test_packed_experts_stay_the_bytes_they_are(self, packed: Path, tmp_path: Path):
        out = converted(packed, tmp_path)
        folder = holds(out, oss.as_parameters(oss.packed()))
        assert folder.config == GptOssConfig.from_hf(oss.PACKED_CONFIG)
        assert (out / "chat_template.jinja").read_bytes() == oss.FILES["chat_template.jinja"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
    def test_dense_experts_are_read_in_any_type(self, tmp_path: Path, dtype: str):
        weights = oss.dense(dtype)
        source = oss.write(tmp_path / "source", weights, oss.CONFIG)
        folder = holds(converted(source, tmp_path), oss.as_parameters(weights))
        assert folder.config == GptOssConfig.from_hf(oss.CONFIG)

    def test_the_index_decides_where_blocks_and_scales_lie(self, tmp_path: Path):
        """The published files are numbered from 0 and named after one less than there are."""
        weights = oss.packed()
        blocks = {n: w for n, w in weights.items() if n.endswith("_blocks")}
        scales = {n: w for n, w in weights.items() if n.endswith("_scales")}
        rest = {n: w for n, w in weights.items() if n not in {*blocks, *scales}}
        shards = [scales, blocks, rest]
        names = [f"model-{k:05d}-of-00002.safetensors" for k in range(3)]
        source = oss.write_shards(
            tmp_path / "source", dict(zip(names, shards, strict=True)), oss.PACKED_CONFIG
        )
        oss.write(source / "original", oss.original(oss.packed(seed=1)), oss.ORIGINAL_CONFIG)
        holds(converted(source, tmp_path), oss.as_parameters(weights))

    def test_names_without_the_model_prefix_are_known(self, tmp_path: Path):
        weights = {n.removeprefix("model."): w for n, w in oss.packed().items()}
        source = oss.write(tmp_path / "source", weights, oss.PACKED_CONFIG)
        holds(converted(source, tmp_path), oss.as_parameters(oss.packed()))

    def test_the_tensors_say_whether_experts_are_packed_if_the_config_does_not(
        self, tmp_path: Path
    ):
        source = oss.write(tmp_path / "source", oss.packed(), oss.CONFIG)
        assert importer.plan_source(source).source.notes == ()
        holds(converted(source, tmp_path), oss.as_parameters(oss.packed()))

    def test_dense_experts_that_the_config_calls_packed_stay_dense_and_it_is_said(
        self, tmp_path: Path
    ):
        source = oss.write(tmp_path / "source", oss.dense(), oss.PACKED_CONFIG)
        notes: list[str] = []
        folder = holds(
            converted(source, tmp_path, on_note=notes.append), oss.as_parameters(oss.dense())
        )
        assert notes == [
            "config.json says mxfp4, but the experts are stored dense; they stay dense"
        ]
        assert folder.manifest["source"]["notes"] == notes

    def test_a_rope_scaling_that_does_not_mention_truncate_is_said(self, tmp_path: Path):
        rope = {k: v for k, v in oss.CONFIG["rope_scaling"].items() if k != "truncate"}
        source = oss.write(
            tmp_path / "source", oss.packed(), {**oss.PACKED_CONFIG, "rope_scaling": rope}
        )
        plan = importer.plan_source(source)
        assert isinstance(plan.config, GptOssConfig)
        assert plan.config.rope_truncate
        assert len(plan.source.notes) == 1
        assert "the rope scaling does not say 'truncate'" in plan.source.notes[0]

    def test_weights_that_transformers_unpacked_and_saved_again_are_recognised(
        self, tmp_path: Path
    ):
        """Its `save_pretrained` keeps the packed names for dense tensors, which it then cannot read itself."""
        weights = {
            name + "_blocks"
            if name.endswith("experts.gate_up_proj") or name.endswith("down_proj")
            else name: w
            for name, w in oss.unpacked().items()
        }
        source = oss.write(tmp_path / "source", weights, oss.CONFIG)
        notes: list[str] = []
        folder = holds(
            converted(source, tmp_path, on_note=notes.append), oss.as_parameters(oss.unpacked())
        )
        assert isinstance(folder.config, GptOssConfig)
        assert folder.config.quantization is None
        assert len(notes) == 1
        assert "the experts are dense but named _blocks" in notes[0]


class TestOriginal:
    def test_it_is_the_same_model_as_hugging_face_s(self, tmp_path: Path):
        weights = oss.packed()
        source = oss.write(
            tmp_path / "source", oss.original(weights), oss.ORIGINAL_CONFIG, files={}
        )
        folder = holds(converted(source, tmp_path), oss.as_parameters(weights))
        settings = {"eos_token_id": None, "pad_token_id": None, "router_aux_loss_coef": 0.001}
        assert folder.config == GptOssConfig.from_hf({**oss.PACKED_CONFIG, **settings})

    def test_shards_without_an_index_are_found(self, tmp_path: Path):
        source = self.sharded(tmp_path, 3)
        out = converted(source, tmp_path)
        holds(out, oss.as_parameters(oss.packed()))
        assert len(checkpoint.open(out).manifest["source"]["files"]) == 4

    def test_a_lacking_shard_is_told(self, tmp_path: Path):
        source = self.sharded(tmp_path, 3)
        (source / "model--00002-of-00003.safetensors").unlink()
        error = refused(source, tmp_path)
        assert "found 2 of 3 shards (model--00001-of-00003.safetensors, model--0000" in str(error)

    def test_a_tensor_in_two_shards_is_told(self, tmp_path: Path):
        source = self.sharded(tmp_path, 2, twice="norm.scale")
        assert "norm.scale lies in another shard too" in str(refused(source, tmp_path))

    def test_unknown_keys_are_told_with_the_nearest(self, tmp_path: Path):
        config = {**oss.ORIGINAL_CONFIG, "rope_ntk_gamma": 1, "sliding_windw": 7}
        source = oss.write(tmp_path / "source", oss.original(oss.packed()), config)
        error = str(refused(source, tmp_path))
        assert "unknown key 'rope_ntk_gamma' (did you mean 'rope_ntk_alpha'?)" in error
        assert "unknown key 'sliding_windw' (did you mean 'sliding_window'?)" in error

    def test_openai_s_vocabulary_has_its_end_tokens(self):
        config = {**oss.ORIGINAL_CONFIG, "vocab_size": 201088}
        model = gpt_oss.read_original_config(config, {})
        assert (model.eos_token_id, model.pad_token_id) == (200002, 199999)

    def sharded(self, tmp_path: Path, count: int, twice: str | None = None) -> Path:
        weights = oss.original(oss.packed())
        names = list(weights)
        shards = {
            f"model--{k + 1:05d}-of-{count:05d}.safetensors": {
                name: weights[name] for name in {*names[k::count], *([twice] if twice else [])}
            }
            for k in range(count)
        }
        return oss.write_shards(tmp_path / "source", shards, oss.ORIGINAL_CONFIG, index=False)


class TestUnpacking:
    def test_dense_experts_are_what_the_codes_stand_for(self, packed: Path, tmp_path: Path):
        out = converted(packed, tmp_path, experts="bfloat16")
        folder = holds(out, oss.as_parameters(oss.unpacked()))
        assert folder.config == GptOssConfig.from_hf(oss.CONFIG)
        entry = folder.manifest["tensors"]["blocks.1.moe.gate_up.kernel"]
        assert entry["sources"] == [f"{GATE_UP}_blocks", f"{GATE_UP}_scales"]
        assert convert.verify(out, against=packed)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_other_types_are_casts_of_it(self, packed: Path, tmp_path: Path, dtype: str):
        out = converted(packed, tmp_path, experts=dtype)
        experts = (".kernel",)
        wanted = {
            name: w.astype(dtype)
            if ".moe." in name and ".router." not in name and name.endswith(experts)
            else w
            for name, w in oss.as_parameters(oss.unpacked()).items()
        }
        holds(out, wanted)

    def test_a_cast_of_all_weights_leaves_packed_experts_alone(self, packed: Path, tmp_path: Path):
        wanted = {
            name: w if w.dtype == np.uint8 else w.astype(np.float32)
            for name, w in oss.as_parameters(oss.packed()).items()
        }
        holds(converted(packed, tmp_path, dtype="float32"), wanted)
        assert convert.verify(tmp_path / "out", against=packed)

    def test_dense_experts_can_be_cast_alone(self, tmp_path: Path):
        source = oss.write(tmp_path / "source", oss.dense("float32"), oss.CONFIG)
        out = converted(source, tmp_path, experts="bfloat16")
        kinds = {n: x.dtype.name for n, x in checkpoint.open(out).tensors.items()}
        cast = {n for n, kind in kinds.items() if kind == "bfloat16"}
        assert cast == {f"blocks.{i}.{n}" for i in range(oss.L) for n in mxfp4.KERNELS}

    def test_dense_experts_are_not_packed(self, tmp_path: Path):
        source = oss.write(tmp_path / "source", oss.dense(), oss.CONFIG)
        error = refused(source, tmp_path, experts="mxfp4")
        assert "the experts are stored dense, and packing them as mxfp4 would round them" in str(
            error
        )

    def test_a_model_without_experts_is_told(self, tmp_path: Path):
        source = hf.write(tmp_path / "source", hf.tensors())
        assert "a gpt2 has no experts to write as bfloat16" in str(
            refused(source, tmp_path, experts="bfloat16")
        )

    def test_the_command_line(self, packed: Path, tmp_path: Path):
        run = functools.partial(hf.run, "convert", f"--source={packed}", cwd=tmp_path)
        plan = run("--experts=bfloat16", "--dry_run").stdout
        assert f"3 x blocks.*.moe.down.kernel     bfloat16[{oss.E}, {oss.F}, {oss.D}]" in plan
        done = run("--experts=bfloat16", "--out=out")
        assert (done.returncode, done.stderr) == (0, "")
        holds(tmp_path / "out", oss.as_parameters(oss.unpacked()))


class TestMxfp4:
    def test_the_sixteen_codes_in_order(self):
        blocks = np.zeros((1, 1, 1, 16), np.uint8)
        blocks[0, 0, 0, :8] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
        scales = np.full((1, 1, 1), 127, np.uint8)
        (part,) = mxfp4.unpack(blocks, scales, "x")
        expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
        assert part.dtype == ml_dtypes.bfloat16
        assert part.shape == (32, 1)
        assert hf.same_bits(part[:16, 0], np.array(expected, ml_dtypes.bfloat16))

    def test_every_code_at_every_scale_is_exact(self):
        """Against the formula in float64; beyond bfloat16 it is infinite there as here."""
        codes = np.tile(np.arange(16, dtype=np.uint8), (1, 255, 2))
        scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1)
        with np.errstate(over="ignore"):
            expected = oss.value(codes, scales).astype(ml_dtypes.bfloat16)
        finite = slice(0, 253)
        (found,) = mxfp4.unpack(oss.pack(codes)[:, finite], scales[:, finite], "x")
        assert hf.same_bits(np.ascontiguousarray(found.T), expected[0, finite])
        assert np.isfinite(found).all()
        pairs = mxfp4.table()[scales[0].astype(np.uint16) << 8 | oss.pack(codes)[0, :, 0]]
        low = (pairs & 0xFFFF).astype(np.uint16).view(ml_dtypes.bfloat16)
        assert hf.same_bits(low, np.ascontiguousarray(expected[0, :, 0::2]))

    @pytest.mark.parametrize(("scale", "code"), [(253, 6), (253, 15), (254, 4)])
    def test_what_bfloat16_cannot_hold_is_told(self, scale: int, code: int):
        codes = np.zeros((1, 2, 64), np.uint8)
        scales = np.full((1, 2, 2), scale, np.uint8)
        assert all(np.isfinite(part).all() for part in mxfp4.unpack(oss.pack(codes), scales, "x"))
        codes[0, 1, 40] = code
        with pytest.raises(ConvertError, match=f"x: with a scale byte of {scale} a number"):
            list(mxfp4.unpack(oss.pack(codes), scales, "x"))

    def test_it_never_holds_more_than_a_few_megabytes(self):
        """The gate and up of two experts of the published size: 33 MB each in bfloat16."""
        blocks = np.broadcast_to(np.zeros(16, np.uint8), (2, 2880, 2, 90, 16))
        scales = np.broadcast_to(np.full(90, 120, np.uint8), (2, 2880, 2, 90))
        sizes = [part.nbytes for part in mxfp4.unpack(blocks, scales, "x")]
        assert sum(sizes) == 2 * 33_177_600
        assert max(sizes) <= 5_000_000

    @pytest.mark.parametrize("experts", ["keep", "bfloat16"])
    @pytest.mark.parametrize(("name", "place"), [("gate_up", [3, 7, 1, 2]), ("down", [4, 127, 0])])
    def test_a_scale_that_is_no_number_is_told_with_its_place(
        self, tmp_path: Path, experts: str, name: str, place: list[int]
    ):
        weights = oss.packed()
        stored = f"model.layers.2.mlp.experts.{name}_proj_scales"
        shape = (oss.E, oss.F, 2, oss.D // 32) if name == "gate_up" else weights[stored].shape
        weights[stored].reshape(shape)[tuple(place)] = 255
        source = oss.write(tmp_path / "source", weights, oss.PACKED_CONFIG)
        error = str(refused(source, tmp_path, experts=experts))
        assert f"{stored}: the scale at {place} is 255" in error

    def test_the_place_counts_from_the_first_of_a_tensor_s_parts(self):
        scales = np.full((4, 5, 6), 120, np.uint8)
        scales[3, 1, 2] = 255
        with pytest.raises(ConvertError, match=r"x: the scale at \[3, 1, 2\] is 255"):
            list(mxfp4.checked(iter(scales), "x", scales.shape))
        scales[3, 1, 2] = 254
        assert np.array_equal(list(mxfp4.checked(iter(scales), "x", scales.shape)), scales)

    def test_experts_beyond_float16_are_told(self, tmp_path: Path):
        weights = oss.packed()
        weights[f"{GATE_UP}_blocks"][0, 0, 0, 0] = 0x07
        weights[f"{GATE_UP}_scales"][0, 0, 0] = 127 + 14
        source = oss.write(tmp_path / "source", weights, oss.PACKED_CONFIG)
        assert "98304 does not fit in float16" in str(refused(source, tmp_path, experts="float16"))


def drop(name: str) -> Callable[[Weights], Any]:
    return lambda weights: weights.pop(name)


def change(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({name: np.ascontiguousarray(change(weights[name]))})


class TestMutations:
    """One thing wrong in a packed checkpoint: nothing is written, and what it is is said."""

    @pytest.mark.parametrize(
        ("mutate", "says"),
        [
            (
                drop("model.layers.1.self_attn.k_proj.bias"),
                "blocks.1.attn.k.bias is missing, looked for model.layers.1.self_attn.k_proj.bias",
            ),
            (
                drop("model.layers.0.self_attn.sinks"),
                "blocks.0.attn.sinks is missing, looked for model.layers.0.self_attn.sinks",
            ),
            (drop(f"{GATE_UP}_scales"), f"{GATE_UP}_blocks has no {GATE_UP}_scales"),
            (
                drop(f"{GATE_UP}_blocks"),
                f"blocks.1.moe.gate_up.kernel.blocks is missing, looked for {GATE_UP}_blocks",
            ),
            (
                lambda weights: weights.update({f"{GATE_UP}_zeros": np.zeros(3, np.uint8)}),
                f"{GATE_UP}_zeros is not of this model",
            ),
            (
                lambda weights: weights.update(
                    {"model.layers.3.self_attn.sinks": np.zeros(oss.N, np.float32)}
                ),
                "model.layers.3.self_attn.sinks is not of this model",
            ),
            (
                change(f"{GATE_UP}_scales", lambda x: x[:, ::2]),
                f"{GATE_UP}_scales has shape [5, 96, 4], its blocks [5, 192, 4, 16]",
            ),
            (
                change(f"{GATE_UP}_blocks", lambda x: x.reshape(*x.shape[:2], -1)),
                f"{GATE_UP}_blocks is uint8[5, 192, 64]; expected uint8 of rank 4 that ends in 16",
            ),
            (
                change(f"{GATE_UP}_blocks", lambda x: x.astype(np.float32)),
                f"{GATE_UP}_blocks is float32[5, 192, 4, 16]; expected uint8",
            ),
            (
                change(f"{GATE_UP}_scales", lambda x: x.astype(np.float32)),
                f"{GATE_UP}_scales is float32, expected one of uint8",
            ),
            (
                change("model.layers.0.mlp.router.weight", lambda x: x.T),
                "model.layers.0.mlp.router.weight has shape [128, 5], expected [5, 128]",
            ),
            (
                change("model.norm.weight", lambda x: x.astype(np.float64)),
                "model.norm.weight is float64, expected one of float32, bfloat16, float16",
            ),
        ],
    )
    def test_it_is_refused(self, tmp_path: Path, mutate: Callable[[Weights], Any], says: str):
        weights = oss.packed()
        mutate(weights)
        source = oss.write(tmp_path / "source", weights, oss.PACKED_CONFIG)
        assert says in str(refused(source, tmp_path))

    def test_tensors_of_other_shapes_that_are_swapped_are_both_named(self, tmp_path: Path):
        weights = oss.packed()
        q, o = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qo")
        weights[q], weights[o] = weights[o], weights[q]
        source = oss.write(tmp_path / "source", weights, oss.PACKED_CONFIG)
        error = refused(source, tmp_path)
        assert sorted(error.problems) == [
            f"{o} has shape [48, 128], expected [128, 48]",
            f"{q} has shape [128, 48], expected [48, 128]",
        ]

    def test_packed_experts_that_lost_all_scales_are_not_taken_for_dense_ones(self, tmp_path: Path):
        weights = {n: w for n, w in oss.packed().items() if not n.endswith("_scales")}
        source = oss.write(tmp_path / "source", weights, oss.CONFIG)
        error = str(refused(source, tmp_path))
        assert "_proj_scales is missing, as are 5 more" in error
        assert "copy or download the checkpoint again" in error

    def test_an_original_without_scales_is_refused(self, tmp_path: Path):
        weights = oss.original(oss.packed())
        del weights["block.2.mlp.mlp2_weight.scales"]
        source = oss.write(tmp_path / "source", weights, oss.ORIGINAL_CONFIG)
        says = "block.2.mlp.mlp2_weight.blocks has no block.2.mlp.mlp2_weight.scales"
        assert says in str(refused(source, tmp_path))

    @pytest.mark.parametrize("experts", ["keep", "bfloat16"])
    def test_what_has_the_right_shape_but_not_the_right_bytes_is_found_by_verify(
        self, packed: Path, tmp_path: Path, experts: str
    ):
        """Keys and values swapped, and one byte with its nibbles the other way round."""
        out = converted(packed, tmp_path, experts=experts)
        weights = oss.packed()
        k, v = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv")
        weights[k], weights[v] = weights[v], weights[k]
        blocks = weights["model.layers.0.mlp.experts.down_proj_blocks"].reshape(-1)
        place = int(np.argmax(blocks >> 4 != blocks & 15))
        blocks[place] = blocks[place] >> 4 | blocks[place] << 4
        other = oss.write(tmp_path / "other", weights, oss.PACKED_CONFIG)
        with pytest.raises(ConvertError) as told:
            convert.verify(out, against=other)
        part = ".blocks" if experts == "keep" else ""
        names = {problem.split()[0] for problem in told.value.problems}
        wanted = {"blocks.1.attn.k.kernel", "blocks.1.attn.v.kernel"}
        assert names == wanted | {f"blocks.0.moe.down.kernel{part}"}


class TestExport:
    @pytest.mark.parametrize(
        ("weights", "config"),
        [(oss.packed(), oss.PACKED_CONFIG), (oss.dense(), oss.CONFIG)],
        ids=["packed", "dense"],
    )
    def test_hugging_face_s_tensors_come_back_to_the_bit(
        self, tmp_path: Path, weights: Weights, config: dict[str, Any]
    ):
        from safetensors.numpy import load_file

        source = oss.write(tmp_path / "source", weights, config)
        out = convert.export(converted(source, tmp_path), to="hf", out=tmp_path / "exported")
        found = load_file(out / "model.safetensors")
        assert found.keys() == weights.keys()
        assert all(hf.same_bits(found[name], weights[name]) for name in weights)
        written = json.loads((out / "config.json").read_text())
        ours = {"transformers_version", "use_cache", "output_router_logits"}
        assert written.items() >= {k: v for k, v in config.items() if k not in ours}.items()
        assert ("quantization_config" in written) == ("quantization_config" in config)


@pytest.mark.parametrize(
    ("name", "quantization", "count"),
    [
        ("gpt-oss-20b", "mxfp4", 459),
        ("gpt-oss-20b", None, 411),
        ("gpt-oss-120b", "mxfp4", 687),
        ("gpt-oss-120b", None, 615),
    ],
)
def test_the_published_sizes_have_as_many_tensors_as_published(
    name: str, quantization: str | None, count: int
):
    model = PRESETS[name]
    assert isinstance(model, GptOssConfig)
    model = model if quantization else model.dense
    moves = mapping.moves(tables.HF.table(model), model)
    assert len({move.source for move in moves}) == len(moves) == count
    assert [move.target for move in moves] == list(model.tensors())


@pytest.mark.parametrize("quantization", ["mxfp4", None])
def test_every_row_spells_its_parameter(quantization: str | None):
    model = GptOssConfig.from_hf(oss.PACKED_CONFIG if quantization else oss.CONFIG)
    rows = [gpt_oss.hf_table(model)]
    rows += [gpt_oss.ORIGINAL] if quantization else [gpt_oss.HF_RESAVED]
    for table in rows:
        for move in mapping.moves(table, model):
            left, right = move.layout.split(" -> ")
            assert right == model.tensors()[move.target]
            assert np.prod(axes.shape(left, model.axes)) == np.prod(axes.shape(right, model.axes))


def test_by_name_only_hugging_face_s_files_are_fetched(tmp_path: Path):
    source = oss.write(tmp_path / "source", oss.packed(), oss.PACKED_CONFIG)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    index = {"weight_map": dict.fromkeys(oss.packed(), "model-00000-of-00000.safetensors")}
    files["model-00000-of-00000.safetensors"] = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    others = {
        "original/model.safetensors": b"x",
        "original/config.json": b"{}",
        "metal/model.bin": b"x",
    }
    commit = "0" * 40
    hub = Hub(repos={"openai/gpt-oss-20b": {commit: files | others}}, branches={"main": commit})
    with serve(hub) as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "PATH": ""}
        done = hf.run("convert", "--model=gpt-oss-20b", cwd=tmp_path, env=env)
        assert (done.returncode, done.stdout) == (0, "models/gpt-oss-20b\n"), done.stderr
        assert {file.partition("/")[2] for file in hub.resolved()} == files.keys()
    holds(tmp_path / "models/gpt-oss-20b", oss.as_parameters(oss.packed()))


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def state(model: Any) -> Weights:
    """A torch model's parameters in float32, which holds every bfloat16."""
    return {n: w.float().numpy() for n, w in model.state_dict().items()}


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parity
class TestTransformers:
    def test_the_decoders_agree_on_every_byte_at_every_scale(self, transformers: Any):
        torch = pytest.importorskip("torch")
        theirs = pytest.importorskip("transformers.integrations.mxfp4")
        scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1).repeat(16, axis=2)
        blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(255, axis=1)
        found = theirs.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
        bits = found.view(torch.int16).numpy().view(np.uint16)
        pairs = mxfp4.table()[scales[0, :, 0].astype(np.uint16)[:, None] << 8 | np.arange(256)]
        assert np.array_equal(bits[0].T[:, 0::2], pairs & 0xFFFF)
        assert np.array_equal(bits[0].T[:, 1::2], pairs >> 16)
        (ours,) = mxfp4.unpack(blocks[:, :253], scales[:, :253], "x")
        assert np.array_equal(bits[0, :, :253], ours.view(np.uint16))

    def test_what_it_saves_is_read_and_what_is_exported_it_reads(
        self, transformers: Any, tmp_path: Path
    ):
        self.model(transformers).save_pretrained(tmp_path / "theirs")
        model = self.load(transformers, tmp_path / "theirs")
        out = converted(tmp_path / "theirs", tmp_path)
        saved = state(model)
        wanted = oss.as_parameters(saved)
        folder = checkpoint.open(out)
        assert folder.tensors.keys() == wanted.keys()
        for name, w in wanted.items():
            assert np.array_equal(folder.tensors[name].astype(np.float32), w), name
        again = self.load(transformers, convert.export(out, out=tmp_path / "exported"))
        assert equal(state(again), saved)
        assert np.array_equal(self.logits(again), self.logits(model))

    def test_it_unpacks_to_the_same_model(self, transformers: Any, packed: Path, tmp_path: Path):
        """Ours, exported dense, has no missing or unexpected tensor and the logits of theirs, bit for bit."""
        theirs = self.unpacked(transformers, packed)
        out = converted(packed, tmp_path, experts="bfloat16")
        ours = self.load(transformers, convert.export(out, out=tmp_path / "exported"))
        assert equal(state(ours), state(theirs))
        assert np.array_equal(self.logits(ours), self.logits(theirs))

    def test_it_reads_packed_experts_that_were_exported(
        self, transformers: Any, packed: Path, tmp_path: Path
    ):
        exported = convert.export(converted(packed, tmp_path), out=tmp_path / "exported")
        ours, theirs = (self.unpacked(transformers, path) for path in (exported, packed))
        assert equal(state(ours), state(theirs))

    def test_what_it_unpacks_and_saves_is_read_as_it_was_meant(
        self, transformers: Any, packed: Path, tmp_path: Path
    ):
        self.unpacked(transformers, packed).save_pretrained(tmp_path / "saved")
        out = converted(tmp_path / "saved", tmp_path)
        holds(out, oss.as_parameters(oss.unpacked()))

    def model(self, transformers: Any) -> Any:
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        config = transformers.GptOssConfig(**oss.CONFIG)
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        return model.eval()

    def load(self, transformers: Any, path: Path) -> Any:
        model, info = transformers.GptOssForCausalLM.from_pretrained(
            path, dtype="auto", output_loading_info=True
        )
        assert not any(
            info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        return model.eval()

    def unpacked(self, transformers: Any, path: Path) -> Any:
        return transformers.GptOssForCausalLM.from_pretrained(
            path, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype="bfloat16"
        ).eval()

    def logits(self, model: Any) -> np.ndarray:
        torch = pytest.importorskip("torch")
        tokens = torch.arange(2 * 11).reshape(2, 11) % oss.V
        with torch.no_grad():
            return model(tokens).logits.float().numpy()
