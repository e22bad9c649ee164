"""From logits to the next token: what Hugging Face's logits processors do, in their order, for every row at once.

Logit bias, bad and allowed ids, the repetition penalty, the presence and frequency penalties, no end of the text before
min_new_tokens; then temperature, top-k, top-p, min-p; then a draw. Each row has its own settings and its own key, so a
row's token depends on nothing else in the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.errors import SamplingError as SamplingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of tokens with at least this probability (Holtzman et al. 2019, arXiv:1904.09751).
      min_p: drops tokens less than this many times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
      repetition_penalty: divides positive and multiplies negative logits of the tokens of prompt and continuation
        (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 does nothing.
      presence_penalty: subtracted from the logits of tokens that the continuation holds; from -2 to 2, OpenAI's range.
      frequency_penalty: the same times how often it holds them.
      logit_bias: what is added to the logits of these tokens before everything else, from -100 to 100 (OpenAI's range);
        a mapping is kept as a sorted tuple of pairs.
      bad_ids: tokens that are never drawn, the end of the text too if it is among them.
      allowed_ids: the only tokens that are drawn; None allows all.
      min_new_tokens: until so many are produced no end-of-text token is drawn; stop strings end the text all the same.
      max_new_tokens: the length limit, of what is produced.
      stop: strings that end the text, and are not part of it.
      seed: with the request's id, what the random draws depend on.
      ignore_eos: goes on after the end-of-text token.
      logprobs: reports each token's log-probability under the model and that many likeliest alternatives;
        None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    bad_ids: tuple[int, ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    min_new_tokens: int = 0
    max_new_tokens: int = 50
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        limits: list[tuple[str, type, bool, str]] = [
            ("temperature", float, 0 <= _number(self.temperature) < math.inf, "0 (greedy) or more"),
            ("top_k", int, 0 <= _number(self.top_k) < 2**31, "0 (off) or more"),
            ("top_p", float, 0 < _number(self.top_p) <= 1, "above 0, at most 1 (off)"),
            ("min_p", float, 0 <= _number(self.min_p) <= 1, "between 0 (off) and 1"),
            (
                "repetition_penalty",
                float,
                0 < _number(self.repetition_penalty) < math.inf,
                "above 0, 1 is off",
            ),
            ("presence_penalty", float, abs(_number(self.presence_penalty)) <= 2, "from -2 to 2"),
            ("frequency_penalty", float, abs(_number(self.frequency_penalty)) <= 2, "from -2 to 2"),
            ("max_new_tokens", int, _number(self.max_new_tokens) >= 0, "0 or more"),
            (
                "min_new_tokens",
                int,
                0 <= _number(self.min_new_tokens) <= _number(self.max_new_tokens),
                f"0 or more, at most max_new_tokens ({self.max_new_tokens})",
            ),
            ("seed", int, 0 <= _number(self.seed) < 2**63, "between 0 and 2**63 - 1"),
        ]
        for name, kind, is_fine, expected in limits:
            value = getattr(self, name)
            if not is_fine or (kind is int and not isinstance(value, int)):
                raise SamplingError(f"{name} is {value!r}; expected {kind.__name__}, {expected}")
        if self.logprobs is not None and (
            not isinstance(self.logprobs, int) or not _number(self.logprobs) >= 0
        ):
            raise SamplingError(
                f"logprobs is {self.logprobs!r}; expected an int, 0 or more, or None"
            )
        if not isinstance(self.stop, (tuple, list)) or not all(
            isinstance(s, str) and s for s in self.stop
        ):
            raise SamplingError(f"stop is {self.stop!r}; expected a sequence of non-empty strings")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos is {self.ignore_eos!r}; expected a bool")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        object.__setattr__(self, "bad_ids", _ids("bad_ids", self.bad_ids))
        if self.allowed_ids is not None:
            object.__setattr__(self, "allowed_ids", _ids("allowed_ids", self.allowed_ids))


def check_ids(
    sampling: Sampling,
    vocab_size: int,
    *,
    stop_ids: Collection[int] = (),
    missing_ids: Collection[int] = (),
) -> None:
    """Checks the token ids of `sampling` against a vocabulary, of which `missing_ids` are never drawn.

    Raises:
      SamplingError: an id is outside, or nothing is left to draw.
    """
    allowed = sampling.allowed_ids
    for name, ids in (
        ("logit_bias", dict(sampling.logit_bias)),
        ("bad_ids", sampling.bad_ids),
        ("allowed_ids", allowed or ()),
    ):
        wrong = next((id_ for id_ in ids if id_ >= vocab_size), None)
        if wrong is not None:
            raise SamplingError(
                f"{name} holds {wrong}; expected ids below the vocabulary's {vocab_size}"
            )
    left = set(range(vocab_size) if allowed is None else allowed)
    left -= {*sampling.bad_ids, *missing_ids}
    if not left:
        raise SamplingError(
            "allowed_ids and bad_ids leave nothing to draw; expected at least one token"
        )
    if sampling.min_new_tokens and not left.difference(stop_ids):
        raise SamplingError(
            f"allowed_ids and bad_ids leave end-of-text tokens only, and min_new_tokens is "
            f"{sampling.min_new_tokens}; expected another token, or 0"
        )


def bias_row(sampling: Sampling, vocab_size: int) -> np.ndarray | None:
    """Returns what to add to the logits_V, float32: logit bias, and minus infinity for ids that are not to be drawn.

    None where that is nothing. The ids must have passed `check_ids`.
    """
    if not sampling.logit_bias and not sampling.bad_ids and sampling.allowed_ids is None:
        return None
    bias_V = np.zeros(vocab_size, np.float32)
    if sampling.allowed_ids is not None:
        bias_V[:] = -np.inf
        bias_V[list(sampling.allowed_ids)] = 0
    for id_, bias in dict(sampling.logit_bias).items():
        bias_V[id_] += bias
    bias_V[list(sampling.bad_ids)] = -np.inf
    return bias_V


Column = jax.Array | np.ndarray


class Settings(NamedTuple):
    """The parameters of `Sampling` that the device needs, an array a column."""

    temperature_B: Column
    top_k_B: Column
    top_p_B: Column
    min_p_B: Column
    repetition_penalty_B: Column
    presence_penalty_B: Column
    frequency_penalty_B: Column
    min_new_tokens_B: Column

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Settings":
        """Returns numpy columns, to be handed to a compiled function."""

        def column(name: str) -> np.ndarray:
            dtype = np.int32 if name in _COUNTS else np.float32
            return np.array([getattr(row, name) for row in rows], dtype)

        return cls(*(column(field.removesuffix("_B")) for field in cls._fields))


_COUNTS = {"top_k", "min_new_tokens"}

Sampler = Callable[
    [jax.Array, jax.Array, Settings, jax.Array, jax.Array | None, jax.Array, tuple[int, ...]],
    jax.Array,
]
"""(logits_BV, keys_B, settings, counts_BV, bias_BV, produced_B, stop_ids) -> tokens_B, traceable by jit: what an Engine
draws tokens with; see `sample`."""


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    settings: Settings,
    counts_BV: jax.Array,
    bias_BV: jax.Array | None,
    produced_B: jax.Array,
    stop_ids: tuple[int, ...],
) -> jax.Array:
    """Returns tokens_B, drawn from the processed distribution; the argmax where the temperature is 0.

    Args:
      logits_BV: the model's, float32.
      keys_B: a random key a row.
      settings: each row's parameters.
      counts_BV: int32, twice the times that a row has produced a token, and one more if its prompt holds it.
      bias_BV: what each row's `bias_row` adds to its logits; None for none.
      produced_B: how many tokens a row has produced.
      stop_ids: the tokens that end a text.
    """
    logits_BV = adjust(logits_BV, settings, counts_BV, bias_BV, produced_B, stop_ids)
    greedy_B = settings.temperature_B == 0

    def draw(logits_BV):
        warped_BV = warp(logits_BV, settings)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, warped_BV)
        return jnp.where(greedy_B, logits_BV.argmax(-1), drawn_B)

    tokens_B = jax.lax.cond(greedy_B.all(), lambda x: x.argmax(-1), draw, logits_BV)
    return tokens_B.astype(jnp.int32)


def adjust(
    logits_BV: jax.Array,
    settings: Settings,
    counts_BV: jax.Array,
    bias_BV: jax.Array | None,
    produced_B: jax.Array,
    stop_ids: tuple[int, ...],
) -> jax.Array:
    """Returns the logits after bias, penalties and the ban on stop ids; a row that wants none keeps its bits."""
    if bias_BV is not None:
        logits_BV = logits_BV + bias_BV
    repeats_B = settings.repetition_penalty_B != 1
    logits_BV = jax.lax.cond(
        repeats_B.any(),
        lambda x: penalise_repetition(x, counts_BV > 0, settings.repetition_penalty_B),
        lambda x: x,
        logits_BV,
    )
    counts_B = (settings.presence_penalty_B != 0) | (settings.frequency_penalty_B != 0)
    logits_BV = jax.lax.cond(
        counts_B.any(),
        lambda x: penalise_produced(x, counts_BV // 2, settings),
        lambda x: x,
        logits_BV,
    )
    if not stop_ids:
        return logits_BV
    early_B = produced_B < settings.min_new_tokens_B
    stop_S = jnp.array(stop_ids)
    kept_BS = jnp.where(early_B[:, None], -jnp.inf, logits_BV[:, stop_S])
    return logits_BV.at[:, stop_S].set(kept_BS, mode="drop")


def penalise_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: Column) -> jax.Array:
    """Returns the logits with those of seen tokens made smaller; a penalty of 1 changes no bit."""
    penalty_B1 = penalty_B[:, None]
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def penalise_produced(
    logits_BV: jax.Array, produced_BV: jax.Array, settings: Settings
) -> jax.Array:
    """Returns the logits less OpenAI's presence and frequency penalties; zeros change no bit."""
    frequency_BV = settings.frequency_penalty_B[:, None] * produced_BV.astype(jnp.float32)
    presence_BV = jnp.where(produced_BV > 0, settings.presence_penalty_B[:, None], 0)
    return logits_BV - frequency_BV - presence_BV


def warp(logits_BV: jax.Array, settings: Settings) -> jax.Array:
    """Returns the logits after temperature, top-k, top-p and min-p; dropped tokens are minus infinity.

    Rows of temperature 0 are left at temperature 1.
    """
    temperature_B = jnp.where(settings.temperature_B == 0, 1, settings.temperature_B)
    logits_BV = logits_BV / temperature_B[:, None]
    # Sorting 50,000 numbers a row costs more than the rest, and a row that filters nothing is the same either way.
    filters_B = (settings.top_k_B > 0) | (settings.top_p_B < 1) | (settings.min_p_B > 0)
    return jax.lax.cond(filters_B.any(), lambda x: _filter(x, settings), lambda x: x, logits_BV)


def _filter(logits_BV: jax.Array, settings: Settings) -> jax.Array:
    V = logits_BV.shape[1]
    order_BV = jnp.argsort(logits_BV, axis=-1)  # ascending, as in HF's processors
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)

    k_B = jnp.where(settings.top_k_B > 0, jnp.minimum(settings.top_k_B, V), V)
    kth_B1 = jnp.take_along_axis(sorted_BV, (V - k_B)[:, None], axis=-1)
    sorted_BV = jnp.where(sorted_BV < kth_B1, -jnp.inf, sorted_BV)

    below_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
    outside_BV = below_BV <= (1 - settings.top_p_B)[:, None]
    outside_BV = outside_BV.at[:, -1].set(False) & (settings.top_p_B < 1)[:, None]
    sorted_BV = jnp.where(outside_BV, -jnp.inf, sorted_BV)

    floor_B1 = sorted_BV[:, -1:] + jnp.log(settings.min_p_B)[:, None]
    sorted_BV = jnp.where(sorted_BV < floor_B1, -jnp.inf, sorted_BV)

    return jax.vmap(lambda row, order, values: row.at[order].set(values))(
        logits_BV, order_BV, sorted_BV
    )


def _pairs(value: Any) -> tuple[tuple[int, float], ...]:
    """Returns a `logit_bias` as sorted pairs, whether it comes as a mapping or as those."""
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise SamplingError(f"logit_bias is {value!r}; expected a mapping of token ids to numbers")
    found: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not _is_id(pair[0]):
            raise SamplingError(f"logit_bias holds {pair!r}; expected a token id and its bias")
        if not abs(_number(pair[1])) <= 100:
            raise SamplingError(
                f"logit_bias of {pair[0]} is {pair[1]!r}; expected a float, from -100 to 100"
            )
        if pair[0] in found:
            raise SamplingError(f"logit_bias holds {pair[0]} twice; expected each token id once")
        found[pair[0]] = float(pair[1])
    return tuple(sorted(found.items()))


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Returns token ids, each once, in their order."""
    if not isinstance(value, (tuple, list)):
        raise SamplingError(f"{name} is {value!r}; expected a sequence of token ids")
    wrong = [item for item in value if not _is_id(item)]
    if wrong:
        raise SamplingError(f"{name} holds {wrong[0]!r}; expected token ids, 0 or more")
    return tuple(sorted(set(value)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and 0 <= _number(value) < 2**31


def _number(value: Any) -> int | float:
    """`value` itself; NaN, which no comparison accepts, if it is no number or too large for a float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return value if abs(value) <= _LARGEST else math.nan


_LARGEST = float(np.finfo(np.float32).max)
