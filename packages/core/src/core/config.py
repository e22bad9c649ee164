"""What a model is: one frozen dataclass a family, read from Hugging Face's config.json or from a model folder.

Configurations know sizes and variants, never files or arrays. Whatever a config.json says that is not understood here
is an error, because a key that is skipped silently is a wrong model.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from core.errors import ConfigError as ConfigError

ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "quick_gelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The GPT-2 family (Radford et al. 2019) and its published variants; names and defaults are Hugging Face's.

    `use_bias=False` leaves the biases out of every linear layer and layer norm (nanoGPT's `bias=False`).
    `scale_attn_by_inverse_layer_idx` divides layer i's scores by i + 1 (Mistral's GPT-2s).
    `reorder_and_upcast_attn` asks for scores and softmax in float32, which `core` does always: it is kept for export.
    """

    family: ClassVar[str] = "gpt2"

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    use_bias: bool = True
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            f"{field.name}={value!r} is not {_spelled(field.type)}"
            for field in dataclasses.fields(self)
            if not _fits(value := getattr(self, field.name), field.type)
        ]
        if not wrong:
            wrong = list(self._contradictions())
        if wrong:
            raise ConfigError("this model configuration cannot be: " + "; ".join(wrong))

    def _contradictions(self) -> Iterator[str]:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1"
                return
        if self.n_inner is not None and self.n_inner < 1:
            yield f"n_inner={self.n_inner} must be at least 1, or null for 4 * n_embd"
        if self.n_embd % self.n_head:
            yield f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads"
        if self.activation_function not in ACTIVATIONS:
            yield (
                f"activation_function={self.activation_function!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        if self.layer_norm_epsilon <= 0:
            yield f"layer_norm_epsilon={self.layer_norm_epsilon} must be positive"
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} is not a probability below 1"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                yield f"{name}={token} is outside the vocabulary of {self.vocab_size}"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_ff(self) -> int:
        """The width of the hidden layer of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def axes(self) -> dict[str, int]:
        """The size of every axis letter (see `core.axes`) that the parameters use."""
        return {
            "V": self.vocab_size,
            "P": self.n_positions,
            "L": self.n_layer,
            "D": self.n_embd,
            "N": self.n_head,
            "H": self.head_dim,
            "F": self.d_ff,
        }

    def tensors(self) -> dict[str, str]:
        """Every parameter's name (its path in the Flax tree, joined by dots) and axes, in the order of the files.

        >>> GPT2Config(n_layer=1).tensors()["blocks.0.attn.qkv.kernel"]
        'D3NH'
        """
        block = {
            "ln_1.scale": "D",
            "ln_1.bias": "D",
            "attn.qkv.kernel": "D3NH",
            "attn.qkv.bias": "3NH",
            "attn.out.kernel": "NHD",
            "attn.out.bias": "D",
            "ln_2.scale": "D",
            "ln_2.bias": "D",
            "mlp.up.kernel": "DF",
            "mlp.up.bias": "F",
            "mlp.down.kernel": "FD",
            "mlp.down.bias": "D",
        }
        tensors = {"wte.embedding": "VD", "wpe.embedding": "PD"}
        for layer in range(self.n_layer):
            tensors |= {f"blocks.{layer}.{name}": axes for name, axes in block.items()}
        tensors |= {"ln_f.scale": "D", "ln_f.bias": "D"}
        if not self.tie_word_embeddings:
            tensors["lm_head.kernel"] = "VD"
        if not self.use_bias:
            tensors = {name: axes for name, axes in tensors.items() if not name.endswith(".bias")}
        return tensors

    @property
    def parameter_count(self) -> int:
        """How many numbers the model holds; a tied head counts once.

        >>> GPT2Config().parameter_count
        124439808
        """
        from core.axes import shape

        count = 0
        for axes in self.tensors().values():
            size = 1
            for length in shape(axes, self.axes):
                size *= length
            count += size
        return count

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads a Hugging Face config.json of model type "gpt2".

        Raises:
          ConfigError: naming every key that is unknown, contradictory or not implemented.
        """
        if config.get("model_type") != "gpt2":
            raise ConfigError(
                f"config.json has model_type {config.get('model_type')!r}; 'gpt2' is what can be read"
            )
        settings: dict[str, Any] = {}
        wrong: list[str] = []
        known = {field.name for field in dataclasses.fields(cls)} - {"use_bias"}
        for key, value in config.items():
            name = _HF_ALIASES.get(key, key)
            if name in known:
                if name in settings and settings[name] != value:
                    wrong.append(f"{key}={value!r} contradicts {name}={settings[name]!r}")
                settings[name] = value
            elif key in _HF_UNSUPPORTED:
                if value not in _HF_UNSUPPORTED[key]:
                    wrong.append(f"{key}={value!r} is not implemented")
            elif key not in _HF_IGNORED:
                wrong.append(f"unknown key {key!r}" + _nearest(key, known | set(_HF_ALIASES)))
        if wrong:
            raise ConfigError("config.json cannot be converted: " + "; ".join(wrong))
        for key in (
            "layer_norm_epsilon",
            "embd_pdrop",
            "attn_pdrop",
            "resid_pdrop",
            "initializer_range",
        ):
            if isinstance(settings.get(key), int) and not isinstance(settings[key], bool):
                settings[key] = float(settings[key])
        vocabulary = settings.get("vocab_size", cls.vocab_size)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            # GPT-2's 50256 stands in the file of every small model whose author did not think of it; there it can
            # never be produced, which is what None says.
            if isinstance(settings.get(key), int) and isinstance(vocabulary, int):
                settings[key] = settings[key] if 0 <= settings[key] < vocabulary else None
        return cls(**settings)

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json with which transformers opens this model."""
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "use_bias"}
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | settings

    def to_dict(self) -> dict[str, Any]:
        """Returns what a model folder's config.json holds."""
        return {"family": self.family} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads what `to_dict` wrote; an unknown key or another family is a ConfigError."""
        if config.get("family") != cls.family:
            raise ConfigError(
                f"family is {config.get('family')!r}; expected one of {', '.join(FAMILIES)}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [
            f"unknown key {key!r}" + _nearest(key, known)
            for key in config
            if key not in known | {"family"}
        ]
        if unknown:
            raise ConfigError("the model configuration cannot be read: " + "; ".join(unknown))
        return cls(**{key: value for key, value in config.items() if key != "family"})


_HF_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Keys whose other values would change the mathematics, with the values that do not.
_HF_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (True, False, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0, None),
    "torchscript": (False, None),
    "use_bfloat16": (False, None),
}

# Keys that say nothing about the next-token distribution: heads for other tasks, defaults of a sampling loop
# (generation_config.json's business), and what a training framework noted for itself.
_HF_IGNORED = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path _commit_hash
    _attn_implementation_autoset attn_implementation use_cache n_ctx n_special predict_special_tokens output_past
    gradient_checkpointing task_specific_params finetuning_task problem_type num_labels id2label label2id
    classifier_dropout tokenizer_class prefix sep_token_id decoder_start_token_id unk_token_id return_dict
    output_attentions output_hidden_states auto_map summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens tf_legacy_loss use_pooling
    """.split()
)


def _nearest(key: str, known: set[str]) -> str:
    match = difflib.get_close_matches(key, sorted(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _spelled(declared: Any) -> str:
    return getattr(declared, "__name__", str(declared))


def _fits(value: Any, declared: Any) -> bool:
    """Tells whether `value` has the declared type; a bool is no int here, as JSON distinguishes them."""
    if declared == int | None:
        return value is None or (isinstance(value, int) and not isinstance(value, bool))
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if declared is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, declared)


FAMILIES: dict[str, type[GPT2Config]] = {"gpt2": GPT2Config}


def _published(n_layer: int, n_head: int, n_embd: int) -> GPT2Config:
    return GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, bos_token_id=50256, eos_token_id=50256
    )


PRESETS: dict[str, GPT2Config] = {
    "gpt2": _published(12, 12, 768),
    "gpt2-medium": _published(24, 16, 1024),
    "gpt2-large": _published(36, 20, 1280),
    "gpt2-xl": _published(48, 25, 1600),
    "distilgpt2": _published(6, 12, 768),
}
"""The sizes that are known by name."""


def from_dict(config: Mapping[str, Any]) -> GPT2Config:
    """Reads a model folder's config.json of whichever family it names."""
    family = FAMILIES.get(str(config.get("family")))
    if family is None:
        raise ConfigError(
            f"family is {config.get('family')!r}; expected one of {', '.join(FAMILIES)}"
        )
    return family.from_dict(config)
