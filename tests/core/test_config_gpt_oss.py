"""GptOssConfig: the published sizes, every spelling of a config.json, and what it refuses."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt_oss_checkpoints as oss
from core import axes
from core import config as config_lib
from core.config import PRESETS, ConfigError, GptOssConfig

# openai/gpt-oss-20b's config.json, key for key.
HUB_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": oss.MXFP4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
ROPE: dict[str, Any] = HUB_20B["rope_scaling"]


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in HUB_20B.items() if key not in keys} | changes


def preset(name: str) -> GptOssConfig:
    config = PRESETS[name]
    assert isinstance(config, GptOssConfig)
    return config


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as told:
        GptOssConfig.from_hf(config)
    assert "\n" not in str(told.value)
    return str(told.value)


def nbytes(config: GptOssConfig) -> int:
    """The size of all tensors, with bytes for the packed ones and bfloat16 for all else."""
    return sum(
        math.prod(axes.shape(word, config.axes)) * (1 if name.endswith(("blocks", "scales")) else 2)
        for name, word in config.tensors().items()
    )


class TestPublishedSizes:
    def test_the_hub_s_20b_is_the_preset(self):
        assert GptOssConfig.from_hf(HUB_20B) == preset("gpt-oss-20b")
        assert GptOssConfig.notes_on_hf(HUB_20B) == ()

    def test_the_120b_has_hugging_face_s_default_sizes(self):
        large = without("layer_types", num_hidden_layers=36, num_local_experts=128)
        assert GptOssConfig.from_hf(large) == preset("gpt-oss-120b")
        trained = {"eos_token_id": 200002, "pad_token_id": 199999, "router_aux_loss_coef": 0.9}
        assert dataclasses.replace(GptOssConfig(), **trained) == preset("gpt-oss-120b").dense

    @pytest.mark.parametrize(
        ("name", "total", "active", "layer", "router", "packed", "dense"),
        [
            (
                "gpt-oss-20b",
                20_914_757_184,
                3_608_307_264,
                823_186_976,
                92_192,
                13_761_264_768,
                41_829_514_368,
            ),
            (
                "gpt-oss-120b",
                116_829_156_672,
                5_132_849_472,
                3_213_080_192,
                368_768,
                65_248_815_744,
                233_658_313_344,
            ),
        ],
    )
    def test_counts_are_the_published(
        self, name: str, total: int, active: int, layer: int, router: int, packed: int, dense: int
    ):
        config = preset(name)
        assert config.parameter_count == config.dense.parameter_count == total
        assert config.active_parameter_count == config.dense.active_parameter_count == active
        words = {n: w for n, w in config.dense.tensors().items() if n.startswith("blocks.7.")}
        assert config.count(words.values()) == layer
        attention = [w for n, w in words.items() if ".attn." in n]
        assert config.count(attention) == 26_550_144
        assert config.count(w for n, w in words.items() if ".router." in n) == router
        experts = [w for n, w in words.items() if ".gate_up." in n or ".down." in n]
        assert config.count(experts) == 24_891_840 * config.num_local_experts
        assert (nbytes(config), nbytes(config.dense)) == (packed, dense)

    def test_tensor_counts_are_the_published(self):
        for name, packed, dense in (("gpt-oss-20b", 459, 411), ("gpt-oss-120b", 687, 615)):
            assert len(preset(name).tensors()) == packed
            assert len(preset(name).dense.tensors()) == dense

    def test_layers_alternate_and_the_first_slides(self):
        assert preset("gpt-oss-20b").windows == (128, None) * 12
        assert GptOssConfig(num_hidden_layers=3).windows == (128, None, 128)


class TestSpellings:
    """However a file says it, it is the same model."""

    same = preset("gpt-oss-20b")

    def test_transformers_5_says_rope_parameters(self):
        config = without(
            "rope_scaling", "rope_theta", "experts_per_token", "initial_context_length"
        )
        rope = {**ROPE, "rope_theta": 150000.0}
        assert GptOssConfig.from_hf({**config, "rope_parameters": rope}) == self.same
        extra = {"rope_parameters": rope, "swiglu_alpha": 1.702, "dtype": "bfloat16"}
        assert GptOssConfig.from_hf({**config, **extra, "bos_token_id": None}) == self.same

    def test_both_at_once_may_agree(self):
        rope = {**ROPE, "rope_theta": 150000}
        assert GptOssConfig.from_hf({**HUB_20B, "rope_parameters": rope}) == self.same

    @pytest.mark.parametrize(
        "absent",
        [
            ("layer_types",),
            ("rope_scaling",),
            ("rope_scaling", "rope_theta", "initial_context_length"),
            ("experts_per_token",),
            ("num_experts_per_tok",),
            ("swiglu_limit", "sliding_window", "head_dim", "rms_norm_eps"),
        ],
        ids=str,
    )
    def test_what_is_absent_is_as_published(self, absent: tuple[str, ...]):
        config = without(*absent)
        assert GptOssConfig.from_hf(config) == self.same
        assert GptOssConfig.notes_on_hf(config) == ()

    def test_num_experts_is_an_alias(self):
        config = without("num_local_experts", num_experts=32)
        assert GptOssConfig.from_hf(config) == self.same

    def test_betas_that_are_absent_or_null_are_yarn_s(self):
        rope = {key: value for key, value in ROPE.items() if key != "beta_slow"}
        config = {**HUB_20B, "rope_scaling": {**rope, "beta_fast": None}}
        assert GptOssConfig.from_hf(config) == self.same

    def test_an_absent_truncate_means_true_as_in_transformers_and_a_note(self):
        rope = {key: value for key, value in ROPE.items() if key != "truncate"}
        for config in (
            {**HUB_20B, "rope_scaling": rope},
            without("rope_scaling", rope_parameters=rope),
        ):
            assert GptOssConfig.from_hf(config) == dataclasses.replace(
                self.same, rope_truncate=True
            )
            (note,) = GptOssConfig.notes_on_hf(config)
            assert "does not say 'truncate'" in note
            assert "truncate=false" in note

    def test_several_ends_of_text_are_kept_in_order(self):
        ends = [200002, 199999, 200012]
        config = GptOssConfig.from_hf({**HUB_20B, "eos_token_id": ends})
        assert config.eos_token_id == config.eos_token_ids == tuple(ends)
        assert config.to_hf()["eos_token_id"] == config.to_dict()["eos_token_id"] == ends
        assert config_lib.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_no_quantization_config_is_dense(self):
        for config in (without("quantization_config"), {**HUB_20B, "quantization_config": None}):
            assert GptOssConfig.from_hf(config) == self.same.dense


class TestRefusals:
    def test_everything_that_is_not_understood_is_reported_at_once(self):
        config = {
            **HUB_20B,
            "sliding_windows": 64,
            "attention_bias": False,
            "hidden_act": "gelu",
            "rope_factor": 8.0,
            "add_cross_attention": True,
            "num_experts": 64,
            "rope_theta": 10000,
            "rope_scaling": {**ROPE, "rope_theta": 150000, "mscale": 1.0, "beta_fats": 3},
            "quantization_config": {"quant_method": "mxfp4", "bits": 4},
        }
        message = refused(config)
        for part in (
            "unknown key 'sliding_windows' (did you mean 'sliding_window'?)",
            "attention_bias=False is not implemented",
            "hidden_act='gelu' is not implemented",
            "unknown key 'rope_factor'",
            "add_cross_attention=True is not implemented",
            "num_experts=64 contradicts num_local_experts=32",
            "rope_theta=10000 contradicts 150000 elsewhere",
            "rope_scaling.mscale=1.0 is not implemented",
            "unknown key 'beta_fats' in rope_scaling (did you mean 'beta_fast'?)",
            "unknown key 'bits' in quantization_config",
        ):
            assert part in message

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            (
                {"rope_scaling": None},
                "rope_scaling=None is not implemented; expected the parameters",
            ),
            ({"rope_scaling": {**ROPE, "rope_type": "linear"}}, "rope_scaling.rope_type='linear'"),
            (
                {"rope_scaling": {"rope_type": "yarn"}},
                "rope_scaling lacks 'factor'; rope_scaling l",
            ),
            ({"rope_scaling": {"factor": 2.0}}, "rope_scaling lacks 'rope_type'; expected 'yarn'"),
            (
                {"rope_parameters": {**ROPE, "factor": 16.0}},
                "rope_parameters.factor=16.0 contradicts 32.0 elsewhere",
            ),
            ({"initial_context_length": 8192}, "initial_context_length=8192 contradicts 4096"),
            ({"experts_per_token": 2}, "num_experts_per_tok=4 contradicts num_experts_per_tok=2"),
            ({"quantization_config": {"quant_method": "fp8"}}, "'fp8', which is not implemented"),
            ({"quantization_config": "mxfp4x"}, "quantization_config says 'mxfp4x'"),
            ({"model_type": "gpt_neox"}, "model_type 'gpt_neox'; 'gpt_oss' is what can be read"),
        ],
        ids=str,
    )
    def test_contradictions_and_variants(self, changes: dict[str, Any], says: str):
        assert says in refused({**HUB_20B, **changes})

    def test_another_context_than_the_published_rope_is_told(self):
        message = refused(without("rope_scaling", initial_context_length=8192))
        assert "initial_context_length=8192 contradicts 4096 elsewhere" in message

    @pytest.mark.parametrize(
        ("variant", "says"),
        [
            ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 10,000"),
            ({"vocab_size": 10**400}, "is more than 1,099,511,627,776"),
            ({"num_key_value_heads": 3}, "does not divide into num_key_value_heads=3 groups"),
            ({"head_dim": 7}, "head_dim=7 is odd"),
            (
                {"num_experts_per_tok": 129},
                "num_experts_per_tok=129 is more than num_local_experts",
            ),
            (
                {"layer_types": ("full_attention",)},
                "layer_types has 1 entries for num_hidden_layers=36",
            ),
            ({"layer_types": ("linear_attention",) * 36}, "layer_types has 'linear_attention'"),
            ({"layer_types": (1,) * 36}, "is not tuple[str, ...] | None"),
            ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be positive"),
            ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan is not float"),
            ({"swiglu_limit": math.inf}, "swiglu_limit=inf is not float"),
            ({"rope_theta": 1.0}, "rope_theta=1.0 must be above 1"),
            ({"rope_factor": 0.5}, "rope_factor=0.5 must be between 1 and 1,000,000"),
            ({"rope_beta_slow": 40.0}, "rope_beta_fast=32.0 must be above rope_beta_slow=40.0"),
            ({"rope_beta_fast": 1e308}, "at most 1,000,000"),
            ({"rope_beta_slow": 1e-320}, "at least 1e-06"),
            ({"attention_dropout": 1.0}, "attention_dropout=1.0 is not a probability below 1"),
            ({"quantization": "int8"}, "quantization='int8' is not implemented; mxfp4 is"),
            ({"quantization": "mxfp4", "hidden_size": 48}, "hidden_size=48 is no multiple of 32"),
            ({"eos_token_id": (1, 201088)}, "is outside the vocabulary of 201088"),
            ({"eos_token_id": (1, True)}, "is not int | tuple[int, ...] | None"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_an_impossible_configuration_is_refused(self, variant: dict[str, Any], says: str):
        with pytest.raises(ConfigError) as told:
            GptOssConfig(**variant)
        assert says in str(told.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*ROPE, *oss.MXFP4, "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
WRONG = st.dictionaries(
    st.sampled_from([*HUB_20B, "rope_parameters", "num_experts", "pruned_heads"]) | st.text(),
    ANYTHING | st.sampled_from(["mxfp4", 10**400, ["full_attention"], [1], {"rope_type": []}]),
    max_size=4,
)


@settings(max_examples=300)
@given(WRONG)
def test_whatever_a_file_says_it_is_a_model_or_a_configerror(wrong: dict[str, Any]):
    config = {**HUB_20B, **wrong, "model_type": "gpt_oss"}
    try:
        model = GptOssConfig.from_hf(config)
        GptOssConfig.notes_on_hf(config)
    except ConfigError:
        return
    assert model.parameter_count > 0
    assert config_lib.from_hf(json.loads(json.dumps(model.to_hf()))) == model


VARIANTS: list[dict[str, Any]] = [
    {},
    {"quantization": "mxfp4"},
    {"layer_types": ("full_attention",) * 5, "num_hidden_layers": 5},
    {"rope_truncate": True, "rope_factor": 8.0, "initial_context_length": 512},
    {"rope_beta_fast": 16.0, "rope_beta_slow": 2.0, "rope_theta": 10000.0},
    {"swiglu_alpha": 1.5, "swiglu_limit": 3.0, "attention_dropout": 0.1},
    {"tie_word_embeddings": True, "eos_token_id": (3, 5), "bos_token_id": 4},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_configurations_survive_both_kinds_of_json(variant: dict[str, Any]):
    config = GptOssConfig(**variant)
    assert config_lib.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config_lib.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(GptOssConfig(**variant))


def test_what_is_exported_is_the_hub_s():
    written = preset("gpt-oss-20b").to_hf()
    theirs = without("transformers_version", "use_cache", "output_router_logits")
    assert written.items() >= theirs.items()
    assert "rope_parameters" not in written
    assert set(written) - set(theirs) == {"swiglu_alpha", "bos_token_id"}


def test_a_tied_head_is_no_tensor():
    tied = GptOssConfig(tie_word_embeddings=True)
    assert "lm_head.kernel" not in tied.tensors()
    assert tied.active_parameter_count == GptOssConfig().active_parameter_count


def test_from_dict_refuses_what_it_does_not_know():
    known = GptOssConfig().to_dict()
    with pytest.raises(ConfigError, match=r"unknown key 'rope_type' \(did you mean 'rope_theta'"):
        config_lib.from_dict({**known, "rope_type": "yarn"})
    with pytest.raises(ConfigError, match="expected one of gpt2, gpt_oss"):
        config_lib.from_dict({**known, "family": "gpt-oss"})


@pytest.mark.parity
def test_transformers_reads_what_is_exported_and_its_files_are_read(tmp_path):
    """Its version 5 fills in what it takes a file to mean, the rotations included."""
    transformers = pytest.importorskip("transformers")
    for variant in VARIANTS:
        ours = GptOssConfig(**variant).dense
        (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
        theirs = transformers.GptOssConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters == {
            "rope_type": "yarn",
            "rope_theta": ours.rope_theta,
            "factor": ours.rope_factor,
            "beta_fast": ours.rope_beta_fast,
            "beta_slow": ours.rope_beta_slow,
            "truncate": ours.rope_truncate,
            "original_max_position_embeddings": ours.initial_context_length,
        }
        theirs.save_pretrained(tmp_path)
        assert GptOssConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == ours
    theirs = transformers.GptOssConfig(num_hidden_layers=2)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert GptOssConfig.from_hf(written) == GptOssConfig(num_hidden_layers=2)
