"""Sampling against transformers' own logits processors, in float64 and in the order that `generate` chains them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from core.sampling import Sampling, Settings
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
)

pytestmark = pytest.mark.parity

LARGE = 1009
PROMPT, PRODUCED = 16, 3


@pytest.fixture(scope="module")
def torch() -> Any:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def transformers(torch) -> Any:
    return pytest.importorskip("transformers")


def peaked(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 4, (7, LARGE))


def flat(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.3, (7, LARGE))


def tied(rng: np.random.Generator) -> np.ndarray:
    return np.round(rng.normal(0, 2, (7, LARGE)))


@pytest.mark.parametrize("logits", [peaked, flat, tied], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.8),
        Sampling(repetition_penalty=0.7),
        Sampling(presence_penalty=1.2, frequency_penalty=-0.4),
        Sampling(temperature=0.6),
        Sampling(top_k=13),
        Sampling(top_k=5000),
        Sampling(top_p=0.9),
        Sampling(top_p=0.01),
        Sampling(top_p=1e-9),
        Sampling(min_p=0.1),
        Sampling(logit_bias={3: 4.0, 11: -2.5, 90: 20.0}),
        Sampling(bad_ids=(1, 2, 3)),
        Sampling(allowed_ids=(1, 2, 3, 40, 500)),
        Sampling(min_new_tokens=PRODUCED + 1),
        Sampling(min_new_tokens=PRODUCED),
        Sampling(temperature=1.7, top_k=50, top_p=0.85, min_p=0.02, repetition_penalty=1.2),
        Sampling(temperature=0.3, top_k=400, top_p=0.99, min_p=0.3, repetition_penalty=3.0),
        EVERYTHING,
    ],
    ids=name,
)
def test_probabilities_are_those_of_transformers_in_its_order(
    torch, transformers, sampling, logits: Callable[[np.random.Generator], np.ndarray]
):
    rng = np.random.default_rng(0)
    logits_BV = logits(rng).astype(np.float32)
    ids_BT = rng.integers(0, LARGE, (7, PROMPT + PRODUCED))
    expected_BV = in_transformers(torch, transformers, sampling, logits_BV, ids_BT)

    rows = Rows([sampling] * 7, LARGE)
    rows.counts_BV[:] = counts(ids_BT, LARGE)
    found_BV = probabilities(rows, logits_BV)
    if logits is tied and sampling.top_p < 1:
        # Which of the equals at the edge of the nucleus stay is up to torch's sort, which is not stable.
        found_BV, expected_BV = np.sort(found_BV), np.sort(expected_BV)
    assert (found_BV[expected_BV == 0] == 0).all()
    assert (found_BV[expected_BV > 2**-30] > 0).all()
    np.testing.assert_allclose(found_BV, expected_BV, rtol=1e-5, atol=2**-30)


@pytest.mark.parametrize("sampling", DRAWN, ids=name)
def test_draws_follow_the_distribution_of_transformers(torch, transformers, sampling):
    """Chi-square over 20,000 draws with a fixed seed; a right sampler fails one seed in 1,000."""
    rng = np.random.default_rng(5)
    logits_BV = rng.normal(0, 1, (1, V)).astype(np.float32)
    ids_BT = rng.integers(0, V, (1, PROMPT + PRODUCED))
    ids_BT[:, 1::2] = logits_BV.argmax(-1)  # a likely token, said often
    (p_V,) = in_transformers(torch, transformers, sampling, logits_BV, ids_BT)
    (bias_V,), settings = biases([sampling]), Settings.of([sampling])
    tokens_B = draw_many(jax.random.key(8), logits_BV[0], counts(ids_BT, V)[0], bias_V, settings)
    assert chi_square(np.bincount(tokens_B, minlength=V), p_V) < 0


def counts(ids_BT: np.ndarray, size: int) -> np.ndarray:
    """Twice the times produced, and one more for what the prompt holds."""
    ids_BT1 = ids_BT[:, :, None] == np.arange(size)
    produced_BV = ids_BT1[:, PROMPT:].sum(1)
    return (2 * produced_BV + ids_BT1[:, :PROMPT].any(1)).astype(np.int32)


def in_transformers(
    torch: Any, transformers: Any, sampling: Sampling, logits_BV: np.ndarray, ids_BT: np.ndarray
) -> np.ndarray:
    scores_BV = torch.from_numpy(logits_BV.astype(np.float64))
    for processor in processors(transformers, sampling, logits_BV.shape[1]):
        scores_BV = processor(torch.from_numpy(ids_BT), scores_BV)
    return torch.softmax(scores_BV, -1).numpy()


def processors(transformers: Any, sampling: Sampling, size: int) -> list[Any]:
    """Those that `generate` would chain for these settings, chosen and ordered by transformers itself."""
    bias, allowed = dict(sampling.logit_bias), sampling.allowed_ids
    settings = transformers.GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
        sequence_bias={(id_,): value for id_, value in bias.items()} or None,
        bad_words_ids=[[id_] for id_ in sampling.bad_ids] or None,
        min_new_tokens=sampling.min_new_tokens or None,
        eos_token_id=list(STOPS),
        pad_token_id=STOPS[0],
    )
    config = transformers.GPT2Config(vocab_size=size, n_embd=4, n_head=1, n_layer=1)
    model = transformers.GPT2LMHeadModel(config)
    model._prepare_special_tokens(settings)
    has_openai_s = bool(sampling.presence_penalty or sampling.frequency_penalty)
    chosen = model._get_logits_processor(
        generation_config=settings,
        input_ids_seq_length=PROMPT,
        prefix_allowed_tokens_fn=None if allowed is None else lambda *_: list(allowed),
        # Custom ones come after those for penalties and bans, and before temperature.
        logits_processor=[openai_s(sampling)] if has_openai_s else [],
    )
    wanted = [
        bool(bias),
        sampling.repetition_penalty != 1,
        bool(sampling.bad_ids),
        sampling.min_new_tokens > 0,
        allowed is not None,
        has_openai_s,
        sampling.temperature != 1,
        sampling.top_k > 0,
        sampling.top_p < 1,
        sampling.min_p > 0,
    ]
    assert len(chosen) == sum(wanted)
    return list(chosen)


def openai_s(sampling: Sampling) -> Callable[[Any, Any], Any]:
    """What transformers has no processor for: OpenAI's formula, as its API reference gives it."""

    def process(ids_BT: Any, scores_BV: Any) -> Any:
        scores_BV = scores_BV.clone()
        for ids_T, scores_V in zip(ids_BT[:, PROMPT:].tolist(), scores_BV, strict=True):
            for id_ in set(ids_T):
                scores_V[id_] -= ids_T.count(id_) * sampling.frequency_penalty
                scores_V[id_] -= sampling.presence_penalty
        return scores_BV

    return process
