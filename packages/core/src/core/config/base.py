"""What configurations of all families have in common: types are checked, two kinds of JSON are read and written."""

import abc
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Self

from core.errors import ConfigError

MAX_LAYERS, MAX_SIZE = 10_000, 2**40
"""A file that claims more is damaged or hostile: a model's names alone would fill the memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(abc.ABC):
    """A model of some family; each family adds its sizes and variants under Hugging Face's names."""

    family: ClassVar[str]

    vocab_size: int
    tie_word_embeddings: bool
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # as the file has it; see `eos_token_ids`
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        wrong = list(misfits(self)) or list(self._contradictions())
        if wrong:
            raise ConfigError("this model configuration cannot be: " + "; ".join(wrong))

    @abc.abstractmethod
    def _contradictions(self) -> Iterator[str]:
        """Yields what is wrong with values that have their declared types."""

    @property
    @abc.abstractmethod
    def axes(self) -> dict[str, int]:
        """The size of every axis letter (see `core.axes`) that the parameters use."""

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """The most tokens that the model can look back on."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys a query of each layer sees, itself included; None is all before it."""
        return (None,) * self.axes["L"]

    @abc.abstractmethod
    def tensors(self) -> dict[str, str]:
        """Every parameter's name (its path in the Flax tree, joined by dots) and axes, in the order of the files."""

    @classmethod
    @abc.abstractmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json.

        Raises:
          ConfigError: naming every key that is unknown, contradictory or not implemented.
        """

    @classmethod
    def notes_on_hf(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns what whoever converts this config.json must hear, though it can be read."""
        return ()

    @abc.abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json with which transformers opens this model."""

    @property
    def parameter_count(self) -> int:
        """How many numbers the model holds; a tied head counts once.

        >>> from core.config import GPT2Config
        >>> GPT2Config().parameter_count
        124439808
        """
        return self.count(self.tensors().values())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: none, one or several."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    def count(self, words: typing.Iterable[str]) -> int:
        """Returns how many numbers tensors of these axes hold together."""
        from core.axes import shape

        return sum(math.prod(shape(word, self.axes)) for word in words)

    def to_dict(self) -> dict[str, Any]:
        """Returns what a model folder's config.json holds."""
        return {"family": self.family} | to_json(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote; an unknown key or another family is a ConfigError."""
        if config.get("family") != cls.family:
            raise ConfigError(f"family is {config.get('family')!r}; expected {cls.family!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [
            f"unknown key {key!r}" + nearest(key, known)
            for key in config
            if key not in known | {"family"}
        ]
        if unknown:
            raise ConfigError("the model configuration cannot be read: " + "; ".join(unknown))
        return cls(**from_json(cls, {k: v for k, v in config.items() if k != "family"}))


def positive(config: Config, names: Collection[str]) -> Iterator[str]:
    """Yields every size in `names` that is below 1 or more than can be meant."""
    for name in names:
        value, limit = getattr(config, name), MAX_LAYERS if "layer" in name else MAX_SIZE
        if value < 1:
            yield f"{name}={value} must be at least 1"
        elif value > limit:
            yield f"{name}={value} is more than {limit:,}"


def foreign_tokens(config: Config) -> Iterator[str]:
    """Yields the special tokens that are not in the vocabulary."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < config.vocab_size:
                yield f"{name}={value} is outside the vocabulary of {config.vocab_size}"


def hf_settings(
    config: Mapping[str, Any],
    known: Collection[str],
    *,
    aliases: Mapping[str, str],
    unsupported: Mapping[str, tuple[Any, ...]],
    wrong: list[str],
) -> dict[str, Any]:
    """Returns the values in a Hugging Face config.json by the names in `known`; adds what is wrong to `wrong`.

    `unsupported` has the keys of which only some values are implemented, and those values.
    """
    settings: dict[str, Any] = {}
    unsupported = {**_UNSUPPORTED, **unsupported}
    for key, value in config.items():
        name = aliases.get(key, key)
        if name in known:
            if name in settings and settings[name] != value:
                wrong.append(f"{key}={value!r} contradicts {name}={settings[name]!r}")
            settings[name] = value
        elif key in unsupported:
            if value not in unsupported[key]:
                wrong.append(f"{key}={value!r} is not implemented")
        elif key not in _IGNORED:
            wrong.append(f"unknown key {key!r}" + nearest(key, {*known, *aliases}))
    return settings


def without_foreign_tokens(settings: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Returns `settings` with special tokens that can never be produced left out.

    GPT-2's 50256 stands in the file of every small model whose author did not think of it, and None says the same.
    """
    vocab_size = settings.get("vocab_size", vocab_size)
    if type(vocab_size) is not int:
        return settings
    result = dict(settings)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        if type(value) is int and not 0 <= value < vocab_size:
            result[key] = None
        elif isinstance(value, list) and all(type(token) is int for token in value):
            result[key] = [token for token in value if 0 <= token < vocab_size] or None
    return result


def from_json(cls: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `settings` as dataclass `cls` wants them: JSON writes 1.0 as 1 and a tuple as a list."""
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    return {name: _from_json(value, kinds[name]) for name, value in settings.items()}


def to_json(config: Any) -> dict[str, Any]:
    """Returns a dataclass's fields as JSON has them, which `from_json` undoes."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}

    return dataclasses.asdict(config, dict_factory=fields)


def misfits(config: Any) -> Iterator[str]:
    """Yields every field whose value has not its declared type; a bool is no int here, and an infinity no float."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            yield f"{field.name}={value!r} is not {_spelled(field.type)}"


def nearest(key: str, known: Collection[str]) -> str:
    match = difflib.get_close_matches(key, sorted(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _from_json(value: Any, declared: Any) -> Any:
    if declared is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if isinstance(value, list) and "tuple" in str(declared):
        return tuple(value)
    return value


def _fits(value: Any, declared: Any) -> bool:
    if isinstance(declared, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(declared))
    if typing.get_origin(declared) is tuple:
        kind = typing.get_args(declared)[0]
        return isinstance(value, tuple) and all(_fits(item, kind) for item in value)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if declared is float:
        return (type(value) is int and abs(value) < 2**53) or (
            isinstance(value, float) and math.isfinite(value)
        )
    return isinstance(value, declared)


def _spelled(declared: Any) -> str:
    return declared.__name__ if isinstance(declared, type) else str(declared)


# Keys whose other values would change the mathematics in any family, with the values that do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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
_IGNORED = frozenset(
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
    _num_labels
    output_router_logits
    """.split()
)
