"""HellaSwag as llm.c and as lm-eval count it, against log-probabilities in float64 NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core
import reference
import tiny
from core import checkpoint
from core.tokenizer import Tokenizer
from train import hellaswag
from train.hellaswag import HellaSwagError, Question, evaluate, read

WORDS = "flax is spun [title] by hand in the mill, and woven [substeps] on looms  at night".split(
    " "
)


def record(rng: np.random.Generator) -> dict[str, Any]:
    """A question of made-up sentences; endings differ in length, or length would not matter."""

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    first, second = words(6), words(2)
    return {
        "activity_label": "Linen",
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}",
        "endings": [f"so {words(n)}" for n in rng.permutation([1, 2, 3, 5])],
        "label": int(rng.integers(4)),
    }


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [record(rng) for _ in range(24)]


@pytest.fixture(scope="module")
def file(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def engine() -> core.Engine:
    config = tiny.config(vocab_size=257, n_positions=128, eos_token_id=256, n_layer=1)
    model = core.build(config)
    return core.Engine(model, tiny.params(model), Tokenizer.utf8(), slots=1)


def logprobs(engine: core.Engine, context: str, ending: str) -> np.ndarray:
    """Of the bytes of a blank and the ending, in float64."""
    begun, added = context.encode(), f" {ending}".encode()
    tokens = np.array([*begun, *added][-engine.model.config.context_length :])
    (logits_TV,) = reference.logits(engine.model.config, engine.params, tokens[None])
    log_p = reference.log_softmax(logits_TV[:-1])
    return log_p[np.arange(len(tokens) - 1), tokens[1:]][-len(added) :]


def shares(chosen: list[int], records: list[dict[str, Any]]) -> float:
    return float(np.mean([c == r["label"] for c, r in zip(chosen, records, strict=True)]))


def test_the_likeliest_ending_is_llm_cs(file: Path, records, engine: core.Engine):
    """Sums, and means over tokens."""
    found = [[logprobs(engine, r["ctx"], e) for e in r["endings"]] for r in records]
    by_sum = [int(np.argmax([x.sum() for x in row])) for row in found]
    by_mean = [int(np.argmax([x.mean() for x in row])) for row in found]
    assert by_sum != by_mean
    score = evaluate(engine, read(file))
    assert score.questions == 24
    assert (score.acc, score.acc_norm) == (shares(by_sum, records), shares(by_mean, records))


def test_the_likeliest_ending_is_the_harness_s(file: Path, records, engine: core.Engine):
    """Tidied texts, the activity before them, and sums over the number of characters."""
    questions = read(file, "lm_eval")
    first, plain = questions[0], records[0]
    assert first.context.startswith(f"Linen: {plain['ctx_a'].split()[0]}")
    assert not any(mark in q.context for q in questions for mark in ("[title]", "[substeps]"))
    found = [[logprobs(engine, q.context, e).sum() / len(e) for e in q.endings] for q in questions]
    chosen = [int(np.argmax(row)) for row in found]
    score = evaluate(engine, questions, length=len)
    assert score.acc_norm == shares(chosen, records)


def test_texts_are_tidied_as_the_harness_does():
    text = hellaswag._tidied(" How to spin [title] Take [substeps] flax.  Wait. ")
    assert text == "How to spin. Take flax. Wait."


def test_a_long_story_loses_its_beginning(engine: core.Engine):
    """What is scored is the ending all the same."""
    story, ending = "spin and weave " * 20, "the flax"
    found, tokens = hellaswag._completion(engine, story, ending)
    assert tokens == 9
    assert found == pytest.approx(logprobs(engine, story, ending).sum(), abs=1e-4)
    with pytest.raises(HellaSwagError, match=r"an ending of 201 tokens does not fit .* 128"):
        evaluate(engine, [Question("a", ("b", "c" * 200), 0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, r"line 2: label '' is none of 0 to 3; answers are in"),
        ({"label": 4}, "line 2: label 4 is none of"),
        ({"label": True}, "line 2: label True is none of"),
        ({"endings": "abcd"}, "line 2: endings are 'abcd', expected two"),
        ({"endings": ["a", 2]}, "line 2: endings are"),
        ({"ctx": None}, "line 2: ctx is None, expected text"),
        ({"ctx": ""}, "line 2: a context or an ending of nothing"),
    ],
)
def test_what_is_no_question_is_named(records, tmp_path: Path, change: dict, message: str):
    lines = [records[0], records[1] | change]
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(HellaSwagError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no questions in it"),
        (b"\xff\xfe", "cannot be read as text"),
        (b"[1]\n", "line 1: a list, expected an object"),
        (b"{", "line 1: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "val.jsonl").write_bytes(content)
    with pytest.raises(HellaSwagError, match=message):
        read(tmp_path / "val.jsonl")


@pytest.mark.slow
def test_from_the_command_line(file: Path, engine: core.Engine, tmp_path: Path):
    import subprocess
    import sys

    folder = tmp_path / "model"
    checkpoint.save(folder, engine.model.config, engine.params, tokenizer=engine.tokenizer)
    command = [sys.executable, "-P", "-m", "train.hellaswag", f"--model={folder}", f"--data={file}"]
    done = subprocess.run([*command, "--limit=3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    expected = evaluate(engine, read(file)[:3])
    assert (score["acc"], score["acc_norm"]) == (expected.acc, expected.acc_norm)
    assert (score["questions"], score["custom"]) == (3, "llmc")
