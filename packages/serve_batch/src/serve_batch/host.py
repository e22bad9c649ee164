"""The engine of this process: loaded once, whoever asks, and shared by every thread that a runner brings.

The host knows nothing of Beam. It draws the line between a row that cannot be served, which is a value, and an engine
that has failed, which is an exception and stops the job.
"""

import datetime
import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import core
from core import harmony
from core.chat import Chat
from core.chat import missing as template_missing
from serve_batch import plan
from serve_batch.plan import JobError
from serve_batch.records import Conversation


class EngineHost:
    """A `core.Engine` that threads may share."""

    def __init__(self, model: Path, *, slots: int):
        self._model = model
        self._engine = core.Engine(*core.load(model), slots=slots)
        self._lock = threading.Lock()

    def complete(
        self, requests: Sequence[core.Request]
    ) -> list[core.Completion | core.RequestError]:
        """Returns one result a request, in order. Anything raised means that the engine itself is broken."""
        with self._lock:
            return self._engine.complete(requests)

    def encode(self, talk: Conversation, now: datetime.datetime) -> tuple[int, ...]:
        """Returns a conversation as the model's chat template has it.

        Raises:
          core.RequestError: the model has no template or no tokenizer, or the template does not take the messages.
          core.TokenizerError: the model's template is not one.
        """
        chat = self._chat
        ids = chat.encode(talk.messages, now=now, tools=talk.tools, variables=talk.variables)
        return tuple(ids)

    def answer(self, completion: core.Completion, stop: Sequence[str]) -> Mapping[str, Any] | None:
        """Returns the channels of an answer, if that is how the model answers."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None or not harmony.is_spoken_by(tokenizer):
            return None
        return harmony.answer(tokenizer, completion.tokens, stop)

    @functools.cached_property
    def _found_chat(self) -> Chat | None:
        tokenizer = self._engine.tokenizer
        return None if tokenizer is None else Chat.find(self._model, tokenizer)

    @property
    def _chat(self) -> Chat:
        if self._engine.tokenizer is None:
            raise core.RequestError(
                "tokenizer_missing", "this model has no tokenizer; give the prompt as token ids"
            )
        if self._found_chat is None:
            raise template_missing(self._model)
        return self._found_chat


_opening = threading.Lock()
_current: tuple[tuple[Path, int, str], EngineHost] | None = None


def shared(model: Path, *, slots: int, revision: str) -> EngineHost:
    """Returns the process's host for `model`, loading it if it is not the one already there.

    Raises:
      JobError: the model folder is no longer the one that the plan was made for.
    """
    global _current
    with _opening:
        wanted = (model, slots, revision)
        if _current is None or _current[0] != wanted:
            found = plan.model_revision(model)
            if found != revision:
                raise JobError(
                    f"the job was planned for revision {revision[:12]} of the model, "
                    f"{model} holds {found[:12]}; start the job again in another output folder"
                )
            _current = None  # one model's memory at a time
            _current = (wanted, EngineHost(model, slots=slots))
        return _current[1]


def check_code(expected: str) -> None:
    """Makes sure that this process runs the `core` that the job was planned with.

    Raises:
      JobError: it found another one first on its path, or another version is installed here.
    """
    found = plan.code_version("core")
    if found != expected:
        raise JobError(
            f"the job was planned with core {expected}; this worker imports core {found} from "
            f"{Path(core.__file__ or '').parent}; install the same packages for both"
        )


def device() -> str:
    """Returns the kind of device that this process computes on."""
    return jax.devices()[0].device_kind
