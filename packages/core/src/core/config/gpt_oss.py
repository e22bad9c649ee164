"""GPT-OSS (OpenAI 2025): a mixture of experts with attention sinks, alternating windows and YaRN."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from core.config import base
from core.config.base import Config
from core.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
MXFP4_BLOCK = 32  # numbers along the contracted axis that share a scale; two to a byte

_TRUNCATED = (
    "the rope scaling does not say 'truncate', which to transformers means true; every GPT-OSS that OpenAI published "
    "has truncate=false, and that is another model: if this is one of those, add it to config.json and convert again"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(Config):
    """GPT-OSS; names and defaults are Hugging Face's (the sizes of the 120B model).

    The rope_* fields and `initial_context_length` (YaRN's original_max_position_embeddings) are what Hugging Face keeps
    in `rope_scaling`. `layer_types` None is sliding and full attention in turn, and becomes that. With `quantization`
    "mxfp4" the experts' kernels are stored as blocks of 32 four-bit numbers and their scales; None is dense.
    """

    family: ClassVar[str] = "gpt_oss"

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    max_position_embeddings: int = 131072
    sliding_window: int = 128
    layer_types: tuple[str, ...] | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = False
    initial_context_length: int = 4096
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    attention_dropout: float = 0.0
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    quantization: str | None = None

    def __post_init__(self) -> None:
        layers = self.num_hidden_layers
        if self.layer_types is None and type(layers) is int and layers <= base.MAX_LAYERS:
            object.__setattr__(self, "layer_types", ((SLIDING, FULL) * layers)[:layers])
        super().__post_init__()

    def _contradictions(self) -> Iterator[str]:
        sizes = list(base.positive(self, _SIZES))
        if sizes:
            yield from sizes
            return
        heads, keys = self.num_attention_heads, self.num_key_value_heads
        if heads % keys:
            yield f"num_attention_heads={heads} does not divide into num_key_value_heads={keys} groups"
        if self.head_dim % 2:
            yield f"head_dim={self.head_dim} is odd; its halves are rotated against each other"
        if self.num_experts_per_tok > self.num_local_experts:
            yield (
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_local_experts={self.num_local_experts}"
            )
        yield from self._wrong_layer_types()
        yield from self._wrong_rope()
        for name in ("rms_norm_eps", "swiglu_alpha", "swiglu_limit"):
            if getattr(self, name) <= 0:
                yield f"{name}={getattr(self, name)} must be positive"
        if not 0 <= self.attention_dropout < 1:
            yield f"attention_dropout={self.attention_dropout} is not a probability below 1"
        yield from base.foreign_tokens(self)
        yield from self._wrong_quantization()

    def _wrong_layer_types(self) -> Iterator[str]:
        kinds = self.layer_types or ()
        if unknown := sorted(set(kinds) - {SLIDING, FULL}):
            yield f"layer_types has {unknown[0]!r}; expected {SLIDING} or {FULL}"
        if len(kinds) != self.num_hidden_layers:
            yield f"layer_types has {len(kinds)} entries for num_hidden_layers={self.num_hidden_layers}"

    def _wrong_rope(self) -> Iterator[str]:
        if self.rope_theta <= 1:
            yield f"rope_theta={self.rope_theta} must be above 1"
        if not 1 <= self.rope_factor <= _MAX_FACTOR:
            yield f"rope_factor={self.rope_factor} must be between 1 and {_MAX_FACTOR:,}"
        if not 1 / _MAX_FACTOR <= self.rope_beta_slow < self.rope_beta_fast <= _MAX_FACTOR:
            yield (
                f"rope_beta_fast={self.rope_beta_fast} must be above rope_beta_slow={self.rope_beta_slow}, "
                f"at least {1 / _MAX_FACTOR} and at most {_MAX_FACTOR:,}"
            )

    def _wrong_quantization(self) -> Iterator[str]:
        if self.quantization not in (None, "mxfp4"):
            yield f"quantization={self.quantization!r} is not implemented; mxfp4 is"
        elif self.quantization == "mxfp4":
            for name in ("hidden_size", "intermediate_size"):
                if getattr(self, name) % MXFP4_BLOCK:
                    yield f"{name}={getattr(self, name)} is no multiple of {MXFP4_BLOCK}, as mxfp4 needs"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys a query of each layer sees, itself included; None is all before it."""
        return tuple(
            self.sliding_window if kind == SLIDING else None for kind in self.layer_types or ()
        )

    @property
    def context_length(self) -> int:
        return self.max_position_embeddings

    @property
    def axes(self) -> dict[str, int]:
        sizes = {
            "V": self.vocab_size,
            "L": self.num_hidden_layers,
            "D": self.hidden_size,
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "G": self.num_attention_heads // self.num_key_value_heads,
            "H": self.head_dim,
            "F": self.intermediate_size,
            "E": self.num_local_experts,
        }
        if self.quantization == "mxfp4":
            sizes |= {"Q": sizes["D"] // MXFP4_BLOCK, "R": sizes["F"] // MXFP4_BLOCK}
            sizes["Y"] = MXFP4_BLOCK // 2
        return sizes

    @property
    def dense(self) -> "GptOssConfig":
        """The same model with its experts' kernels unpacked."""
        return dataclasses.replace(self, quantization=None)

    def tensors(self) -> dict[str, str]:
        """Every parameter's name and axes. In "EF2" the gate and up columns alternate: the 2 is (gate, up).

        >>> GptOssConfig().tensors()["blocks.0.moe.gate_up.kernel"]
        'EDF2'
        >>> GptOssConfig(quantization="mxfp4").tensors()["blocks.0.moe.gate_up.kernel.blocks"]
        'EF2QY'
        """
        tensors = {"wte.embedding": "VD"}
        for layer in range(self.num_hidden_layers):
            tensors |= {f"blocks.{layer}.{name}": axes for name, axes in self._block().items()}
        tensors["norm_f.scale"] = "D"
        if not self.tie_word_embeddings:
            tensors["lm_head.kernel"] = "VD"
        return tensors

    def _block(self) -> dict[str, str]:
        gate_up, down = {"": "EDF2"}, {"": "EFD"}
        if self.quantization == "mxfp4":
            gate_up = {".blocks": "EF2QY", ".scales": "EF2Q"}
            down = {".blocks": "EDRY", ".scales": "EDR"}
        return {
            "norm_1.scale": "D",
            "attn.q.kernel": "DNH",
            "attn.q.bias": "NH",
            "attn.k.kernel": "DKH",
            "attn.k.bias": "KH",
            "attn.v.kernel": "DKH",
            "attn.v.bias": "KH",
            "attn.out.kernel": "NHD",
            "attn.out.bias": "D",
            "attn.sinks": "N",
            "norm_2.scale": "D",
            "moe.router.kernel": "DE",
            "moe.router.bias": "E",
            **{f"moe.gate_up.kernel{part}": axes for part, axes in gate_up.items()},
            "moe.gate_up.bias": "EF2",
            **{f"moe.down.kernel{part}": axes for part, axes in down.items()},
            "moe.down.bias": "ED",
        }

    @property
    def parameter_count(self) -> int:
        """How many numbers the model holds, however they are stored; a scale is no parameter.

        >>> GptOssConfig(quantization="mxfp4").parameter_count
        116829156672
        """
        return self.count(self.dense.tensors().values())

    @property
    def active_parameter_count(self) -> int:
        """How many numbers a token meets: those of its experts, and of the embeddings only the head's.

        >>> GptOssConfig().active_parameter_count
        5132849472
        """
        experts = self.count(
            axes.removeprefix("E")
            for name, axes in self.dense.tensors().items()
            if name.partition(".moe.")[2].startswith(("gate_up", "down"))
        )
        idle = self.num_local_experts - self.num_experts_per_tok
        lookup = 0 if self.tie_word_embeddings else self.count(["VD"])
        return self.parameter_count - idle * experts - lookup

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GptOssConfig":
        """Reads a Hugging Face config.json of model type "gpt_oss", of transformers 4 or 5; see `Config.from_hf`.

        A rope scaling that does not mention `truncate` truncates, as in transformers; see `notes_on_hf`.
        """
        if config.get("model_type") != "gpt_oss":
            raise ConfigError(
                f"config.json has model_type {config.get('model_type')!r}; 'gpt_oss' is what can be read"
            )
        wrong: list[str] = []
        plain = {key: value for key, value in config.items() if key not in _STRUCTURED}
        rope = _flat_rope(config, wrong)
        known = {field.name for field in dataclasses.fields(cls)} - _OURS
        settings = base.hf_settings(
            plain, known, aliases=_ALIASES, unsupported=_UNSUPPORTED, wrong=wrong
        )
        settings |= rope
        settings["quantization"] = _quantization(config.get("quantization_config"), wrong)
        if wrong:
            raise ConfigError("config.json cannot be converted: " + "; ".join(wrong))
        settings = base.without_foreign_tokens(settings, cls.vocab_size)
        return cls(**base.from_json(cls, settings))

    @classmethod
    def notes_on_hf(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        given = [config[key] for key in _ROPES if isinstance(config.get(key), Mapping)]
        return (_TRUNCATED,) if any("truncate" not in rope for rope in given) else ()

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json with which transformers 4 and 5 open this model."""
        settings = base.to_json(self)
        del settings["quantization"]
        scaling = {key: settings.pop(name) for key, name in _ROPE_FIELDS.items()}
        scaling["original_max_position_embeddings"] = settings["initial_context_length"]
        result = {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "hidden_act": "silu",
            "experts_per_token": self.num_experts_per_tok,
            **settings,
            "rope_scaling": {"rope_type": "yarn", **scaling},
        }
        if self.quantization == "mxfp4":
            result["quantization_config"] = {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            }
        return result


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "sliding_window",
    "initial_context_length",
)
_MAX_FACTOR = 1_000_000
_ALIASES = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True,),
    "hidden_act": (
        "silu",
    ),  # nominal: the experts' activation is the clamped SwiGLU whatever this says
    "output_router_logits": (True, False, None),  # training's business
    "partial_rotary_factor": (1.0, None),
}

_ROPES = ("rope_scaling", "rope_parameters")
_ROPE_FIELDS = {
    "factor": "rope_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "truncate": "rope_truncate",
}
_ROPE_KEYS = {
    **_ROPE_FIELDS,
    "original_max_position_embeddings": "initial_context_length",
    "rope_theta": "rope_theta",
}
_ROPE_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "rope_type": ("yarn",),
    "type": ("yarn",),
    "attention_factor": (None,),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "partial_rotary_factor": (1.0, None),
}
_STRUCTURED = {*_ROPES, "rope_theta", "initial_context_length", "quantization_config"}
_OURS = {*_ROPE_FIELDS.values(), "quantization"}  # fields that no config.json has under our names


def _flat_rope(config: Mapping[str, Any], wrong: list[str]) -> dict[str, Any]:
    """Returns what a config.json says of the rotations, in all its places, under the names of our fields."""
    flat: dict[str, Any] = {}

    def add(where: str, name: str, value: Any) -> None:
        if name in flat and flat[name] != value:
            wrong.append(f"{where}={value!r} contradicts {flat[name]!r} elsewhere")
        flat[name] = value

    for key in _ROPES:
        if key not in config:
            continue
        rope = config[key]
        if not isinstance(rope, Mapping):
            wrong.append(f"{key}={rope!r} is not implemented; expected the parameters of yarn")
            continue
        for name, value in _rope_values(key, rope, wrong).items():
            add(f"{key}.{name}", _ROPE_KEYS[name], value)
    if "rope_theta" in config:
        add("rope_theta", "rope_theta", config["rope_theta"])
    if "initial_context_length" in config:
        if flat.keys() <= {"rope_theta"}:  # no rope scaling: Hugging Face takes the published one
            flat["initial_context_length"] = GptOssConfig.initial_context_length
        add("initial_context_length", "initial_context_length", config["initial_context_length"])
    return flat


def _rope_values(where: str, rope: Mapping[str, Any], wrong: list[str]) -> dict[str, Any]:
    """Returns YaRN's parameters under the names they have in `rope`; adds what is wrong to `wrong`."""
    values: dict[str, Any] = {"truncate": True}
    for key, value in rope.items():
        if key in _ROPE_UNSUPPORTED:
            if value not in _ROPE_UNSUPPORTED[key]:
                wrong.append(f"{where}.{key}={value!r} is not implemented")
        elif key not in _ROPE_KEYS:
            near = base.nearest(key, {*_ROPE_KEYS, *_ROPE_UNSUPPORTED})
            wrong.append(f"unknown key {key!r} in {where}{near}")
        elif value is not None or key not in ("beta_fast", "beta_slow", "rope_theta"):
            values[key] = value
    for key in ("factor", "original_max_position_embeddings"):
        if key not in values:
            wrong.append(f"{where} lacks {key!r}")
    if not {"rope_type", "type"} & rope.keys():
        wrong.append(f"{where} lacks 'rope_type'; expected 'yarn'")
    return values


def _quantization(stated: Any, wrong: list[str]) -> str | None:
    if stated is None:
        return None
    if not isinstance(stated, Mapping) or stated.get("quant_method") != "mxfp4":
        method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
        wrong.append(f"quantization_config says {method!r}, which is not implemented; mxfp4 is")
        return None
    for key in stated.keys() - {"quant_method", "modules_to_not_convert", "dequantize"}:
        wrong.append(f"unknown key {key!r} in quantization_config")
    return "mxfp4"


def _published(num_hidden_layers: int, num_local_experts: int) -> GptOssConfig:
    return GptOssConfig(
        num_hidden_layers=num_hidden_layers,
        num_local_experts=num_local_experts,
        router_aux_loss_coef=0.9,
        eos_token_id=200002,
        pad_token_id=199999,
        quantization="mxfp4",
    )


PRESETS: dict[str, GptOssConfig] = {
    "gpt-oss-20b": _published(24, 32),
    "gpt-oss-120b": _published(36, 128),
}
"""The sizes that are known by name."""
