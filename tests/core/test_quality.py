"""What a precision costs, against the same numbers in float64."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
import tiny
from core import checkpoint, models, quality
from core.quality import QualityError, measure, windows
from core.tokenizer import Tokenizer

TEXT = "Über the flax mill, and over the flax mill again, the quick brown fox jumps. " * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("models") / "model", Tokenizer.utf8()
    model = models.build(tiny.config(vocab_size=tokenizer.vocab_size, n_layer=1))
    params = tiny.params(model, amplify=25)
    checkpoint.save(path, model.config, params, tokenizer=tokenizer)
    return path


def run(folder: Path, *flags: str, code: int = 0) -> Any:
    command = [sys.executable, "-m", "core.quality", f"--model={folder}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 2, 1), (9, 9, 4), (10, 4, 4), (10, 4, 1), (31, 7, 3)]
)
def test_every_token_but_the_first_is_scored_once_and_from_the_window_before_it(
    length: int, window: int, stride: int
):
    scored = []
    for start, end, new in windows(length, window, stride):
        assert 0 <= start < new < end <= start + window
        scored += range(new, end)
    assert scored == list(range(1, length))


def by_hand(config: Any, params: Any, tokens: list[int], window: int, stride: int) -> np.ndarray:
    """The log-probabilities at each predicted token's place, [tokens - 1, V], in float64."""
    found = []
    for start, end, new in windows(len(tokens), window, stride):
        logits_TV = reference.logits(config, params, [tokens[start:end]])[0]
        found.append(reference.log_softmax(logits_TV)[new - 1 - start : end - 1 - start])
    return np.concatenate(found)


def test_perplexity_and_divergence_are_those_of_float64():
    model = models.build(tiny.config(n_layer=1))
    params = tiny.params(model, amplify=25)
    tokens = np.asarray(tiny.tokens(model.config, 70)).tolist()
    found = measure(model, params, tokens, ["float32", "bfloat16", "int8"], window=32, stride=20)
    exact_NV = by_hand(model.config, params, tokens, 32, 20)
    surprise = -exact_NV[np.arange(69), tokens[1:]].mean()
    assert found["float32"].perplexity == pytest.approx(math.exp(surprise), rel=1e-5)
    assert (found["float32"].kl_mean, found["float32"].same_argmax) == (0, 1)
    # In int8, of the weights that it stands for: activations are rounded besides, which moves it a little.
    assert 0 < found["bfloat16"].kl_mean < found["int8"].kl_mean < 0.05
    assert found["int8"].kl_mean < found["int8"].kl_max
    assert 0.8 < found["int8"].same_argmax < 1
    assert all(quality.tokens == 69 for quality in found.values())


def test_a_divergence_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    # As small as rounding gives, and far beyond.
    for size, tolerance in ((1e-4, 2e-3), (0.3, 1e-5), (30.0, 1e-5)):
        exact_TV = reference.log_softmax(rng.standard_normal((5, 301)) * 3)
        rounded_TV = reference.log_softmax(exact_TV + size * rng.standard_normal((5, 301)))
        kl_T = (np.exp(exact_TV) * (exact_TV - rounded_TV)).sum(-1)
        arrays = exact_TV.astype(np.float32), rounded_TV.astype(np.float32)
        counted_T = np.array([True, True, False, True, True])
        targets_T = np.arange(5, dtype=np.int32)
        surprise, kl, same, most = np.asarray(quality._compare()(*arrays, targets_T, counted_T))
        np.testing.assert_allclose(kl, kl_T[counted_T].sum(), rtol=tolerance)
        np.testing.assert_allclose(most, kl_T[counted_T].max(), rtol=tolerance)
        np.testing.assert_allclose(
            surprise, -rounded_TV[range(5), range(5)][counted_T].sum(), rtol=1e-5
        )
        agree_T = exact_TV.argmax(-1) == rounded_TV.argmax(-1)
        assert same == agree_T[counted_T].sum()
    p, q = np.array([4e-5, 1 - 4e-5]), np.array([0.999, 0.001])  # the other way round
    rows = (np.log(x)[None].astype(np.float32) for x in (p, q))
    kl = quality._compare()(*rows, np.zeros(1, np.int32), np.array([True]))[1]
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(), rtol=1e-6)


def test_the_command_prints_a_table_or_json(folder: Path, tmp_path: Path):
    text = tmp_path / "text"
    text.write_text(TEXT)
    flags = [f"--text={text}", "--precision=int8", "--window=40", "--stride=30"]
    told = json.loads(run(folder, *flags, "--json").stdout)
    assert (told["window"], told["stride"]) == (40, 30)
    assert told["precisions"].keys() == {"float32", "int8"}
    tokens = len(TEXT.encode()) - 1
    assert told["precisions"]["int8"]["tokens"] == tokens
    lines = run(folder, *flags, "--max_tokens=100").stdout.splitlines()
    assert "99 tokens predicted, windows of 40, a new one every 30" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["float32", "int8"]


def test_what_cannot_be_measured_is_an_error(folder: Path, tmp_path: Path):
    model = models.build(tiny.config(n_layer=1))
    for tokens, told in (([], "has 0 tokens"), ([3], "has 1 tokens"), ([3, 97], "token 97 is out")):
        with pytest.raises(QualityError, match=told):
            measure(model, {}, tokens, ["int8"], window=8, stride=8)
    with pytest.raises(QualityError, match="a window of 1 tokens predicts nothing"):
        measure(model, {}, [3, 4], ["int8"], window=1, stride=1)
    text = tmp_path / "text"
    text.write_bytes(b"\xff\xfe")
    assert "cannot be read" in run(folder, f"--text={text}", code=1).stderr
    for flags, told in (
        (["--precision=fp8"], "--precision=fp8 is none of float32, bfloat16, int8"),
        (["--window=8", "--stride=9"], "--stride=9 leaves out tokens"),
    ):
        assert told in run(folder, f"--text={text}", *flags, code=2).stderr
