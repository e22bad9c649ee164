"""Continues prompts with a model folder and prints the text as it is produced.

    python -m core.generate --model=models/gpt2 --prompt="The flax mill" --max_new_tokens=60

With --json, one object a line: "prompt_tokens", "tokens", "text", "finish_reason", and "logprobs" if asked for.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from core import door, sampling_flags
from core.errors import FlaxmillError

if TYPE_CHECKING:
    from core.engine import Completion, Engine, TokenScore
    from core.sampling import Sampling

flags.adopt_module_key_flags(sampling_flags)
_MODEL = flags.DEFINE_string("model", None, "The model folder.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt",
    [],
    "The text to continue, FILE:path to read it from a file, or - for stdin; repeatable.",
)
_PROMPT_TOKENS = flags.DEFINE_multi_string(
    "prompt_tokens",
    [],
    "Token ids to continue, as 1,2,3 or FILE:path.json (a JSON list); repeatable.",
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "Continuations of each prompt.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "Prints one JSON object a continuation.")
_LOGPROBS = flags.DEFINE_integer(
    "logprobs",
    None,
    "With --json: log-probabilities, and those of so many likeliest tokens.",
    lower_bound=0,
)
_ECHO = flags.DEFINE_bool("echo", False, "With --json: scores the prompt's tokens too.")


def main() -> None:
    if _MODEL.value is None or not (_PROMPT.value or _PROMPT_TOKENS.value):
        raise door.Usage("give --model=DIR and at least one --prompt=TEXT or --prompt_tokens=IDS")
    if not _JSON.value and (_LOGPROBS.value is not None or _ECHO.value):
        raise door.Usage("--logprobs and --echo need --json")
    prompts = [*map(_text, _PROMPT.value), *map(_tokens, _PROMPT_TOKENS.value)]

    import core
    from core.engine import Engine, Request

    sampling = sampling_flags.sampling(logprobs=_LOGPROBS.value)
    engine = Engine(*core.load(_MODEL.value), slots=1)
    for prompt in prompts:
        engine.check(Request(prompt, sampling))  # before anything is printed
    if engine.tokenizer is None and not _JSON.value:
        raise door.Usage(f"{_MODEL.value} has no tokenizer to print text with; pass --json")
    write = _write_json if _JSON.value else _write_text
    for number, prompt in enumerate(prompts):
        for sample in range(_NUM_SAMPLES.value):
            write(engine, prompt, sampling, f"{number}.{sample}")


def _write_text(engine: "Engine", prompt: Any, sampling: "Sampling", id_: str) -> None:
    """Prints prompt and continuation, each piece of text as soon as it is certain."""
    assert engine.tokenizer is not None
    sys.stdout.write(prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt))
    sys.stdout.flush()
    for event in engine.stream(prompt, sampling, id=id_):
        sys.stdout.write(event.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _write_json(engine: "Engine", prompt: Any, sampling: "Sampling", id_: str) -> None:
    from core.engine import Request, RequestError

    (completion,) = engine.complete([Request(prompt, sampling, id_)])
    if isinstance(completion, RequestError):
        raise completion
    sys.stdout.write(json.dumps(_record(engine, completion), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _record(engine: "Engine", completion: "Completion") -> dict[str, Any]:
    record: dict[str, Any] = {
        "prompt_tokens": list(completion.prompt_tokens),
        "tokens": list(completion.tokens),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
    }
    scores = list(completion.logprobs or ())
    if _ECHO.value:
        echoed = engine.score(completion.prompt_tokens, _LOGPROBS.value or 0)
        known = [score.logprob for score in echoed if score.logprob is not None]
        if not completion.tokens:
            record["perplexity"] = _perplexity(known)
        scores = echoed + scores
    if _ECHO.value or _LOGPROBS.value is not None:
        record["logprobs"] = [_score(score) for score in scores]
    return record


def _perplexity(logprobs: list[float]) -> float | None:
    """Returns exp of the mean negative log-probability; None for no tokens, and where no float is large enough."""
    with contextlib.suppress(OverflowError, ZeroDivisionError):
        return math.exp(-sum(logprobs) / len(logprobs))
    return None


def _score(score: "TokenScore") -> dict[str, Any]:
    top = [[id_, logprob] for id_, logprob in score.top]
    return {"token": score.token, "logprob": score.logprob, "top": top}


def _text(argument: str) -> str:
    if argument == "-":
        return sys.stdin.read()
    return _file(argument) if argument.startswith("FILE:") else argument


def _tokens(argument: str) -> list[int]:
    try:
        if argument.startswith("FILE:"):
            return [_int(value) for value in _array(json.loads(_file(argument)))]
        return [int(value) for value in argument.split(",") if value.strip()]
    except ValueError as error:
        raise door.Usage(f"--prompt_tokens={argument} is no list of token ids: {error}") from error


def _array(value: Any) -> Iterator[Any]:
    if not isinstance(value, list):
        raise ValueError("expected a JSON list")
    return iter(value)


def _int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no integer")
    return value


def _file(argument: str) -> str:
    path = Path(argument.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"the prompt file {path} cannot be read: {error}") from error


class PromptError(FlaxmillError):
    """A prompt file that cannot be read."""


if __name__ == "__main__":
    door.run(main)
