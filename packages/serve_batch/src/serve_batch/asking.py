"""A row's prompt to what is asked of the engine, and its answers to what became of the row.

The same for a job of files and for a transform in a pipeline; knows of neither.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from core import Completion, Request, RequestError
from serve_batch.host import EngineHost
from serve_batch.records import Conversation, LongPrompts, Prompt, RowError

Outcome = list[Completion] | RowError
"""A completion a sample, or why there is none."""


def requests(
    row: Prompt,
    key: str,
    engine: EngineHost,
    *,
    now: datetime.datetime,
    long_prompts: LongPrompts,
) -> tuple[list[Request], int]:
    """Returns a request a sample, and how many tokens of the prompt are left out.

    Args:
      row: what is asked.
      key: what its draws depend on; the first sample draws what the row would draw alone.
      engine: what will be asked.
      now: for chat templates that want it.
      long_prompts: what is done with a prompt that does not fit.

    Raises:
      core.RequestError: it cannot be asked.
    """
    prompt, truncated = row.prompt, 0
    if isinstance(prompt, Conversation):
        prompt = engine.encode(prompt, now)
    if long_prompts != "error":
        new_tokens = row.sampling.max_new_tokens
        prompt, truncated = engine.cut(prompt, new_tokens=new_tokens, policy=long_prompts)
    ids = [key, *(f"{key}#{sample}" for sample in range(1, row.n))] if row.n > 1 else [key]
    return [Request(prompt, row.sampling, id_) for id_ in ids], truncated


def refused(row: Prompt | RowError, error: RequestError) -> RowError:
    """Returns a request's error as its row's."""
    return RowError(code=error.code, message=str(error), id=row.id, input=row.input)


def outcome(
    row: Prompt | RowError, samples: Sequence[Completion | RequestError | RowError]
) -> Outcome:
    """Returns the samples; where one of them failed, that is what became of the row."""
    completions: list[Completion] = []
    for sample in samples:
        if isinstance(sample, RowError):
            return sample
        if isinstance(sample, RequestError):
            return refused(row, sample)
        completions.append(sample)
    return completions


def answers(
    row: Prompt | RowError, outcome: Outcome, engine: EngineHost
) -> list[Mapping[str, Any]] | None:
    """Returns what `core.harmony.answer` says of a chat model's completions; None for any other."""
    if isinstance(row, RowError) or isinstance(outcome, RowError):
        return None
    if not isinstance(row.prompt, Conversation):
        return None
    found = [engine.answer(completion, row.sampling.stop) for completion in outcome]
    return [answer for answer in found if answer is not None] or None
