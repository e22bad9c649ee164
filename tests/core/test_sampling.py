import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from core import sampling as sampling_lib
from core.sampling import Sampling, SamplingError, Settings

V = 97

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.6, top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=V),
    Sampling(top_k=1000),
    Sampling(top_p=0.9),
    Sampling(top_p=0.001),
    Sampling(top_p=1e-9),
    Sampling(temperature=0.5, top_k=20, top_p=0.8),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(temperature=1.3, top_k=30, top_p=0.95, min_p=0.05, repetition_penalty=1.7),
    Sampling(repetition_penalty=0.6),
    Sampling(temperature=0),
]


def some_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, V)).astype(np.float32)


def some_seen(rows: int) -> np.ndarray:
    return np.random.default_rng(9).random((rows, V)) < 0.2


@jax.jit
def process(logits_BV, seen_BV, settings):
    penalised_BV = sampling_lib.penalise_repetition(
        logits_BV, seen_BV, settings.repetition_penalty_B
    )
    return sampling_lib.warp(penalised_BV, settings)


def in_numpy(logits_V: np.ndarray, seen_V: np.ndarray, s: Sampling) -> np.ndarray:
    """One row in float64, by the papers' definitions: sets of tokens, no sorting tricks."""
    x = logits_V.astype(np.float64)
    x = np.where(seen_V, np.where(x < 0, x * s.repetition_penalty, x / s.repetition_penalty), x)
    x = x / (s.temperature or 1)
    if s.top_k:
        x[x < np.sort(x)[-min(s.top_k, len(x))]] = -np.inf
    if s.top_p < 1:
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(reference.softmax(x)[order]) - reference.softmax(x)[order]
        x[order[before >= s.top_p]] = -np.inf
    p = reference.softmax(x)
    x[p < s.min_p * p.max()] = -np.inf
    return x


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_processed_logits_are_the_definitions_in_numpy(sampling):
    logits_BV, seen_BV = some_logits(5), some_seen(5)
    found_BV = np.asarray(process(logits_BV, seen_BV, Settings.of([sampling] * 5)))
    expected_BV = np.stack(
        [in_numpy(*row, sampling) for row in zip(logits_BV, seen_BV, strict=True)]
    )
    np.testing.assert_array_equal(found_BV == -np.inf, expected_BV == -np.inf)
    np.testing.assert_allclose(found_BV, expected_BV, rtol=1e-6)


def test_a_row_s_processed_logits_do_not_depend_on_its_neighbours():
    count = len(SETTINGS)
    logits_BV, seen_BV = some_logits(count), some_seen(count)
    together_BV = np.asarray(process(logits_BV, seen_BV, Settings.of(SETTINGS)))
    for row, sampling in enumerate(SETTINGS):
        settings = Settings.of([sampling] * count)
        alone_BV = np.asarray(process(logits_BV, seen_BV, settings))
        np.testing.assert_array_equal(together_BV[row], alone_BV[row])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [1, 2, 3]),  # ties at the k-th place stay
        (Sampling(top_p=0.3), [3]),  # a tie at the edge of the nucleus: one of the equals, the last
        (Sampling(top_p=0.6), [2, 3]),
        (Sampling(min_p=1.0), [1, 2, 3]),
    ],
    ids=str,
)
def test_ties_are_kept_as_hf_keeps_them(sampling, kept):
    logits_BV = jnp.array([[0.0, 5.0, 5.0, 5.0, -jnp.inf]])
    found_BV = process(logits_BV, jnp.zeros((1, 5), bool), Settings.of([sampling]))
    assert np.flatnonzero(np.asarray(found_BV[0]) > -np.inf).tolist() == kept


def test_a_penalty_of_one_changes_no_bit():
    logits_BV = some_logits(3)
    found_BV = sampling_lib.penalise_repetition(
        jnp.asarray(logits_BV), jnp.asarray(some_seen(3)), jnp.ones(3)
    )
    np.testing.assert_array_equal(found_BV, logits_BV)


def test_temperature_zero_takes_the_likeliest_after_the_penalty_whatever_the_key():
    rows = [Sampling(temperature=0, repetition_penalty=r) for r in (1.0, 3.0)] + [Sampling()]
    logits_BV, seen_BV = np.tile(some_logits(1), (3, 1)), np.zeros((3, V), bool)
    best, second = np.argsort(-logits_BV[0])[:2]
    seen_BV[:, best] = True
    for seed in range(5):
        keys_B = jax.random.split(jax.random.key(seed), 3)
        for settings in (rows, [*rows[:2], rows[0]]):  # with and without a drawing neighbour
            found_B = sampling_lib.sample(
                jnp.asarray(logits_BV), keys_B, Settings.of(settings), jnp.asarray(seen_BV)
            )
            assert found_B.dtype == jnp.int32
            assert np.asarray(found_B)[:2].tolist() == [best, second]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.6, top_k=12, top_p=0.9, repetition_penalty=1.4)],
    ids=["plain", "filtered"],
)
def test_draws_follow_the_processed_distribution(sampling):
    """Chi-square over 20,000 draws with a fixed seed; a right sampler fails one seed in 1,000."""
    draws = 20_000
    logits_V, seen_V = some_logits(1)[0] / 2, some_seen(1)[0]
    p_V = reference.softmax(in_numpy(logits_V, seen_V, sampling))
    settings = Settings.of([sampling] * draws)
    tokens_B = jax.jit(sampling_lib.sample)(
        jnp.broadcast_to(logits_V, (draws, V)),
        jax.random.split(jax.random.key(0), draws),
        settings,
        jnp.broadcast_to(seen_V, (draws, V)),
    )
    counts_V = np.bincount(np.asarray(tokens_B), minlength=V)
    assert (counts_V[p_V == 0] == 0).all()
    likely = p_V * draws >= 5  # below, the chi-square approximation does not hold
    observed = np.append(counts_V[likely], counts_V[~likely].sum())
    expected = np.append(p_V[likely], p_V[~likely].sum()) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(observed) - 1
    assert freedom >= 5
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # Wilson & Hilferty's cube root: the 99.9th percentile is 3.09 standard deviations out.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("repetition_penalty", 1e39),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", 2**31),
        ("top_k", 10**400),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", None),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", -1),
        ("logprobs", True),
        ("stop", "abc"),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", None),
        ("ignore_eos", 1),
    ],
)
def test_an_impossible_setting_is_one_error_that_names_it(field, value):
    settings: dict[str, Any] = {field: value}
    with pytest.raises(SamplingError, match=rf"^{field} is .*expected") as caught:
        Sampling(**settings)
    assert "\n" not in str(caught.value)


def test_the_largest_seed_is_accepted():
    assert Sampling(seed=2**63 - 1).seed == 2**63 - 1


def test_sampling_is_immutable_and_hashable():
    sampling = Sampling(stop=["a", "b"])  # pyright: ignore[reportArgumentType]
    assert sampling == Sampling(stop=("a", "b"))
    assert hash(sampling) == hash(Sampling(stop=("a", "b")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 3  # pyright: ignore[reportAttributeAccessIssue]
