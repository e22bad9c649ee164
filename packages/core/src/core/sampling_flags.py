"""The flags that say how to continue a prompt, the same at every command line that does.

A command line calls `flags.adopt_module_key_flags(sampling_flags)`, so that its `--help` shows them as its own.
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from core import door
from core.errors import SamplingError

if TYPE_CHECKING:
    from core.sampling import Sampling

_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keeps the k most likely tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keeps the likeliest tokens up to this probability.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Drops tokens less than this times as likely as the top.")
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Makes tokens that have occurred less likely; 1 is off."
)
_PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty", 0.0, "Subtracted from the logits of tokens that were produced; -2 to 2."
)
_FREQUENCY_PENALTY = flags.DEFINE_float(
    "frequency_penalty", 0.0, "The same, times how often they were produced; -2 to 2."
)
_LOGIT_BIAS = flags.DEFINE_multi_string(
    "logit_bias", [], "ID:VALUE, added to a token's logit, from -100 to 100; repeatable."
)
_BAD_IDS = flags.DEFINE_list("bad_ids", [], "Token ids that are never produced, as 1,2,3.")
_ALLOWED_IDS = flags.DEFINE_list(
    "allowed_ids", None, "The only token ids that are produced, as 1,2,3; without it all."
)
_MIN_NEW_TOKENS = flags.DEFINE_integer(
    "min_new_tokens", 0, "Until so many are produced, no end-of-text token is."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 50, "How many tokens to produce at most.")
_STOP = flags.DEFINE_multi_string("stop", [], "Ends the text before this string; repeatable.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random draws.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Goes on after the end-of-text token.")


def sampling(**more: Any) -> "Sampling":
    """Returns what the flags say, and `more` that has no flag here.

    Raises:
      door.Usage: a value cannot be.
    """
    from core.sampling import Sampling  # imports jax

    try:
        return Sampling(
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
            min_p=_MIN_P.value,
            repetition_penalty=_REPETITION_PENALTY.value,
            presence_penalty=_PRESENCE_PENALTY.value,
            frequency_penalty=_FREQUENCY_PENALTY.value,
            logit_bias=tuple(map(_bias, _LOGIT_BIAS.value)),
            bad_ids=_ids("bad_ids", _BAD_IDS.value),
            allowed_ids=None
            if _ALLOWED_IDS.value is None
            else _ids("allowed_ids", _ALLOWED_IDS.value),
            min_new_tokens=_MIN_NEW_TOKENS.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            stop=tuple(_STOP.value),
            seed=_SEED.value,
            ignore_eos=_IGNORE_EOS.value,
            **more,
        )
    except SamplingError as error:
        raise door.Usage(f"--{error}") from error


def _bias(text: str) -> tuple[int, float]:
    id_, _, value = text.partition(":")
    try:
        return int(id_), float(value)
    except ValueError:
        raise door.Usage(
            f"--logit_bias={text} is no token id and bias; expected such as --logit_bias=50256:-5"
        ) from None


def _ids(name: str, texts: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in texts)
    except ValueError as error:
        raise door.Usage(f"--{name}={','.join(texts)} is no list of token ids: {error}") from None
