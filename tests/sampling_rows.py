"""Rows of `core.sampling`, run in few compilations, and what their draws are compared with."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import sampling as sampling_lib
from core.sampling import Sampling, Settings

V = 97
STOPS = (5, 96)

EVERYTHING = Sampling(
    temperature=0.8,
    top_k=24,
    top_p=0.9,
    min_p=0.04,
    repetition_penalty=1.9,
    presence_penalty=1.1,
    frequency_penalty=0.6,
    logit_bias={i: (-1) ** i * i / 32 for i in range(0, V, 3)},
    bad_ids=(2, 7, 33),
    allowed_ids=(*range(2, V, 2), 5, 7, 9, 11, 33, 35),
    min_new_tokens=9,
)


DRAWN = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(top_k=12),
    Sampling(top_p=0.8),
    Sampling(top_p=0.5),
    Sampling(min_p=0.1),
    Sampling(repetition_penalty=1.7),
    Sampling(presence_penalty=1.5),
    Sampling(frequency_penalty=0.9),
    Sampling(logit_bias={3: 2.0, 11: -2.5, 90: 1.0}),
    Sampling(bad_ids=tuple(range(1, V, 3))),
    Sampling(allowed_ids=tuple(range(0, V, 4))),
    Sampling(min_new_tokens=9),
    EVERYTHING,
]


def name(sampling: Sampling) -> str:
    """What is not a default."""
    if sampling is EVERYTHING:
        return "everything"
    fields = (f for f in dataclasses.fields(sampling) if getattr(sampling, f.name) != f.default)
    return ",".join(f"{f.name}={getattr(sampling, f.name)}"[:40] for f in fields) or "plain"


def some_counts(rows: int, size: int = V) -> np.ndarray:
    """A fifth of the tokens in the prompt, and a fifth produced, up to three times."""
    rng = np.random.default_rng(9)
    produced = np.where(rng.random((rows, size)) < 0.2, rng.integers(1, 4, (rows, size)), 0)
    return (2 * produced + (rng.random((rows, size)) < 0.2)).astype(np.int32)


def biases(rows: list[Sampling], size: int = V) -> np.ndarray:
    none = np.zeros(size, np.float32)
    found = [sampling_lib.bias_row(row, size) for row in rows]
    return np.stack([none if row is None else row for row in found])


class Rows:
    """What `sample` takes beside logits and keys, for rows that have produced three tokens."""

    def __init__(self, rows: list[Sampling], size: int = V):
        self.settings = Settings.of(rows)
        self.counts_BV, self.bias_BV = some_counts(len(rows), size), biases(rows, size)
        self.produced_B = np.full(len(rows), 3, np.int32)

    def run(self, logits_BV: np.ndarray, seed: int = 0) -> "Out":
        """In 40 rows, so that one compilation serves all tests."""
        count = len(logits_BV)
        keys_B = jax.random.split(jax.random.key(seed), 40)
        columns = logits_BV, self.settings, self.counts_BV, self.bias_BV, self.produced_B
        columns = jax.tree.map(lambda x: np.resize(x, (40, *x.shape[1:])), columns)
        return jax.tree.map(lambda x: np.asarray(x)[:count], run(columns[0], keys_B, *columns[1:]))

    def sample(self, logits_BV: np.ndarray, seed: int = 0) -> np.ndarray:
        return self.run(logits_BV, seed).tokens_B


class Out(NamedTuple):
    adjusted_BV: Any
    weights_BV: Any
    nucleus_B: Any
    tokens_B: Any


@jax.jit
def run(logits_BV, keys_B, settings, counts_BV, bias_BV, produced_B) -> Out:
    arguments = counts_BV, bias_BV, produced_B, STOPS
    adjusted_BV = sampling_lib.adjust(logits_BV, settings, *arguments)
    weights_BCW, _, nucleus_B = sampling_lib.weigh(sampling_lib.chunks(adjusted_BV), settings)
    weights_BV = weights_BCW.reshape(len(logits_BV), -1)
    tokens_B = sampling_lib.sample(logits_BV, keys_B, settings, *arguments)
    return Out(adjusted_BV, weights_BV, nucleus_B, tokens_B)


def probabilities(rows: Rows, logits_BV: np.ndarray) -> np.ndarray:
    """What `sample` draws from, in float64: the weights, cut at the nucleus as the docstring of `weigh` says."""
    kept_BV = np.zeros(logits_BV.shape)
    for kept_V, x_V, weights_V, nucleus, _ in zip(kept_BV, *rows.run(logits_BV), strict=True):
        order = np.argsort(x_V, kind="stable")[::-1]  # the last of equals first, as HF has them
        weights = weights_V[order].astype(np.int64)
        kept_V[order] = np.where(np.cumsum(weights) - weights < nucleus, weights, 0)
    return kept_BV / kept_BV.sum(-1, keepdims=True)


@jax.jit
def draw_many(key, logits_V, counts_V, bias_V, settings):
    draws = 20_000
    many = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (draws, *x.shape)), (logits_V, counts_V, bias_V)
    )
    settings = Settings(*(jnp.broadcast_to(x, (draws,)) for x in settings))
    logits_BV, counts_BV, bias_BV = many
    keys_B, produced_B = jax.random.split(key, draws), jnp.full(draws, 3)
    return sampling_lib.sample(logits_BV, keys_B, settings, counts_BV, bias_BV, produced_B, STOPS)


def chi_square(counts_V: np.ndarray, p_V: np.ndarray) -> float:
    """By how much the statistic exceeds its 99.9th percentile."""
    assert (counts_V[p_V == 0] == 0).all()
    draws = counts_V.sum()
    likely = p_V * draws >= 5  # below, the chi-square approximation does not hold
    observed = np.append(counts_V[likely], counts_V[~likely].sum())
    expected = np.append(p_V[likely], p_V[~likely].sum()) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(observed) - 1
    assert freedom >= 5
    # Wilson & Hilferty's cube root: the 99.9th percentile is 3.09 standard deviations out.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((observed - expected) ** 2 / expected).sum() - limit
