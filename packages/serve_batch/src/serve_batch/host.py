"""The engine of this process: loaded once, whoever asks, and shared by every thread that a runner brings.

The host knows nothing of Beam. It draws the line between a row that cannot be served, which is a value, and an engine
that has failed, which is an exception and stops the job.
"""

import collections
import contextlib
import dataclasses
import datetime
import functools
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import jax

import core
from core import Completion, Request, RequestError, TokenizerError, decode, harmony, native
from core.chat import Chat
from core.chat import missing as template_missing
from core.engine import Counters
from serve_batch import devices, plan
from serve_batch.errors import JobError
from serve_batch.records import Conversation, LongPrompts

K = TypeVar("K")
E = TypeVar("E")
Result = Completion | RequestError

PREFIX_CACHE_BYTES = 2**28
"""For what prompts have in common, such as a system prompt; it changes no result."""

WAITING_PER_SLOT = 8
"""Requests of one caller that are in line or in a slot, a slot: enough that none stands free while results are given
in order, and one waits for the longest."""


class EngineHost:
    """A `core.Engine` that threads share: the requests of all fill the same slots.

    One thread drives it, from the first request on. If that fails, all who wait are told, and all who come later.
    Who came first is served first: others get what he leaves free, so that one after the other comes to an end.
    """

    def __init__(
        self, model: Path, *, slots: int, precision: str | None = None, top_logprobs: int = 0
    ):
        self._model = model
        self._engine = core.Engine(
            *core.load(model),
            slots=slots,
            precision=precision,
            prefix_cache=PREFIX_CACHE_BYTES,
            top_logprobs=top_logprobs,
        )
        self._arrivals: queue.SimpleQueue[_Arrival | _Leaving | None] = queue.SimpleQueue()
        self.broken: BaseException | None = None
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def complete(
        self, requests: Iterable[tuple[K, Request | E]]
    ) -> Iterator[tuple[K, Completion | RequestError | E]]:
        """Yields a result for each request under its key, in order; what is no request comes back as it is.

        Requests are taken as they are needed. Anything raised means that the engine itself is broken.
        """
        given = iter(requests)
        line: collections.deque[_Awaited[K, E]] = collections.deque()
        with contextlib.closing(self.call()) as call:
            while True:
                while len(line) < self.room:
                    pair = next(given, None)
                    if pair is None:
                        break
                    line.append(self._ask(*pair, call))
                if not line:
                    return
                while line[0].result is None:
                    awaited, result = call.take()
                    awaited.result = result
                first = line.popleft()
                assert first.result is not None
                yield first.key, first.result

    def call(self) -> "Call[Any]":
        """Returns what to ask by, for someone who takes results as they come."""
        return Call(self)

    @property
    def room(self) -> int:
        """How many requests of one caller wait or run, so that no slot stands free for want of them."""
        return self._engine.slots * WAITING_PER_SLOT

    @property
    def counters(self) -> Counters:
        return self._engine.counters

    def close(self) -> None:
        """Lets go of the model; who waits, or comes later, is told."""
        self._arrivals.put(None)

    @staticmethod
    def _ask(key: K, request: Request | E, call: "Call[Any]") -> "_Awaited[K, E]":
        if not isinstance(request, Request):
            return _Awaited(key, request)
        awaited: _Awaited[K, E] = _Awaited(key, None)
        call.ask(awaited, request)
        return awaited

    def _arrive(self, who: "_Arrival") -> None:
        with self._starting:
            if self.broken is not None:
                raise self.broken
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
                self._thread.start()
            self._arrivals.put(who)

    def _drive(self) -> None:
        """Serves whoever comes until the process ends, or the engine fails."""
        open_: dict[int, _Arrival] = {}
        waiting: dict[Call[Any], collections.deque[_Arrival]] = {}  # in the order of their coming
        try:
            while True:
                while not self._arrivals.empty() or not (self._engine.busy or waiting):
                    who = self._arrivals.get()
                    if who is None:
                        error = JobError("the model was closed: this process has another")
                        self._end(error, open_, waiting)
                        return
                    self._let_in(who, open_, waiting)
                self._seat(open_, waiting)
                for event in self._engine.step(decode.STEPS):
                    if event.result is not None:
                        arrival = open_.pop(event.request)
                        arrival.call.results.put((arrival.key, event.result))
        except BaseException as error:
            self._end(error, open_, waiting)

    def _end(
        self,
        error: BaseException,
        open_: "dict[int, _Arrival]",
        waiting: "dict[Call[Any], collections.deque[_Arrival]]",
    ) -> None:
        with self._starting:  # nobody arrives any more
            self.broken = error
        calls = {arrival.call for arrival in open_.values()} | waiting.keys()
        while not self._arrivals.empty():
            last = self._arrivals.get()
            if isinstance(last, _Arrival):
                calls.add(last.call)
        for call in calls:
            call.results.put((None, error))

    def _let_in(
        self,
        who: "_Arrival | _Leaving",
        open_: "dict[int, _Arrival]",
        waiting: "dict[Call[Any], collections.deque[_Arrival]]",
    ) -> None:
        if isinstance(who, _Arrival):
            waiting.setdefault(who.call, collections.deque()).append(who)
            return
        waiting.pop(who.call, None)
        for ticket in [t for t, arrival in open_.items() if arrival.call is who.call]:
            self._engine.cancel(ticket)
            del open_[ticket]

    def _seat(
        self,
        open_: "dict[int, _Arrival]",
        waiting: "dict[Call[Any], collections.deque[_Arrival]]",
    ) -> None:
        """Gives the engine what it needs to keep its slots full; whoever called first goes first."""
        for call in sorted(waiting, key=lambda call: call.number):
            line = waiting[call]
            while line and len(open_) < 2 * self._engine.slots:
                who = line.popleft()
                try:
                    open_[self._engine.submit(who.request)] = who
                except RequestError as error:
                    call.results.put((who.key, error))
            if not line:
                del waiting[call]

    def encode(self, talk: Conversation, now: datetime.datetime) -> tuple[int, ...]:
        """Returns a conversation as the model's chat template has it.

        Raises:
          core.RequestError: the model has no template or no tokenizer, or the template does not take the messages.
          core.TokenizerError: the model's template is not one.
        """
        chat = self._chat
        ids = chat.encode(talk.messages, now=now, tools=talk.tools, variables=talk.variables)
        return tuple(ids)

    def cut(
        self, prompt: str | Sequence[int], *, new_tokens: int, policy: LongPrompts
    ) -> tuple[str | Sequence[int], int]:
        """Returns `prompt` short enough that `new_tokens` follow, and how many tokens it has lost.

        What cannot be encoded stays as it is: the engine says why.

        Raises:
          core.RequestError: no prompt at all would leave that room.
        """
        tokens, tokenizer = prompt, self._engine.tokenizer
        if isinstance(prompt, str):
            try:
                tokens = () if tokenizer is None else tuple(tokenizer.encode(prompt))
            except TokenizerError:
                tokens = ()
        length = self._engine.length
        most = length - max(new_tokens, 1) + 1  # the last token is produced, not fed
        if len(tokens) <= max(most, 0):
            return tokens or prompt, 0
        if most < 1:
            raise RequestError(
                "prompt_too_long",
                f"max_new_tokens is {new_tokens}; with a context of {length} that leaves no room for a prompt",
            )
        lost = len(tokens) - most
        return (tokens[lost:] if policy == "truncate_left" else tokens[:most]), lost

    def answer(self, completion: Completion, stop: Sequence[str]) -> Mapping[str, Any] | None:
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
            raise RequestError(
                "tokenizer_missing", "this model has no tokenizer; give the prompt as token ids"
            )
        if self._found_chat is None:
            raise template_missing(self._model)
        return self._found_chat


_numbers = itertools.count()


class Call(Generic[K]):
    """Someone who asks, and takes the results as they come; of one thread at a time."""

    def __init__(self, host: EngineHost):
        self.number = next(_numbers)
        self.asked = 0
        """Requests whose results have not been taken."""
        self.results: queue.SimpleQueue[tuple[K | None, Any]] = queue.SimpleQueue()
        self._host = host

    def ask(self, key: K, request: Request) -> None:
        self._host._arrive(_Arrival(request, key, self))
        self.asked += 1

    def take(self) -> tuple[K, Result]:
        """Returns the next result there is, under its key, or waits for it.

        Anything raised means that the engine itself is broken.
        """
        key, result = self.results.get()
        if isinstance(result, BaseException) and not isinstance(result, RequestError):
            self.results.put((None, result))  # for whoever asks again
            raise result
        self.asked -= 1
        return cast(K, key), result

    @property
    def has_results(self) -> bool:
        """Whether `take` would not wait."""
        return not self.results.empty()

    def close(self) -> None:
        """Lets go of what has been asked and not taken."""
        if self.asked:
            self._host._arrivals.put(_Leaving(self))


@dataclasses.dataclass(eq=False)
class _Awaited(Generic[K, E]):
    key: K
    result: Completion | RequestError | E | None


@dataclasses.dataclass(frozen=True)
class _Arrival:
    request: Request
    key: Any
    call: Call[Any]


@dataclasses.dataclass(frozen=True)
class _Leaving:
    call: Call[Any]


_opening = threading.Lock()
_current: tuple[tuple[Path, int, str | None, int, str, tuple[str, ...]], EngineHost] | None = None


def shared(
    model: Path,
    *,
    slots: int,
    revision: str,
    precision: str | None = None,
    top_logprobs: int = 0,
) -> EngineHost:
    """Returns the process's host for `model`, loading it if it is not the one already there.

    Raises:
      JobError: the model folder is no longer the one that the plan was made for, or no accelerator is free.
    """
    global _current
    devices.lease()
    devices.pin()
    with _opening:
        files = tuple(plan.text_files(model).values())
        wanted = (model, slots, precision, top_logprobs, revision, files)
        if _current is None or _current[0] != wanted or _current[1].broken is not None:
            found = plan.model_revision(model)
            if found != revision:
                raise JobError(
                    f"the job was planned for revision {revision[:12]} of the model, "
                    f"{model} holds {found[:12]}; start the job again in another output folder"
                )
            if _current is not None:
                _current[1].close()
            _current = None  # one model's memory at a time
            host = EngineHost(model, slots=slots, precision=precision, top_logprobs=top_logprobs)
            _current = (wanted, host)
        return _current[1]


def counters() -> Counters | None:
    """Returns what the engine of this process has done so far; None where there is none."""
    return None if _current is None else _current[1].counters


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
    """Returns the kind of device that this process computes on; of a CPU, also with which kernels."""
    device = jax.devices()[0]
    return f"cpu {native.name()}" if device.platform == "cpu" else device.device_kind
