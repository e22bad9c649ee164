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
            max_new_tokens=_MAX_NEW_TOKENS.value,
            stop=tuple(_STOP.value),
            seed=_SEED.value,
            ignore_eos=_IGNORE_EOS.value,
            **more,
        )
    except SamplingError as error:
        raise door.Usage(f"--{error}") from error
