"""One row of an input file to one prompt, or to the reason why it is none; its results to one output record.

Every row becomes exactly one record, so this module never raises for what a row holds: what cannot be used comes back
as a `RowError` with a stable code. It knows nothing of files, engines or Beam.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from core import chat
from core.errors import RequestError

if TYPE_CHECKING:  # importing core.sampling imports jax
    from core import Completion, Sampling
    from core.requests import TokenScore

SCHEMA_VERSION = 2
MAX_LINE_BYTES = 1 << 20
"""A longer line becomes an error row: it bounds the memory of a worker, whatever the file holds."""

Format = Literal["jsonl", "text"]
FORMATS: Mapping[str, Format] = {".jsonl": "jsonl", ".txt": "text"}
"""The input formats, by file suffix."""

MAX_DEPTH = 100
"""Of objects and lists in one another: what reads a record, and what writes it, goes down into them."""

MAX_SAMPLES = 128
"""Of one row: its record holds them all."""

LongPrompts = Literal["error", "truncate_left", "truncate_right"]
LONG_PROMPTS: tuple[LongPrompts, ...] = ("error", "truncate_left", "truncate_right")
"""What is done with prompts that the model's context does not hold."""


class Source(NamedTuple):
    """Where a row came from: the file's name below the input's root, the byte offset and the line number from 1."""

    file: str
    offset: int
    line: int

    @property
    def key(self) -> str:
        """The id of a row that brings none."""
        return f"{self.file}:{self.offset}"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages for the model's chat template, and what else it is told."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Prompt(NamedTuple):
    prompt: str | tuple[int, ...] | Conversation
    sampling: "Sampling"
    n: int = 1
    """How many continuations; each is drawn for itself."""
    id: str | int | None = None
    input: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowError:
    code: str
    message: str
    id: str | int | None = None
    input: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Refused(Exception):
    """Why a row is no prompt; never leaves this module."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def parse(line: bytes, format: Format, defaults: "Sampling") -> Prompt | RowError:
    """Returns the prompt that `line` asks for, its sampling parameters laid over `defaults`.

    `line` may carry its line ending, and need not be whole if it is longer than `MAX_LINE_BYTES`.
    """
    try:
        if format == "text":
            return Prompt(prompt=_decode(line), sampling=defaults)
        fields = _object(line)
    except _Refused as why:
        return RowError(code=why.code, message=str(why))
    return from_fields(fields, defaults)


def from_fields(fields: dict[str, Any], defaults: "Sampling") -> Prompt | RowError:
    """Returns the prompt that `fields` ask for; takes what it knows out of them, and keeps the rest."""
    row_id = None
    try:
        row_id = _take_id(fields)
        n = _take_n(fields)
        sampling = _take_sampling(fields, defaults)
        prompt = _take_prompt(fields)
        return Prompt(prompt=prompt, sampling=sampling, n=n, id=row_id, input=fields)
    except _Refused as why:
        return RowError(code=why.code, message=str(why), id=row_id, input=_unknown(fields))


def unusable(fields: dict[str, Any], why: str) -> RowError:
    """Returns the error of a row of which a field could not be read; `fields` are the others."""
    try:
        row_id = _take_id(fields)
    except _Refused:
        row_id = None
    return RowError(code="bad_column", message=why, id=row_id, input=_unknown(fields))


def _unknown(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _KNOWN}


def _decode(line: bytes) -> str:
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if len(line) > MAX_LINE_BYTES:
        raise _Refused("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused(
            "invalid_utf8", f"byte {error.start} of the line is not UTF-8: {error.reason}"
        ) from error
    if not text:
        raise _Refused("blank_line", "the line is empty")
    return text


def _object(line: bytes) -> dict[str, Any]:
    value = _json(line)
    if not isinstance(value, dict):
        raise _Refused(
            "not_an_object", f"expected a JSON object with a 'prompt', found {_named(value)}"
        )
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and _is_too_deep(value):
        raise _Refused("bad_json", f"the JSON is nested deeper than {MAX_DEPTH}")
    return value


def _json(line: bytes) -> Any:
    """Returns what `line` holds, with every digit of its integers.

    msgspec reads it where it can, three times as fast. It takes nothing that the standard library's strict reader does
    not; that one says why of the rest, and takes the lone surrogates that msgspec does not.
    """
    if len(line) <= MAX_LINE_BYTES:
        try:
            return _READER.decode(line)
        except (ValueError, RecursionError):
            pass
    text = _decode(line)
    try:
        return _STRICT.decode(text)
    except RecursionError:
        raise _Refused("bad_json", "the JSON is nested too deeply") from None
    except ValueError as error:
        raise _Refused("bad_json", f"the line is not JSON: {error}") from error


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return bool(level)


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is beyond a float's range")
    return number


# Strict JSON, so that what is passed through can be written as JSON again.
_STRICT = json.JSONDecoder(parse_constant=_not_json, parse_float=_finite)
_READER = msgspec.json.Decoder()


def _take_id(fields: dict[str, Any]) -> str | int | None:
    value = fields.pop("id", None)
    if value is None or type(value) is int:
        return value
    if not isinstance(value, str):
        raise _Refused("bad_id", f"'id' must be a string or an integer, found {_named(value)}")
    if not _is_unicode(value):
        raise _Refused("bad_id", "'id' holds a lone surrogate")
    return value


def _take_n(fields: dict[str, Any]) -> int:
    value = fields.pop("n", None)
    if value is None:
        return 1
    if not _is_integer(value) or not 1 <= value <= MAX_SAMPLES:
        found = value if _is_integer(value) and abs(value) < 10**9 else _named(value)
        raise _Refused(
            "bad_parameter", f"'n' must be an integer from 1 to {MAX_SAMPLES}, found {found}"
        )
    return value


def _take_prompt(fields: dict[str, Any]) -> str | tuple[int, ...] | Conversation:
    given = {name: value for name in PROMPTS if (value := fields.pop(name, None)) is not None}
    if len(given) > 1:
        both = " and ".join(map(repr, given))
        raise _Refused("prompt_ambiguous", f"the row has {both}; give one")
    if "messages" in given:
        return _conversation(given["messages"], fields)
    if "token_ids" in given:
        return _token_ids(given["token_ids"])
    if not given:
        raise _Refused("prompt_missing", "the row has no 'prompt', 'messages' or 'token_ids'")
    text = given["prompt"]
    if not isinstance(text, str):
        raise _Refused("prompt_wrong_type", f"'prompt' must be a string, found {_named(text)}")
    if not _is_unicode(text):
        raise _Refused("prompt_wrong_type", "'prompt' holds a lone surrogate: it is not Unicode")
    return text


def _conversation(messages: Any, fields: dict[str, Any]) -> Conversation:
    """Takes what belongs to `messages` out of `fields` too; without messages it means nothing to us."""
    tools, effort = fields.pop("tools", None), fields.pop("reasoning_effort", None)
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise _Refused("bad_messages", f"'tools' must be a list of objects, found {_named(tools)}")
    if effort is not None and not isinstance(effort, str):
        raise _Refused(
            "bad_messages", f"'reasoning_effort' must be a string, found {_named(effort)}"
        )
    try:
        checked = chat.check(messages)
    except RequestError as error:
        raise _Refused(error.code, str(error)) from error
    return Conversation(checked, tools, {} if effort is None else {"reasoning_effort": effort})


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise _Refused("prompt_wrong_type", "'token_ids' must be a list of integers")
    return tuple(value)


def _take_sampling(fields: dict[str, Any], defaults: "Sampling") -> "Sampling":
    if _PARAMETERS.keys().isdisjoint(fields):
        return defaults
    changes = {}
    for name in [name for name in fields if name in _PARAMETERS]:
        value = fields.pop(name)
        if value is None:
            continue
        expected, accepts = _PARAMETERS[name]
        if not accepts(value):
            raise _Refused("bad_parameter", f"{name!r} must be {expected}, found {_named(value)}")
        changes[name] = value
    if not changes:
        return defaults
    most = defaults.logprobs or 0
    if changes.get("logprobs", 0) > most:
        raise _Refused(
            "bad_parameter",
            f"'logprobs' asks for more than the {most} likeliest tokens that this job gives: "
            "run it with a larger --logprobs",
        )
    if "stop" in changes:
        stop = changes["stop"]
        changes["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "logit_bias" in changes:
        changes["logit_bias"] = {int(id_): bias for id_, bias in changes["logit_bias"].items()}
    try:
        return dataclasses.replace(defaults, **changes)
    except (ValueError, OverflowError) as error:  # core.SamplingError; an integer beyond a float
        raise _Refused("bad_parameter", str(error)) from error


def _is_integer(value: Any) -> bool:
    return type(value) is int  # bool is an int to isinstance


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2.0**127  # the engine's numbers are float32


def _is_stop(value: Any) -> bool:
    strings = value if isinstance(value, list) else [value]
    return all(isinstance(s, str) and _is_unicode(s) for s in strings)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch("0|[1-9][0-9]{0,9}", id_) and _is_number(bias) for id_, bias in value.items()
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_integer, value))


_PARAMETERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("an integer", _is_integer),
    "temperature": ("a number that a float holds", _is_number),
    "top_k": ("an integer", _is_integer),
    "top_p": ("a number that a float holds", _is_number),
    "min_p": ("a number that a float holds", _is_number),
    "repetition_penalty": ("a number that a float holds", _is_number),
    "presence_penalty": ("a number that a float holds", _is_number),
    "frequency_penalty": ("a number that a float holds", _is_number),
    "logit_bias": ("an object of token ids and numbers", _is_bias),
    "bad_ids": ("a list of integers", _are_ids),
    "allowed_ids": ("a list of integers", _are_ids),
    "min_new_tokens": ("an integer", _is_integer),
    "stop": ("a string or a list of strings", _is_stop),
    "seed": ("an integer", _is_integer),
    "ignore_eos": ("true or false", lambda value: isinstance(value, bool)),
    "logprobs": ("an integer", _is_integer),
}
"""What a row may set for itself: the fields of `core.Sampling`, under the same names."""

PROMPTS = ("prompt", "messages", "token_ids")
_KNOWN = {"id", "n", *PROMPTS, *_PARAMETERS}


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _named(value: Any) -> str:
    """Returns `value` as JSON calls its kind."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


def record(
    row: Prompt | RowError,
    result: "Sequence[Completion] | RowError",
    *,
    index: int,
    source: Source,
    model: Mapping[str, str],
    answers: "Sequence[Mapping[str, Any]] | None" = None,
    truncated: int = 0,
) -> dict[str, Any]:
    """Returns the output record of `row`: the same keys for every row, null where there is nothing to say.

    Args:
      row: what was asked.
      result: a completion for each sample, or why there is none.
      index: the row's place in the whole input.
      source: the row's place in its file.
      model: the name and the revision of what answered.
      answers: what `core.harmony.answer` makes of each sample, for a model that answers in channels.
      truncated: how many tokens the prompt had and were not fed.
    """
    if isinstance(result, RowError):
        said = _NOTHING | {"error": {"code": result.code, "message": result.message}}
    else:
        said = _sample(result[0], answers[0] if answers else None)
        samples = None
        if len(result) > 1:
            samples = list(map(_sample, result, answers or [None] * len(result)))
            said["completion_tokens"] = sum(sample["completion_tokens"] for sample in samples)
        said["prompt_tokens"] = len(result[0].prompt_tokens)
        said["truncated_tokens"] = truncated
        said["samples"] = samples
        said["error"] = None
    return {
        "schema_version": SCHEMA_VERSION,
        "id": source.key if row.id is None else row.id,
        "index": index,
        "source": {"file": source.file, "offset": source.offset, "line": source.line},
        "status": "error" if isinstance(result, RowError) else "ok",
        **said,
        "seed": row.sampling.seed if isinstance(row, Prompt) else None,
        "model": dict(model),
        "input": dict(row.input) or None,
    }


def _sample(completion: "Completion", answer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what a record says of one sample, and of the first by itself too."""
    scores = completion.logprobs
    sample = {
        "text": completion.text,
        "channels": None,
        "tool_calls": None,
        "token_ids": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "logprobs": None if scores is None else list(map(_score, scores)),
        "completion_tokens": len(completion.tokens),
    }
    return {**sample, **answer} if answer else sample


def _score(score: "TokenScore") -> dict[str, Any]:
    top = [{"token": id_, "logprob": _or_null(value)} for id_, value in score.top]
    return {"token": score.token, "logprob": _or_null(score.logprob), "top": top}


def _or_null(logprob: float | None) -> float | None:
    """Returns what JSON can say: a token that cannot be produced has a log-probability of minus infinity."""
    return logprob if logprob is not None and math.isfinite(logprob) else None


_NOTHING = {
    "text": None,
    "channels": None,
    "tool_calls": None,
    "token_ids": None,
    "finish_reason": "error",
    "logprobs": None,
    "completion_tokens": None,
    "prompt_tokens": None,
    "truncated_tokens": None,
    "samples": None,
}

_ENCODER = msgspec.json.Encoder()
_STRICT_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

# Legal inside a JSON string, but readers that split lines as Python or JavaScript do would cut the record there.
_ESCAPED = re.compile("[\x85\u2028\u2029]")


def to_json(value: Any) -> bytes:
    """Returns `value` as JSON that is one line to every reader: UTF-8, without white space."""
    try:
        written = _ENCODER.encode(value)
    except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot hold
        return _STRICT_ENCODER.encode(value).encode()
    if written.isascii():
        return written
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", written.decode()).encode()


def to_line(record: Mapping[str, Any]) -> bytes:
    """Returns a record as one line of JSON, with its newline."""
    return to_json(record) + b"\n"


def from_json(text: str | bytes) -> Any:
    """Returns what `to_json` or `to_line` was given."""
    return json.loads(text)
