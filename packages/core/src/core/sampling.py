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

    @property
    def has_bias(self) -> bool:
        """Whether there is a `bias_row` to add to the logits."""
        return bool(self.logit_bias or self.bad_ids) or self.allowed_ids is not None

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
                0 <= _number(self.min_new_tokens) <= min(_number(self.max_new_tokens), 2**31 - 1),
                f"0 or more, at most max_new_tokens ({self.max_new_tokens}), below 2**31",
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
    banned = {*sampling.bad_ids, *missing_ids}
    if _leaves_nothing(allowed, banned, vocab_size):
        raise SamplingError(
            "allowed_ids and bad_ids leave nothing to draw; expected at least one token"
        )
    if sampling.min_new_tokens and _leaves_nothing(allowed, banned.union(stop_ids), vocab_size):
        raise SamplingError(
            f"allowed_ids and bad_ids leave end-of-text tokens only, and min_new_tokens is "
            f"{sampling.min_new_tokens}; expected another token, or 0"
        )


def _leaves_nothing(
    allowed: tuple[int, ...] | None, banned: Collection[int], vocab_size: int
) -> bool:
    if allowed is not None:
        return set(allowed) <= set(banned)
    return sum(id_ < vocab_size for id_ in banned) == vocab_size


def bias_row(sampling: Sampling, vocab_size: int) -> np.ndarray | None:
    """Returns what to add to the logits_V, float32: logit bias, and minus infinity for ids that are not to be drawn.

    None where that is nothing. The ids must have passed `check_ids`.
    """
    if not sampling.has_bias:
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
    B = len(logits_BV)
    rows = B if jax.default_backend() != "cpu" else next(n for n in range(8, 0, -1) if B % n == 0)
    columns = logits_BV, keys_B, settings, counts_BV, bias_BV, produced_B
    if rows == B:
        return _sample(stop_ids, *columns)
    # Eight rows stay in a core's cache from pass to pass: 64 take two thirds of the time that they take at once.
    groups = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), columns)
    return jax.lax.map(lambda group: _sample(stop_ids, *group), groups).reshape(B)


def _sample(
    stop_ids: tuple[int, ...],
    logits_BV: jax.Array,
    keys_B: jax.Array,
    settings: Settings,
    counts_BV: jax.Array,
    bias_BV: jax.Array | None,
    produced_B: jax.Array,
) -> jax.Array:
    logits_BV = adjust(logits_BV, settings, counts_BV, bias_BV, produced_B, stop_ids)
    return jax.lax.cond(
        (settings.temperature_B == 0).all(),
        likeliest,
        lambda x_BV: draw(x_BV, keys_B, settings),
        logits_BV,
    )


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
    early_B = produced_B < settings.min_new_tokens_B
    wants_B = (
        (settings.repetition_penalty_B != 1)
        | (settings.presence_penalty_B != 0)
        | (settings.frequency_penalty_B != 0)
        | early_B
    )

    def penalise(x_BV: jax.Array) -> jax.Array:
        x_BV = penalise_repetition(x_BV, counts_BV > 0, settings.repetition_penalty_B)
        x_BV = penalise_produced(x_BV, counts_BV // 2, settings)
        is_stop_V = np.isin(np.arange(x_BV.shape[1]), stop_ids)
        return jnp.where(early_B[:, None] & is_stop_V[None], -jnp.inf, x_BV)

    return jax.lax.cond(wants_B.any(), penalise, lambda x_BV: x_BV, logits_BV)


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


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Returns the first token_B of those with the largest logit."""
    # Two reductions of floats: on a CPU, XLA's argmax takes ten times as long. Ids below 2**24 are exact.
    ids_1V = jnp.arange(logits_BV.shape[1], dtype=jnp.float32)[None]
    is_top_BV = logits_BV == logits_BV.max(-1, keepdims=True)
    return jnp.where(is_top_BV, ids_1V, ids_1V[:, -1:]).min(-1).astype(jnp.int32)


def draw(logits_BV: jax.Array, keys_B: jax.Array, settings: Settings) -> jax.Array:
    """Returns tokens_B drawn after temperature, top-k, top-p and min-p; the likeliest where the temperature is 0.

    A token from outside the nucleus of top-p is drawn again, among those that rank above it. What is found is
    distributed as if the nucleus had been cut out first, and its edge need not be searched for (as in FlashInfer).
    """
    B, V = logits_BV.shape
    logits_BCW = chunks(logits_BV)
    weights_BCW, sums_BC, nucleus_B = weigh(logits_BCW, settings)
    greedy_B = settings.temperature_B == 0

    def pick(floor: _Floor, sums_BC: jax.Array, turn: jax.Array | int) -> _Floor:
        words_B = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, turn)))(keys_B)
        target_B = jnp.where(greedy_B, 0, _share(words_B, sums_BC.sum(-1)))
        return _find(logits_BCW, weights_BCW, floor, sums_BC, target_B)

    def check(carry: tuple[_Floor, jax.Array, jax.Array]) -> tuple[_Floor, jax.Array, jax.Array]:
        found, open_B, turn = carry
        sums_BC = jnp.where(found.is_below(logits_BCW), weights_BCW, 0).sum(-1)
        open_B &= sums_BC.sum(-1) >= nucleus_B
        again = pick(found, sums_BC, turn)
        found = jax.tree.map(lambda new_B, old_B: jnp.where(open_B, new_B, old_B), again, found)
        return found, open_B, turn + 1

    found = pick(_Floor(jnp.full(B, -jnp.inf), jnp.full(B, -1)), sums_BC, 0)
    start = found, nucleus_B < sums_BC.sum(-1), jnp.int32(1)
    found, *_ = jax.lax.while_loop(lambda carry: carry[1].any(), check, start)
    return jnp.clip(found.token_B, 0, V - 1)


def chunks(logits_BV: jax.Array) -> jax.Array:
    """Returns the logits_BCW in chunks, the last one filled up with tokens that are never drawn."""
    B, V = logits_BV.shape
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -V % _WIDTH)), constant_values=-jnp.inf)
    return padded_BV.reshape(B, -1, _WIDTH)


class _Floor(NamedTuple):
    """A token a row, and its logit. Tokens rank by logit, and equal ones by id, as in HF's stable ascending sort."""

    logit_B: jax.Array
    token_B: jax.Array

    def is_below(self, logits_BCW: jax.Array, first_B: jax.Array | int = 0) -> jax.Array:
        """Returns whether each logit ranks above; the first of a row's is that of token `first_B`."""
        ids_1CW = jnp.arange(np.prod(logits_BCW.shape[1:])).reshape(1, *logits_BCW.shape[1:])
        after_B11 = (self.token_B - first_B)[:, None, None]
        logit_B11 = self.logit_B[:, None, None]
        return (logits_BCW > logit_B11) | ((logits_BCW == logit_B11) & (ids_1CW > after_B11))


def weigh(logits_BCW: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns weights_BCW to draw tokens with, their sums_BC, and nucleus_B: what ranks above a kept token weighs less.

    Weights are integers, proportional to the probabilities after temperature, top-k and min-p. Those of 2**18 tokens
    sum to 2**29 or more, so what is less likely than 2**-30 may never be drawn. Sums of integers are the same in any
    order: on every number of rows, cores and devices.
    """
    greedy_B = settings.temperature_B == 0
    temperature_B = jnp.where(greedy_B, 1, settings.temperature_B)
    top_B = logits_BCW.max((1, 2))
    floor_B = jnp.where(greedy_B, top_B, _kth(logits_BCW, top_B, temperature_B, settings))
    shifted_BCW = (logits_BCW - top_B[:, None, None]) / temperature_B[:, None, None]
    odds_BCW = jnp.where(logits_BCW >= floor_B[:, None, None], jnp.exp(shifted_BCW), 0)
    all_BCW = jnp.round(odds_BCW * _scale(odds_BCW)[:, None, None]).astype(jnp.int32)
    is_likely_BCW = shifted_BCW >= jnp.log(settings.min_p_B)[:, None, None]
    weights_BCW = jnp.where(is_likely_BCW, all_BCW, 0)
    sums_BC = weights_BCW.sum(-1)

    has_nucleus_B = (settings.top_p_B < 1) & ~greedy_B
    total_B = sums_BC.sum(-1)
    whole_B = jax.lax.cond(
        (has_nucleus_B & (settings.min_p_B > 0)).any(),  # top-p comes before min-p
        lambda: all_BCW.sum(-1).sum(-1),
        lambda: total_B,
    )
    words_B = jnp.minimum(settings.top_p_B * 2.0**32, 2.0**32 - 256).astype(jnp.uint32)
    is_rest_B = words_B * whole_B.astype(jnp.uint32) != 0
    nucleus_B = jnp.clip(_share(words_B, whole_B) + is_rest_B.astype(jnp.int32), 1, total_B)
    return weights_BCW, sums_BC, jnp.where(has_nucleus_B, nucleus_B, total_B)


def _scale(odds_BCW: jax.Array) -> jax.Array:
    """Returns what to multiply odds with, 1 the largest, for a sum close to 2**31 and below it once rounded."""
    # In units of 2**-16, of which a chunk holds 2**24 at most: its sum is exact in float32, in any order.
    units_BC = jnp.round(odds_BCW * 2.0**16).sum(-1).astype(jnp.int32)
    parts = (units_BC >> 12).sum(-1), (units_BC & 0xFFF).sum(-1)
    coarse_B, fine_B = (part_B.astype(jnp.float32) for part_B in parts)
    size = np.prod(odds_BCW.shape[1:])
    bound_B = (coarse_B * 2.0**12 + fine_B + size / 2) / 2.0**16
    return (2.0**31 - size) * (1 - 2.0**-20) / bound_B


def _kth(
    logits_BCW: jax.Array, top_B: jax.Array, temperature_B: jax.Array, settings: Settings
) -> jax.Array:
    """Returns the least logit_B that top-k keeps, or one between it and the next; minus infinity where it keeps all.

    By bisection, which counts the logits above a value in each turn; far less work than sorting them.
    """
    k_B = settings.top_k_B
    # Further down, weights are nothing: exp(-32) < 2**-46.
    least_B = jnp.maximum(top_B - 32 * temperature_B, -_LARGEST)

    def halve(carry):
        low_B, high_B, open_B, turn = carry
        halfway_B = _key(_logit(low_B) / 2 + _logit(high_B) / 2)
        # Halving the number of floats between is slower at first, and ends soon wherever they are.
        halfway_B = jnp.where(turn < 24, halfway_B, (low_B >> 1) + (high_B >> 1))
        middle_B = jnp.where(turn == 0, _key(least_B), jnp.clip(halfway_B, low_B + 1, high_B - 1))
        # In floats, which hold these numbers exactly and which XLA adds faster.
        is_in_BCW = logits_BCW >= _logit(middle_B)[:, None, None]
        count_B = is_in_BCW.astype(jnp.float32).sum((1, 2)).astype(jnp.int32)
        low_B = jnp.where(open_B & (count_B >= k_B), middle_B, low_B)
        high_B = jnp.where(open_B & (count_B < k_B), middle_B, high_B)
        is_between_B = (low_B + 1 < high_B) & (high_B > _key(least_B))
        return low_B, high_B, open_B & (count_B != k_B) & is_between_B, turn + 1

    low_B = _key(jnp.full_like(top_B, -jnp.inf))
    open_B = (k_B > 0) & (settings.temperature_B > 0)
    start = low_B, _key(top_B) + 1, open_B, jnp.int32(0)
    low_B, *_ = jax.lax.while_loop(lambda carry: carry[2].any(), halve, start)
    return _logit(low_B)


def _key(logit_B: jax.Array) -> jax.Array:
    """Returns integers in the order of the floats, neighbours for neighbours; `_logit` is the way back."""
    bits_B = jax.lax.bitcast_convert_type(logit_B, jnp.int32)
    return bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)


def _logit(key_B: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(key_B ^ ((key_B >> 31) & 0x7FFFFFFF), jnp.float32)


def _share(words_B: jax.Array, total_B: jax.Array) -> jax.Array:
    """Returns `total_B` times `words_B` / 2**32, rounded down, exactly."""
    a, b = words_B, total_B.astype(jnp.uint32)
    low = (a & 0xFFFF) * (b & 0xFFFF)
    middle = (a >> 16) * (b & 0xFFFF) + (low >> 16)
    other = (a & 0xFFFF) * (b >> 16) + (middle & 0xFFFF)
    return ((a >> 16) * (b >> 16) + (middle >> 16) + (other >> 16)).astype(jnp.int32)


def _find(
    logits_BCW: jax.Array,
    weights_BCW: jax.Array,
    floor: _Floor,
    sums_BC: jax.Array,
    target_B: jax.Array,
) -> _Floor:
    """Returns the first token of each row up to which those above the floor weigh more than the target.

    `sums_BC` is what a chunk's tokens above the floor weigh.
    """
    W = logits_BCW.shape[2]

    def place(sizes_BN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        ends_BN = jnp.cumsum(sizes_BN, axis=-1)
        is_before_BN = ends_BN <= target_B[:, None]
        before_B = jnp.where(is_before_BN, sizes_BN, 0).sum(-1)
        return jnp.minimum(is_before_BN.sum(-1), sizes_BN.shape[1] - 1), target_B - before_B

    chunk_B, rest_B = place(sums_BC, target_B)

    def at(x_BCW: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BCW, chunk_B[:, None, None], axis=1)

    logits_B1W = at(logits_BCW)
    is_above_B1W = floor.is_below(logits_B1W, chunk_B * W)
    within_B, _ = place(jnp.where(is_above_B1W, at(weights_BCW), 0)[:, 0], rest_B)
    logit_B = jnp.take_along_axis(logits_B1W[:, 0], within_B[:, None], axis=1)[:, 0]
    return _Floor(logit_B, chunk_B * W + within_B)


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
_WIDTH = 256  # tokens a chunk; a draw finds the chunk and then the token in it
