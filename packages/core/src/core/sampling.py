"""From logits to the next token: what Hugging Face's logits processors do, in their order, for every row at once.

Repetition penalty, then temperature, top-k, top-p, min-p, then a draw. Each row has its own settings and its own key,
so a row's token depends on nothing else in the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
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
            ("max_new_tokens", int, _number(self.max_new_tokens) >= 0, "0 or more"),
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


class Settings(NamedTuple):
    """The parameters of `Sampling` that the device needs, an array a row."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_penalty_B: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Settings":
        def column(name: str, dtype: type) -> jax.Array:
            return jnp.asarray(np.array([getattr(row, name) for row in rows], dtype))

        return cls(
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("min_p", np.float32),
            column("repetition_penalty", np.float32),
        )


Sampler = Callable[[jax.Array, jax.Array, Settings, jax.Array], jax.Array]
"""(logits_BV, keys_B, settings, seen_BV) -> tokens_B, traceable by jit: what an Engine draws tokens with."""


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, settings: Settings, seen_BV: jax.Array
) -> jax.Array:
    """Returns tokens_B, drawn from the processed distribution; the argmax where the temperature is 0.

    Args:
      logits_BV: the model's, float32.
      keys_B: a random key a row.
      settings: each row's parameters.
      seen_BV: which tokens a row's prompt and continuation hold.
    """
    logits_BV = penalise_repetition(logits_BV, seen_BV, settings.repetition_penalty_B)
    greedy_B = settings.temperature_B == 0

    def draw(logits_BV):
        warped_BV = warp(logits_BV, settings)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, warped_BV)
        return jnp.where(greedy_B, logits_BV.argmax(-1), drawn_B)

    tokens_B = jax.lax.cond(greedy_B.all(), lambda x: x.argmax(-1), draw, logits_BV)
    return tokens_B.astype(jnp.int32)


def penalise_repetition(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
    """Returns the logits with those of seen tokens made smaller; a penalty of 1 changes no bit."""
    penalty_B1 = penalty_B[:, None]
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


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


def _number(value: Any) -> int | float:
    """`value` itself; NaN, which no comparison accepts, if it is no number or too large for a float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return value if abs(value) <= _LARGEST else math.nan


_LARGEST = float(np.finfo(np.float32).max)
