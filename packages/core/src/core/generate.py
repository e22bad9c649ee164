"""Continues prompts with a model folder and prints the text as it is produced.

    python -m core.generate --model=models/gpt2 --prompt="The flax mill" --max_new_tokens=60

Several prompts and samples go through the model together, and are printed in order.

With --json, one object a line: "prompt_tokens", "tokens", "text", "finish_reason", and "logprobs" if asked for.

With --chat, a prompt is what a user says to a chat model, and its answer is printed. Of a model that thinks in channels
(gpt-oss) that is the final one; the others go to stderr. --json then has "messages" (the conversation), "channels" and
"tool_calls" too, and "text" is the final channel's.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from core import door, sampling_flags
from core.config import PRECISIONS
from core.errors import FlaxmillError, RequestError, TokenizerError

if TYPE_CHECKING:
    from core import harmony
    from core.engine import Engine
    from core.models import Model, Params
    from core.requests import Completion, Event, Request, TokenScore
    from core.sampling import Sampling
    from core.tokenizer import Tokenizer

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
_CHAT = flags.DEFINE_bool(
    "chat", False, "Each --prompt is a user's message; a conversation of its own."
)
_SYSTEM = flags.DEFINE_string("system", None, "With --chat: what the model is told beforehand.")
_REASONING_EFFORT = flags.DEFINE_string(
    "reasoning_effort", None, "With --chat: low, medium or high, for templates that know it."
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "Continuations of each prompt.", lower_bound=1
)
_SLOTS = flags.DEFINE_integer(
    "slots", 8, "Continuations that are produced together, at most.", lower_bound=1
)
_SPECULATION = flags.DEFINE_integer(
    "speculation",
    0,
    "Tokens a step that are guessed from the text before and checked: faster where texts repeat themselves.",
    lower_bound=0,
    upper_bound=15,
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Lays the model over several devices, as tensor=8 (core.sharding)."
)
_PRECISION = flags.DEFINE_enum(
    "precision", None, PRECISIONS, "What to compute in; by default what the model is stored in."
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
    if not _CHAT.value and (_SYSTEM.value is not None or _REASONING_EFFORT.value is not None):
        raise door.Usage("--system and --reasoning_effort need --chat")
    if _CHAT.value and _PROMPT_TOKENS.value:
        raise door.Usage("--chat takes --prompt=TEXT; --prompt_tokens are continued as they are")
    prompts = [*map(_text, _PROMPT.value), *map(_tokens, _PROMPT_TOKENS.value)]

    import core
    from core import compiled

    compiled.keep()
    sampling = sampling_flags.sampling(logprobs=_LOGPROBS.value)
    loaded = core.load(_MODEL.value, mesh=_MESH.value)
    tokenizer = loaded[2]
    jobs = [_Job(prompt) for prompt in prompts]
    if _CHAT.value:
        jobs = _conversations(tokenizer, map(str, prompts))
    jobs = [
        dataclasses.replace(job, id=f"{number}.{sample}")
        for number, job in enumerate(jobs)
        for sample in range(_NUM_SAMPLES.value)
    ]
    engine, requests = _engine(loaded, jobs, sampling)
    if tokenizer is None and not _JSON.value:
        raise door.Usage(f"{_MODEL.value} has no tokenizer to print text with; pass --json")
    write = _write_json if _JSON.value else _write_answer if _CHAT.value else _write_text
    for job, events in zip(jobs, _each(engine.stream(requests), len(jobs)), strict=True):
        write(engine, job, sampling, events)


def _engine(
    loaded: "tuple[Model, Params, Tokenizer | None]", jobs: "Sequence[_Job]", sampling: "Sampling"
) -> "tuple[Engine, list[Request]]":
    """Returns an engine with as many and as long slots as the jobs need, and what to ask of it.

    Raises:
      RequestError: a job cannot be served.
    """
    from core.engine import Engine
    from core.requests import Request

    model, _, tokenizer = loaded
    # In powers of two, because another length is another program to compile.
    longest = max(_length(tokenizer, job.prompt) for job in jobs)
    needed = 1 << (longest + sampling.max_new_tokens - 1).bit_length()
    engine = Engine(
        *loaded,
        slots=min(_SLOTS.value, len(jobs)),
        length=min(needed, model.config.context_length),
        speculation=_SPECULATION.value,
        precision=_PRECISION.value,
        top_logprobs=sampling.logprobs or 0,
    )
    requests = [Request(job.prompt, sampling, job.id) for job in jobs]
    for request in requests:
        engine.check(request)  # before anything is printed
    return engine, requests


def _length(tokenizer: "Tokenizer | None", prompt: Any) -> int:
    """Returns a prompt's tokens; 1 for one that cannot be encoded, which the engine says better."""
    if not isinstance(prompt, str):
        return len(prompt)
    with contextlib.suppress(TokenizerError):
        return len(tokenizer.encode(prompt)) if tokenizer is not None else 1
    return 1


def _each(events: "Iterator[Event]", count: int) -> "Iterator[Iterator[Event]]":
    """Yields, for each of `count` requests in order, its events as they come; those of later ones wait."""
    waiting: dict[int, list[Event]] = {number: [] for number in range(count)}

    def of(number: int) -> "Iterator[Event]":
        while True:
            for event in waiting[number]:
                yield event
                if event.result is not None:
                    del waiting[number]
                    return
            waiting[number] = []
            event = next(events)
            waiting[event.request].append(event)

    for number in range(count):
        yield of(number)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What to continue, and with --chat the conversation that it is."""

    prompt: Any
    messages: list[dict[str, str]] | None = None
    id: str = "0"


def _conversations(tokenizer: "Tokenizer | None", texts: Iterable[str]) -> list[_Job]:
    """Returns a conversation a text, as the chat template has it."""
    from core.chat import Chat

    if tokenizer is None:
        raise RequestError("tokenizer_missing", f"{_MODEL.value} has no tokenizer to chat with")
    chat, now = Chat.open(str(_MODEL.value), tokenizer), datetime.datetime.now()
    system = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
    effort = _REASONING_EFFORT.value
    variables = {} if effort is None else {"reasoning_effort": effort}
    talks = [[*system, {"role": "user", "content": text}] for text in texts]
    return [_Job(chat.encode(talk, now=now, variables=variables), talk) for talk in talks]


def _write_text(
    engine: "Engine", job: _Job, sampling: "Sampling", events: "Iterator[Event]"
) -> None:
    """Prints prompt and continuation, each piece of text as soon as it is certain."""
    assert engine.tokenizer is not None
    prompt = job.prompt
    sys.stdout.write(prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt))
    sys.stdout.flush()
    for event in events:
        sys.stdout.write(event.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _write_answer(
    engine: "Engine", job: _Job, sampling: "Sampling", events: "Iterator[Event]"
) -> None:
    """Prints the answer alone, as it is produced; what is not for the reader goes to stderr."""
    from core import harmony

    assert engine.tokenizer is not None
    if not harmony.is_spoken_by(engine.tokenizer):
        for event in events:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    elif sampling.stop:  # a stop string is known only when all of it is there
        tokens = _result(events).tokens
        for message in harmony.parse(engine.tokenizer, tokens, sampling.stop):
            _write_piece(message, message.content, is_first=True)
    else:
        _stream_harmony(engine, events)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _stream_harmony(engine: "Engine", events: "Iterator[Event]") -> None:
    from core import harmony

    assert engine.tokenizer is not None
    parser = harmony.Parser(engine.tokenizer)
    written = 0
    for event in events:
        last = event.finish_reason is not None
        pieces = [] if event.token is None else [parser.push(event.token)]
        for piece in [*pieces, *([parser.finish()] if last else [])]:
            if piece is not None:
                _write_piece(*piece, is_first=len(parser.messages) > written)
                written = len(parser.messages)


def _write_piece(message: "harmony.Message", text: str, *, is_first: bool) -> None:
    """Writes text of a message: an answer's to stdout; another's to stderr, headed by its channel."""
    is_answer = message.recipient is None and message.channel in (None, "final")
    if is_first and not is_answer:
        to = f" to={message.recipient}" if message.recipient else ""
        sys.stderr.write(f"\n[{message.channel or 'no channel'}{to}] ")
    stream = sys.stdout if is_answer else sys.stderr
    stream.write(text)
    stream.flush()


def _write_json(
    engine: "Engine", job: _Job, sampling: "Sampling", events: "Iterator[Event]"
) -> None:
    completion = _result(events)
    record = _record(engine, completion)
    if job.messages is not None:
        record = {"messages": job.messages} | record | _channels(engine, completion, sampling)
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _result(events: "Iterator[Event]") -> "Completion":
    *_, last = events
    if not isinstance(last.result, FlaxmillError) and last.result is not None:
        return last.result
    raise last.result or AssertionError("a request's last event has its result")


def _channels(engine: "Engine", completion: "Completion", sampling: "Sampling") -> dict[str, Any]:
    from core import harmony

    assert engine.tokenizer is not None
    if not harmony.is_spoken_by(engine.tokenizer):
        return {"channels": None, "tool_calls": None}
    return harmony.answer(engine.tokenizer, completion.tokens, sampling.stop)


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
        return _stdin()
    return _file(argument) if argument.startswith("FILE:") else argument


def _stdin() -> str:
    if sys.stdin is None:
        raise PromptError("there is no stdin to read the prompt from")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt on stdin cannot be read: {error}") from error


def _tokens(argument: str) -> list[int]:
    try:
        if argument.startswith("FILE:"):
            return [_int(value) for value in _array(json.loads(_file(argument)))]
        return [int(value) for value in argument.split(",") if value.strip()]
    except (ValueError, RecursionError) as error:
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
