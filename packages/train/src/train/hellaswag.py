"""How often a model finds the right end of a story: HellaSwag (Zellers et al. 2019, arXiv:1905.07830), as completion.

    python -m train.hellaswag --model=models/gpt2 --data=hellaswag_val.jsonl

Each question is a context and some endings. The model takes the ending of the highest log-probability (acc), and that
of the highest for its length (acc_norm); the shares of right ones are printed as a JSON object. There are two customs:

    llmc     (llm.c, dev/data/hellaswag.py) the text as it is; length in tokens
    lm_eval  (EleutherAI's harness) the activity before the context, marks in brackets taken out; length in characters

The data is a local file: hellaswag_val.jsonl of the authors' repository (rowanz/hellaswag), 10,042 questions.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from core import door
from core.errors import FlaxmillError

if TYPE_CHECKING:
    from core.engine import Engine


class HellaSwagError(FlaxmillError):
    """Questions that cannot be read, or that the model cannot be asked."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A context, endings that go on from it (a blank is between them), and the number of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclasses.dataclass(frozen=True)
class Score:
    """The shares of questions whose right ending is the likeliest, and the likeliest for its length."""

    questions: int
    acc: float
    acc_norm: float


def _define_flags() -> None:
    """Not at import: `evaluate` is also for programs with flags of their own."""
    flags.DEFINE_string("model", None, "The model folder.", required=True)
    flags.DEFINE_string("data", None, "A JSON-lines file of questions.", required=True)
    flags.DEFINE_enum("custom", "llmc", ["llmc", "lm_eval"], "Whose rules; see above.")
    flags.DEFINE_integer("limit", 0, "So many questions at most; 0 is all.", lower_bound=0)


def main() -> None:
    options = flags.FLAGS
    questions = read(Path(options.data), options.custom)[: options.limit or None]
    import tqdm

    import core
    from core import compiled

    compiled.keep()
    model, params, tokenizer = core.load(options.model)
    if tokenizer is None:
        raise HellaSwagError(f"{options.model} has no tokenizer to read questions with")
    engine = core.Engine(model, params, tokenizer, slots=1)
    length = len if options.custom == "lm_eval" else None
    found = evaluate(engine, tqdm.tqdm(questions, unit=" questions", disable=None), length=length)
    told = {"model": options.model, "data": options.data, "custom": options.custom}
    sys.stdout.write(json.dumps(told | dataclasses.asdict(found)) + "\n")


def read(path: Path, custom: str = "llmc") -> list[Question]:
    """Returns the questions of a file.

    Raises:
      HellaSwagError: there are none, or a line is no question with an answer; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HellaSwagError(f"{path}: cannot be read as text: {error}") from error
    found = [
        _question(line, f"{path}, line {number}", custom)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise HellaSwagError(f"{path}: no questions in it; expected a JSON object a line")
    return found


def evaluate(
    engine: "Engine",
    questions: Iterable[Question],
    *,
    length: Callable[[str], int] | None = None,
) -> Score:
    """Returns how `engine`'s model does; `length` is of an ending, by default its tokens.

    What does not fit the model's context is cut off at the beginning.

    Raises:
      HellaSwagError: an ending is longer than the model's context.
    """
    right = right_norm = count = 0
    for question in questions:
        sums, norms = [], []
        for ending in question.endings:
            logprob, tokens = _completion(engine, question.context, ending)
            sums.append(logprob)
            norms.append(logprob / (length(ending) if length else tokens))
        right += sums.index(max(sums)) == question.label
        right_norm += norms.index(max(norms)) == question.label
        count += 1
    return Score(count, right / count, right_norm / count)


def _completion(engine: "Engine", context: str, ending: str) -> tuple[float, int]:
    """Returns the log-probability of a blank and `ending` after `context`, and of how many tokens it is."""
    assert engine.tokenizer is not None
    begun = engine.tokenizer.encode_plain(context)
    added = engine.tokenizer.encode_plain(f" {ending}")
    most = engine.model.config.context_length
    if len(added) >= most:
        raise HellaSwagError(
            f"an ending of {len(added)} tokens does not fit the model's context of {most} with one before it: "
            f"{ending[:60]!r}"
        )
    scores = engine.score([*begun, *added][-most:])
    logprob = sum(score.logprob or 0.0 for score in scores[-len(added) :])
    if math.isnan(logprob):
        raise HellaSwagError(f"the model's probabilities of {ending[:60]!r} are no numbers")
    return logprob, len(added)


def _question(line: str, where: str, custom: str) -> Question:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise HellaSwagError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise HellaSwagError(f"{where}: a {type(fields).__name__}, expected an object")
    endings, label = fields.get("endings"), fields.get("label")
    if not isinstance(endings, list) or len(endings) < 2 or not all(map(_is_text, endings)):
        raise HellaSwagError(f"{where}: endings are {endings!r:.80}, expected two texts or more")
    if isinstance(label, str) and label.isdecimal() and len(label) < 4:
        label = int(label)
    if type(label) is not int or not 0 <= label < len(endings):
        raise HellaSwagError(
            f"{where}: label {label!r:.40} is none of 0 to {len(endings) - 1}; "
            "answers are in the training and the validation file"
        )
    names = ("ctx",) if custom == "llmc" else ("activity_label", "ctx_a", "ctx_b")
    if missing := [name for name in names if not isinstance(fields.get(name), str)]:
        raise HellaSwagError(
            f"{where}: {missing[0]} is {fields.get(missing[0])!r:.80}, expected text"
        )
    texts = [fields[name] for name in names]
    if custom == "llmc":
        (context,) = texts
    else:
        activity, first, second = texts
        context = _tidied(f"{activity}: {first} {second.capitalize()}")
        endings = [_tidied(ending) for ending in endings]
    if not context or not all(endings):
        raise HellaSwagError(f"{where}: a context or an ending of nothing")
    return Question(context, tuple(endings), label)


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _tidied(text: str) -> str:
    """The harness's own rules, in its order (lm_eval/tasks/hellaswag/utils.py)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


if __name__ == "__main__":
    _define_flags()
    door.run(main)
