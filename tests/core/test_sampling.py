import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from core import sampling as sampling_lib
from core.sampling import Sampling, SamplingError, Settings
from sampling_rows import (
    DRAWN,
    EVERYTHING,
    STOPS,
    Rows,
    V,
    biases,
    chi_square,
    draw_many,
    name,
    probabilities,
    run,
    some_counts,
)

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
    Sampling(top_p=1e-12),
    Sampling(temperature=0.5, top_k=20, top_p=0.8),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(top_p=0.7, min_p=0.05),
    Sampling(temperature=1.3, top_k=30, top_p=0.95, min_p=0.05, repetition_penalty=1.7),
    Sampling(repetition_penalty=0.6),
    Sampling(presence_penalty=1.5),
    Sampling(frequency_penalty=-0.7),
    Sampling(logit_bias={3: 4.0, 11: -2.5, 90: 100.0}),
    Sampling(bad_ids=(0, 3, 96)),
    Sampling(allowed_ids=(1, 2, 40, 41, 5), top_k=3),
    Sampling(min_new_tokens=9),
    Sampling(temperature=0),
]


def some_logits(rows: int, seed: int = 0, size: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, size)).astype(np.float32)


def in_numpy(logits_V: np.ndarray, counts_V: np.ndarray, s: Sampling, produced: int = 3):
    """One row's probabilities in float64, in HF's order, by the papers' definitions: sets of tokens, no tricks."""
    x = logits_V.astype(np.float64)
    for id_, bias in dict(s.logit_bias).items():
        x[id_] += bias
    x = np.where(
        counts_V > 0, np.where(x < 0, x * s.repetition_penalty, x / s.repetition_penalty), x
    )
    x = x - s.frequency_penalty * (counts_V // 2) - s.presence_penalty * (counts_V // 2 > 0)
    x[list(s.bad_ids)] = -np.inf
    if produced < s.min_new_tokens:
        x[list(STOPS)] = -np.inf
    if s.allowed_ids is not None:
        x[~np.isin(np.arange(len(x)), s.allowed_ids)] = -np.inf
    if s.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    x = x / s.temperature
    if s.top_k:
        x[x < np.sort(x)[-min(s.top_k, len(x))]] = -np.inf
    if s.top_p < 1:
        order = np.argsort(x, kind="stable")[::-1]
        before = np.cumsum(reference.softmax(x)[order]) - reference.softmax(x)[order]
        x[order[1:][before[1:] >= s.top_p]] = -np.inf
    p = reference.softmax(x)
    x[p < s.min_p * p.max()] = -np.inf
    return reference.softmax(x)


@pytest.mark.parametrize("sampling", [*SETTINGS, EVERYTHING], ids=name)
def test_probabilities_are_the_definitions_in_hf_s_order(sampling):
    logits_BV = some_logits(5)
    rows = Rows([sampling] * 5)
    found_BV = probabilities(rows, logits_BV)
    expected_BV = np.stack(
        [in_numpy(*row, sampling) for row in zip(logits_BV, rows.counts_BV, strict=True)]
    )
    if sampling.temperature == 0:
        np.testing.assert_array_equal(rows.sample(logits_BV), expected_BV.argmax(-1))
        return
    assert (found_BV[expected_BV == 0] == 0).all()
    assert (found_BV[expected_BV > 2**-30] > 0).all()
    np.testing.assert_allclose(found_BV, expected_BV, rtol=1e-5, atol=2**-30)


def test_a_row_s_bits_do_not_depend_on_its_neighbours_its_slot_or_the_number_of_rows():
    """With every knob in the batch every part runs; alone, only the row's own."""
    settings, size = [*SETTINGS, EVERYTHING], 700
    count = len(settings)
    logits_BV, counts_BV = some_logits(count, size=size), some_counts(count, size)
    keys_B = jax.random.split(jax.random.key(4), count)

    def of(order: list[int]) -> list[tuple[np.ndarray, ...]]:
        rows = Rows([settings[i] for i in order], size)
        columns = counts_BV[order], rows.bias_BV, rows.produced_B
        out = run(logits_BV[order], keys_B[jnp.array(order)], rows.settings, *columns)
        return list(zip(*map(np.asarray, out), strict=True))

    together = of(list(range(count)))
    backwards = of(list(range(count))[::-1])[::-1]
    for i in range(count):
        (alone,) = of([i])
        for other in (backwards[i], alone):
            for ours, theirs in zip(together[i], other, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_no_bias_is_the_same_as_a_bias_of_nothing():
    settings = dataclasses.replace(EVERYTHING, logit_bias=(), bad_ids=(), allowed_ids=None)
    rows, logits_BV = Rows([settings, Sampling(), Sampling(temperature=0)]), some_logits(3)
    keys_B = jax.random.split(jax.random.key(0), 3)
    columns = keys_B, rows.settings, rows.counts_BV
    with_bias, without = (
        run(logits_BV, *columns, bias_BV, rows.produced_B) for bias_BV in (rows.bias_BV, None)
    )
    jax.tree.map(np.testing.assert_array_equal, with_bias, without)


def test_a_full_vocabulary_s_draws_are_the_same_in_any_number_of_rows():
    size = 50257
    settings = [Sampling(top_k=50, top_p=0.95), Sampling(temperature=1.4, min_p=0.01), EVERYTHING]
    settings = [dataclasses.replace(s, allowed_ids=None) for s in settings]
    rows, logits_BV = Rows(settings, size), some_logits(3, size=size)
    keys_B = jax.random.split(jax.random.key(1), 3)
    columns = logits_BV, keys_B, rows.settings, rows.counts_BV, rows.bias_BV, rows.produced_B
    together = run(*columns)
    for b in range(3):
        alone = run(*jax.tree.map(lambda x, b=b: x[b : b + 1], columns))
        jax.tree.map(lambda x, y, b=b: np.testing.assert_array_equal(x[0], y[b]), alone, together)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [1, 2, 3]),  # ties at the k-th place stay
        (Sampling(top_p=0.3), [3]),  # a tie at the edge of the nucleus: one of the equals, the last
        (Sampling(top_p=0.6), [2, 3]),
        (Sampling(min_p=1.0), [1, 2, 3]),
        (Sampling(top_k=2, top_p=0.6), [2, 3]),
    ],
    ids=lambda x: name(x) if isinstance(x, Sampling) else str(x),
)
@pytest.mark.parametrize("top", [5.0, 0.0, -80.0])
def test_ties_are_kept_as_hf_keeps_them(sampling, kept, top):
    """A nucleus of half of four equals holds two, and rounding cannot make it three."""
    logits_V = np.full(V, -np.inf, np.float32)
    logits_V[:4] = top - 5, top, top, top
    logits_BV = np.tile(logits_V, (40, 1))
    rows = Rows([sampling] * 40)
    rows.counts_BV[:] = 0
    assert set(rows.sample(logits_BV).tolist()) == set(kept)
    assert np.flatnonzero(probabilities(rows, logits_BV)[0]).tolist() == kept


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_a_nucleus_that_ends_at_a_token_holds_no_further_one(top_p):
    logits_BV = np.full((40, V), -np.inf, np.float32)
    logits_BV[:, 10:14] = 1
    rows = Rows([Sampling(top_p=top_p)] * 40)
    rows.counts_BV[:] = 0
    assert (probabilities(rows, logits_BV) > 0).sum() == 40 * 4 * top_p
    assert len(set(rows.sample(logits_BV).tolist())) == 4 * top_p


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-5, 1.0, 1e4, 1e36])
def test_top_k_is_exact_at_every_scale_of_the_logits(scale):
    """Down to the smallest floats, which lie as close to each other as they come, and where there are ties."""
    logits_BV = np.round(some_logits(6) * 9) * np.float32(scale)
    rows = Rows([Sampling(top_k=k, temperature=1e38) for k in (1, 2, 9, 40, 96, 97)])
    rows.counts_BV[:] = 0
    found_BV = probabilities(rows, logits_BV) > 0
    for found_V, x_V, k in zip(found_BV, logits_BV, rows.settings.top_k_B, strict=True):
        np.testing.assert_array_equal(found_V, x_V >= np.sort(x_V)[-k])


def test_temperature_zero_takes_the_first_of_the_likeliest_whatever_the_key_and_the_neighbours():
    greedy = [Sampling(temperature=0, repetition_penalty=r) for r in (1.0, 3.0)]
    tied = Sampling(temperature=0, top_p=0.1, top_k=1)
    logits_BV = np.tile(some_logits(1), (4, 1))
    best, second = np.argsort(-logits_BV[0])[:2]
    logits_BV[2, [60, 70]] = 50
    for seed in range(5):
        for last in (Sampling(), greedy[0]):  # with and without a drawing neighbour
            rows = Rows([*greedy, tied, last])
            rows.counts_BV[:] = 0
            rows.counts_BV[:, best] = 1
            found_B = rows.sample(logits_BV, seed)
            assert found_B.dtype == np.int32
            assert found_B[:3].tolist() == [best, second, 60]


def test_a_temperature_close_to_nothing_is_greedy():
    rows = Rows([Sampling(temperature=t) for t in (1e-3, 1e-30, 1e-38, 1e-42)])
    logits_BV = some_logits(4) - 90
    rows.counts_BV[:] = 0
    np.testing.assert_array_equal(rows.sample(logits_BV), logits_BV.argmax(-1))


def test_the_ban_on_stop_ids_ends_with_min_new_tokens():
    rows = Rows([Sampling(temperature=0, min_new_tokens=4)] * 3)
    logits_BV = some_logits(3)
    logits_BV[:, STOPS] = 60
    rows.produced_B[:] = 0, 3, 4
    ends_B = np.isin(rows.sample(logits_BV), STOPS)
    assert ends_B.tolist() == [False, False, True]


def test_a_seen_token_counts_once_for_presence_and_each_time_for_frequency_and_never_from_the_prompt():
    rows = Rows([Sampling(presence_penalty=1.0, frequency_penalty=0.25)])
    rows.counts_BV[:] = 0
    rows.counts_BV[0, :6] = 0, 1, 2, 3, 8, 9  # (times produced, in the prompt): 0n 0y 1n 1y 4n 4y
    adjusted_BV = rows.run(np.zeros((1, V), np.float32)).adjusted_BV
    assert (-adjusted_BV[0, :7]).tolist() == [0, 0, 1.25, 1.25, 2, 2, 0]


@pytest.mark.parametrize("sampling", DRAWN, ids=name)
def test_draws_follow_the_processed_distribution(sampling):
    """Chi-square over 20,000 draws with a fixed seed; a right sampler fails one seed in 1,000."""
    logits_V, counts_V = some_logits(1)[0] / 2, some_counts(1)[0]
    p_V = in_numpy(logits_V, counts_V, sampling)
    tokens_B = draw_many(
        jax.random.key(2), logits_V, counts_V, biases([sampling])[0], Settings.of([sampling])
    )
    assert chi_square(np.bincount(tokens_B, minlength=V), p_V) < 0


@pytest.mark.parametrize("words", [0, 1, 2**16 - 1, 2**16, 2**31 + 12345, 2**32 - 1])
@pytest.mark.parametrize("total", [0, 1, 65535, 65536, 2**30 + 7, 2**31 - 1])
def test_a_share_is_the_exact_product(words, total):
    found = sampling_lib._share(jnp.uint32(words), jnp.int32(total))
    assert int(found) == words * total >> 32


def test_weights_use_the_integers_they_have_and_never_overflow():
    flat, peak = np.zeros((1, 2**18), np.float32), np.full((1, 2**18), -50, np.float32)
    peak[0, 7] = 0
    tail = np.full((1, 2**18), -21.5, np.float32)  # each just enough for one unit
    tail[0, 7] = 0
    weigh = jax.jit(sampling_lib.weigh)
    for logits_BV in (flat, peak, tail):
        weights_BCW, *_ = weigh(logits_BV.reshape(1, -1, 256), Settings.of([Sampling()]))
        assert 2**29 <= np.asarray(weights_BCW).astype(np.int64).sum() < 2**31


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
        ("presence_penalty", 2.01),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", None),
        ("min_new_tokens", -1),
        ("min_new_tokens", 1.0),
        ("min_new_tokens", 51),
        ("logit_bias", 3),
        ("logit_bias", "3:4"),
        ("bad_ids", 3),
        ("bad_ids", None),
        ("allowed_ids", "12"),
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


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"min_new_tokens": 2**31, "max_new_tokens": 2**31}, "min_new_tokens is 2147483648; exp"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias holds (-1, 1.0); expected a token id and its bias"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias holds ('7', 1.0); expected a token id"),
        ({"logit_bias": ((1, 2.0), (1, 3.0))}, "logit_bias holds 1 twice; expected each"),
        ({"logit_bias": [[1, 2.0]]}, "logit_bias holds [1, 2.0]; expected a token id"),
        ({"logit_bias": {5: 100.5}}, "logit_bias of 5 is 100.5; expected a float, from -100 to"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of 5 is nan; expected a float, from"),
        ({"bad_ids": (4, True)}, "bad_ids holds True; expected token ids, 0 or more"),
        ({"bad_ids": (2**31,)}, "bad_ids holds 2147483648; expected token ids"),
        ({"allowed_ids": (4, -1)}, "allowed_ids holds -1; expected token ids, 0 or more"),
    ],
    ids=str,
)
def test_an_impossible_id_is_one_error_that_names_it(settings, told):
    with pytest.raises(SamplingError, match="^" + re.escape(told)):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"logit_bias": {9: 1.0, 10: 1.0}}, "logit_bias holds 10; expected ids below the voc"),
        ({"bad_ids": (10,)}, "bad_ids holds 10; expected ids below the vocabulary's 10"),
        ({"allowed_ids": (3, 11)}, "allowed_ids holds 11; expected ids below the vocabulary's 10"),
        ({"allowed_ids": ()}, "allowed_ids and bad_ids leave nothing to draw; expected"),
        ({"allowed_ids": (3, 4), "bad_ids": (3, 4, 5)}, "allowed_ids and bad_ids leave nothing"),
        ({"bad_ids": tuple(range(10))}, "allowed_ids and bad_ids leave nothing to draw"),
        ({"allowed_ids": (8, 9)}, "allowed_ids and bad_ids leave nothing to draw"),
        ({"allowed_ids": (1, 9), "min_new_tokens": 2}, "allowed_ids and bad_ids leave end-of-text"),
    ],
    ids=str,
)
def test_ids_that_a_vocabulary_cannot_serve_are_refused(settings, told):
    """Of 10 tokens, of which 1 and 2 end a text, and 8 and 9 cannot be read."""
    with pytest.raises(SamplingError, match="^" + re.escape(told)):
        sampling_lib.check_ids(Sampling(**settings), 10, stop_ids=(1, 2), missing_ids=(8, 9))


def test_ids_that_a_vocabulary_can_serve_pass():
    for sampling in (
        Sampling(),
        Sampling(min_new_tokens=3),
        Sampling(allowed_ids=(1,)),
        Sampling(allowed_ids=(1, 9), bad_ids=(9,), logit_bias={9: 1.0}),
    ):
        sampling_lib.check_ids(sampling, 10, stop_ids=(1, 2), missing_ids=(8,))


def test_a_bias_row_holds_bias_bad_and_allowed_ids_and_is_none_for_nothing():
    assert sampling_lib.bias_row(Sampling(top_k=3), 6) is None
    row = sampling_lib.bias_row(
        Sampling(logit_bias={0: 2, 1: -1.5, 2: 9}, bad_ids=(2,), allowed_ids=(0, 1, 2, 3)), 6
    )
    assert row is not None
    assert row.dtype == np.float32
    assert row.tolist() == [2, -1.5, -np.inf, 0, -np.inf, -np.inf]


def test_the_largest_seed_is_accepted():
    assert Sampling(seed=2**63 - 1).seed == 2**63 - 1


def test_sampling_is_immutable_and_hashable():
    given: dict[str, Any] = {"stop": ["a", "b"], "bad_ids": [9, 3, 9], "allowed_ids": [4, 2]}
    sampling = Sampling(**given, logit_bias={7: 1, 2: -0.5})
    same = Sampling(
        stop=("a", "b"), bad_ids=(3, 9), allowed_ids=(2, 4), logit_bias=((2, -0.5), (7, 1.0))
    )
    assert sampling == same
    assert hash(sampling) == hash(same)
    assert dataclasses.replace(sampling, top_k=2).logit_bias == sampling.logit_bias
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 3  # pyright: ignore[reportAttributeAccessIssue]
