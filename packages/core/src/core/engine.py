"""The generation engine: prompts in, continuations out. It sees token ids; text is a matter of `core.continuation`.

An engine has a fixed number of slots. Requests wait in line; the first goes into a slot that is free, its prompt is fed
in chunks whose sizes follow from its own length alone, and then all slots decode together, each with its own settings,
until one comes to its end and the next request takes its place. Shapes never change, so nothing is compiled twice.

A continuation does not depend on its slot, its neighbours, the order of the requests or what was there before, to the
last bit. Random draws depend on the seed, the request's id and the token's position.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import decode, memory, native, sharding
from core import sampling as sampling_lib
from core.continuation import Continuation
from core.decode import Columns, Produced, State, Statics
from core.errors import EngineError, SamplingError, TokenizerError
from core.errors import RequestError as RequestError
from core.kv_cache import FEW, KVCache
from core.models import Model, Params
from core.precision import prepare
from core.prefixes import Prefixes
from core.requests import DEFAULT_SAMPLING as DEFAULT_SAMPLING
from core.requests import Completion as Completion
from core.requests import Event as Event
from core.requests import FinishReason as FinishReason
from core.requests import Request as Request
from core.requests import TokenScore as TokenScore
from core.sampling import Sampler, Sampling, Settings
from core.tokenizer import Tokenizer

SMALLEST_CHUNK = 16
STOP_CHECK_STEPS = 8  # steps between looks at the text, while a request has stop strings
STREAM_STEPS = 4  # tokens a dispatch while streaming
FILL_TOKENS = 1024  # of prompts, fed between two dispatches of slots that are decoding


class Engine:
    """Generates with one model; not thread-safe.

    Args:
      model: from `core.load` or `core.build`.
      params: its parameters; never donated, so they may be a mapped file. Where they lie on a mesh of devices, so does
        everything else: slots over "data", heads over "tensor".
      tokenizer: None allows prompts of token ids only, and gives no text.
      slots: rows that decode together; results depend on it in the last bits, so keep it with a job.
      length: positions that a slot holds, of prompt and continuation; by default the model's context.
      chunk: prompt tokens that are fed at once, a power of two; results depend on it in the last bits.
      speculation: tokens a step that are guessed from what stood in the text before, and checked; what comes out is
        the same but for the last bits, in fewer steps where texts repeat themselves.
      prefix_cache: bytes to keep of what prompts have in common, so that it is fed once (`core.prefixes`); less than a
        chunk leaves in the cache is none.
      top_logprobs: the most alternatives that a request may ask log-probabilities of.
      sampler: draws the tokens; see `core.sampling.Sampler`.
      precision: one of `core.config.PRECISIONS`; by default what the parameters are in. See `core.precision`.

    Raises:
      EngineError: the slots take more memory than there is.
      ConfigError, CheckpointError: the model cannot be in that precision.
      NativeError: native kernels are required, and cannot be had.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 16,
        length: int | None = None,
        chunk: int | None = None,
        speculation: int = 0,
        prefix_cache: int = 0,
        top_logprobs: int = 20,
        sampler: Sampler = sampling_lib.sample,
        precision: str | None = None,
    ):
        if slots < 1:
            raise ValueError(f"slots is {slots}; expected 1 or more")
        if length is not None and length < 1:
            raise ValueError(f"length is {length}; expected 1 or more, or None")
        if not 0 <= speculation < FEW:
            raise ValueError(f"speculation is {speculation}; expected 0 (off) to {FEW - 1}")
        self.tokenizer, self.slots = tokenizer, slots
        self.model, self.params, dtype, cache_dtype = prepare(model, params, precision)
        config = model.config
        self.length = min(length or config.context_length, config.context_length)
        chunk = chunk or (128 if jax.default_backend() == "cpu" else 512)
        self._chunks = _doubling(SMALLEST_CHUNK, min(chunk, _covering(self.length)))
        stops = set(config.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_id is not None:
            stops.add(tokenizer.eos_id)
        self._statics = Statics(
            model=self.model,
            sampler=sampler,
            dtype=jnp.dtype(dtype),
            cache_dtype=jnp.dtype(cache_dtype),
            stop_ids=tuple(sorted(stops)),
            # A padded vocabulary has rows that no tokenizer can read; they are never sampled.
            vocab_size=min(
                config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size
            ),
            missing_ids=tokenizer.missing_ids if tokenizer else (),
            top_logprobs=min(top_logprobs, config.vocab_size),
            speculation=speculation,
        )
        self.counters = Counters()
        self._prefixes = Prefixes(self._chunks[-1], self._chunk_nbytes, prefix_cache)
        self._no_bias_V = np.zeros(config.vocab_size, np.float32)
        self._tickets = 0
        self._inbox: _Inbox = collections.deque()
        self._mesh = sharding.mesh_of(self.params)
        with self._serving():
            native.is_serving()  # compiles and loads them, or fails, before there are requests
        self._check_memory()
        self._reset()

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling = DEFAULT_SAMPLING
    ) -> list[str]:
        """Returns the continuation of each prompt.

        Raises:
          RequestError: a prompt cannot be served; nothing has been generated.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one str; give a list of prompts")
        requests = [Request(prompt, sampling) for prompt in prompts]
        for request in requests:
            self.check(request)
        return [c.text for c in self.complete(requests) if isinstance(c, Completion)]

    def complete(self, requests: Iterable[Request]) -> list[Completion | RequestError]:
        """Returns one result a request, in order; a request that cannot be served gives its error as a value."""
        results: dict[int, Completion | RequestError] = {}
        for event in self._events(requests, decode.STEPS, only_results=True):
            if event.result is not None:
                results[event.request] = event.result
        return [results[index] for index in range(len(results))]

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Yields an event a token, as they are produced; a request's last one has its result.

        Requests are taken as slots become free. Leaving the iterator cancels what is not done.
        """
        return self._events(requests, STREAM_STEPS)

    def submit(self, request: Request) -> int:
        """Puts a request in line and returns its ticket; `step` gives its events.

        Raises:
          RequestError: it cannot be served; see `check`.
        """
        return self._enqueue(request, "0", self._inbox, lambda ticket: ticket)

    def step(self, steps: int = STREAM_STEPS) -> list[Event]:
        """Goes on by at most `steps` tokens a slot and returns what that gave to submitted requests.

        An empty list while others' requests are served, and when nothing is left to do (`busy` says which).
        """
        if self.busy and not self._inbox:
            self._advance(steps)
        events = list(self._inbox)
        self._inbox.clear()
        return events

    @property
    def busy(self) -> bool:
        """Whether any request waits or is in a slot, or has events for `step` to give."""
        return bool(self._line) or any(self._rows) or bool(self._inbox)

    def cancel(self, ticket: int) -> Completion | None:
        """Ends a submitted request and returns what there is of it; None if `step` has given its result already.

        No event of it follows, those that `step` has not given yet included.
        """
        pending = [event for event in self._inbox if event.request == ticket]
        for event in pending:
            self._inbox.remove(event)
        for row in self._of(self._inbox):
            if row.number == ticket:
                return self._cancel(row)
        results = (event.result for event in pending)
        return next((result for result in results if isinstance(result, Completion)), None)

    def score(self, tokens: Sequence[int], top: int = 0) -> list[TokenScore]:
        """Returns each token's log-probability given those before it, and the `top` likeliest at its place.

        Raises:
          RequestError: `tokens` are none, too many or unknown.
          EngineError: what is asked for takes more memory than there is.
        """
        prompt, config = self._prompt_tokens(tokens), self.model.config
        size = min(max(SMALLEST_CHUNK, _covering(len(prompt))), config.context_length)
        top = min(top, config.vocab_size)
        self._check_scores(size, top)
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(prompt)] = prompt
        chosen_T, ids_TK, values_TK = decode.score(
            self._statics, top, self.params, jnp.asarray(padded)
        )
        chosen, ids, values = (np.asarray(x).tolist() for x in (chosen_T, ids_TK, values_TK))
        return [TokenScore(prompt[0], None)] + [
            TokenScore(token, chosen[t], tuple(zip(ids[t], values[t], strict=True)))
            for t, token in enumerate(prompt[1:])
        ]

    def check(self, request: Request) -> tuple[int, ...]:
        """Returns the request's prompt as token ids.

        Raises:
          RequestError: it cannot be served: `bad_id`, `bad_prompt`, `tokenizer_missing`, `prompt_empty`,
            `prompt_too_long`, `token_out_of_range`, `bad_sampling`.
        """
        sampling, most = request.sampling, self._statics.top_logprobs
        id_ = request.id
        if isinstance(id_, bool) or not isinstance(id_, str | int | np.integer | None):
            raise RequestError("bad_id", f"the id is {id_!r}; expected a string or a whole number")
        if sampling.stop and self.tokenizer is None:
            raise RequestError(
                "tokenizer_missing", "stop strings need a tokenizer; this model has none"
            )
        if (sampling.logprobs or 0) > most < self.model.config.vocab_size:
            raise RequestError(
                "bad_sampling",
                f"logprobs is {sampling.logprobs}; this engine gives at most {most} (its top_logprobs)",
            )
        try:
            statics = self._statics
            sampling_lib.check_ids(
                sampling,
                statics.vocab_size,
                stop_ids=statics.stop_ids,
                missing_ids=statics.missing_ids,
            )
        except SamplingError as error:
            raise RequestError("bad_sampling", str(error)) from error
        return self._prompt_tokens(request.prompt)

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        config = self.model.config
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "tokenizer_missing", "this model has no tokenizer; give the prompt as token ids"
                )
            try:
                tokens = tuple(self.tokenizer.encode(prompt))
            except TokenizerError as error:
                raise RequestError("bad_prompt", str(error)) from error
        else:
            tokens = tuple(prompt) if isinstance(prompt, Iterable) else ()
            if not isinstance(prompt, Iterable) or not all(
                isinstance(t, (int, np.integer)) and not isinstance(t, bool) for t in tokens
            ):
                raise RequestError(
                    "bad_prompt", "the prompt is neither text nor a list of token ids"
                )
        if not tokens:
            raise RequestError(
                "prompt_empty", "the prompt is empty; it must hold at least one token"
            )
        if len(tokens) > self.length:
            whose = "the model's context" if self.length == config.context_length else "a slot"
            raise RequestError(
                "prompt_too_long", f"the prompt has {len(tokens)} tokens; {whose} is {self.length}"
            )
        wrong = next((t for t in tokens if not 0 <= t < config.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                "token_out_of_range",
                f"token id {wrong} is outside the model's vocabulary of {config.vocab_size}",
            )
        return tuple(int(t) for t in tokens)

    def _events(
        self, requests: Iterable[Request], steps: int, *, only_results: bool = False
    ) -> Iterator[Event]:
        """Yields the events of `requests`, taking so many that the slots are full and the next ones wait."""
        inbox: _Inbox = collections.deque()
        given = enumerate(requests)
        taken, ended, is_all = 0, 0, False
        try:
            while True:
                while not is_all and taken - ended < 2 * self.slots:
                    index, request = next(given, (0, None))
                    is_all = request is None
                    if request is not None:
                        taken += 1
                        try:
                            self._enqueue(
                                request,
                                str(index),
                                inbox,
                                lambda _, i=index: i,
                                only_result=only_results,
                            )
                        except RequestError as error:
                            inbox.append(Event(index, None, "", error))
                if is_all and taken == ended:
                    return
                while inbox:
                    event = inbox.popleft()
                    ended += event.result is not None
                    yield event
                if taken > ended:
                    if not self._of(inbox):
                        raise EngineError("the engine failed for another caller, and lost this one")
                    self._advance(steps)
        finally:
            for row in self._of(inbox):
                self._cancel(row)

    def _enqueue(
        self,
        request: Request,
        default_id: str,
        inbox: "_Inbox",
        number: Callable[[int], int],
        *,
        only_result: bool = False,
    ) -> int:
        prompt, sampling = self.check(request), request.sampling
        self._tickets += 1
        # The last token need not fit: it is produced, not fed.
        limit = min(sampling.max_new_tokens, self.length - len(prompt) + 1)
        text = Continuation(
            self.tokenizer,
            prompt,
            limit=limit,
            stop=sampling.stop,
            stop_ids=() if sampling.ignore_eos else self._statics.stop_ids,
        )
        id_ = default_id if request.id is None else str(request.id)
        words = _key_words(sampling, id_)
        row = _Row(number(self._tickets), sampling, limit, text, inbox, words, only_result)
        if text.finish_reason is None:
            self._line.append(row)
        else:
            inbox.append(Event(row.number, None, "", row.completion()))
        return row.number

    def _reset(self) -> None:
        """Forgets everything that waits or runs; the device's memory is taken again when it is needed."""
        self._state: State | None = None
        self._line: collections.deque[_Row] = collections.deque()
        self._rows: list[_Row | None] = [None] * self.slots

    def _of(self, inbox: "_Inbox") -> "list[_Row]":
        """Returns what waits or runs for one caller."""
        return [row for row in (*self._line, *self._rows) if row and row.inbox is inbox]

    def _cancel(self, row: "_Row") -> Completion:
        if row in self._line:
            self._line.remove(row)
        else:
            self._rows[self._rows.index(row)] = None
        row.text.cancel()
        return row.completion()

    def _advance(self, steps: int) -> None:
        """Fills free slots, decodes once, and delivers what came out; what runs is lost if that fails."""
        try:
            with self._serving():
                self._go_on(steps)
        except BaseException:
            self._reset()
            raise

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        with mesh, native.serving():
            yield

    def _go_on(self, steps: int) -> None:
        if self._state is None:
            self._state = State.empty(self._statics, self.slots, self._capacity, self._mesh)
        state = self._fill(self._state)
        running = [row is not None and row.is_filled for row in self._rows]
        if any(row.sampling.stop for row in filter(None, self._rows)):
            steps = min(steps, STOP_CHECK_STEPS)
        waits = bool(self._line) or sum(running) < sum(map(bool, self._rows))
        self._state, out = decode.decode(
            self._statics,
            self.params,
            state,
            self._columns(running),
            steps,
            1 if waits else self.slots,
        )
        self.counters.steps += int(out.steps)
        self._deliver(self._fetched(out))

    @property
    def nbytes(self) -> int:
        """What the slots take, and the cache of prompts' beginnings at the most."""
        return self._slots_nbytes + self._prefixes.limit

    @property
    def _slots_nbytes(self) -> int:
        """Caches, a few numbers for each token of the vocabulary, and what a dispatch tells of each token."""
        made = self._state_shapes, jax.eval_shape(self._nothing)
        return _nbytes(made)

    @property
    def _chunk_nbytes(self) -> int:
        """What one whole chunk of a prompt leaves in the cache."""
        read = functools.partial(decode.read_chunk, self._statics, self._chunks[-1])
        return _nbytes(jax.eval_shape(read, self._state_shapes, 0, 0))

    @property
    def _state_shapes(self) -> State:
        return jax.eval_shape(
            functools.partial(State.zeros, self._statics, self.slots, self._capacity)
        )

    def _nothing(self) -> Produced:
        return Produced.nothing(self._statics, self.slots)

    @property
    def _capacity(self) -> int:
        """Positions a slot, those that only padding and drafts come to included."""
        largest, length = self._chunks[-1], self.length + self._statics.speculation
        return -(-length // largest) * largest

    def _free(self) -> int | None:
        """Returns the bytes that the devices have left; None if they do not say."""
        devices = [jax.local_devices()[0]] if self._mesh is None else self._mesh.local_devices
        there = [memory.free(device) for device in devices]
        # The devices of a CPU are simulated: all have the same memory.
        known = there[:1] if devices[0].platform == "cpu" else there
        return None if None in known else sum(filter(None, known))

    def _check_memory(self) -> None:
        free = self._free()
        if free is None or free >= self.nbytes:
            return
        one, kept = self._slots_nbytes // self.slots, self._prefixes.limit
        cached = f", and prefix_cache {memory.spell(kept)}" if kept else ""
        rest = ", a shorter length or less prefix_cache" if kept else " or a shorter length"
        raise EngineError(
            f"{self.slots} slots of {self.length} positions take {self.slots} x {memory.spell(one)} = "
            f"{memory.spell(self._slots_nbytes)}{cached}; {memory.spell(free)} are free: give fewer slots "
            f"(at most {max(0, free - kept) // one}){rest}"
        )

    def _check_scores(self, size: int, top: int) -> None:
        """Raises EngineError where `top` ids and values of `size` places, and the logits of some, are too much."""
        free = self._free()
        logits = 4 * min(size, decode.SCORED) * self.model.config.vocab_size
        # With their log-probabilities and the order of these; the answer is on the device and on the host.
        needed = 3 * logits + 2 * 8 * size * top
        if free is not None and needed > free:
            raise EngineError(
                f"scores of {size} tokens with the {top} likeliest take {memory.spell(needed)}; "
                f"{memory.spell(free)} are free: ask for fewer, or score shorter texts"
            )

    def _fill(self, state: State) -> State:
        """Gives free slots to those who wait, and feeds prompts; not many while others wait to decode."""
        for slot, row in enumerate(self._rows):
            if row is None and self._line:
                self._rows[slot] = self._line.popleft()
        fed, decoding = 0, any(row is not None and row.is_filled for row in self._rows)
        for slot, row in enumerate(self._rows):
            while row is not None and not row.is_filled and (fed < FILL_TOKENS or not decoding):
                source = self._same_prompt(row)
                chunk = self._prefixes.find(row.text.prompt, row.filled)
                if source is not None:
                    state = decode.fork(state, source, slot)
                    self.counters.reused_tokens += len(row.text.prompt)
                    row.filled = len(row.text.prompt)
                elif chunk is not None:
                    state = self._put(state, slot, row, chunk)
                else:
                    state, count = self._feed(state, slot, row)
                    fed += count
        return state

    def _same_prompt(self, row: "_Row") -> int | None:
        """Returns a slot with the same prompt from which nothing has been drawn yet; without bias, both."""
        if row.filled or row.sampling.has_bias:
            return None
        for slot, found in enumerate(self._rows):
            if found is None or not found.is_fresh or found.sampling.has_bias:
                continue
            if found.text.prompt == row.text.prompt:
                return slot
        return None

    def _feed(self, state: State, slot: int, row: "_Row") -> tuple[State, int]:
        """Feeds the next chunk of a prompt."""
        prompt, start = row.text.prompt, row.filled
        rest = prompt[start : start + self._chunks[-1]]
        size = next(size for size in self._chunks if size >= len(rest))
        # Else a quarter of it, or more, would be padding. Two of the smallest are as much as one of twice that.
        if size > 2 * SMALLEST_CHUNK and len(rest) <= size * 3 // 4:
            size //= 2
            rest = rest[:size]
        tokens_1T = np.zeros((1, size), np.int32)
        tokens_1T[0, : len(rest)] = rest
        bias_V = sampling_lib.bias_row(row.sampling, self.model.config.vocab_size)
        state = decode.prefill(
            self._statics,
            self.params,
            state,
            tokens_1T,
            np.int32(start),
            np.int32(len(rest)),
            np.int32(slot),
            np.bool_(start == 0),
            np.bool_(start + len(rest) == len(prompt)),
            self._no_bias_V if bias_V is None else bias_V,
        )
        if self._prefixes.wants(prompt, start):
            chunk = decode.read_chunk(self._statics, size, state, slot, start)
            self._prefixes.keep(prompt, start, chunk)
        self.counters.prompt_tokens += len(rest)
        row.filled += len(rest)
        return state, size

    def _put(self, state: State, slot: int, row: "_Row", chunk: KVCache) -> State:
        """Puts in the next chunk of a prompt, which was fed for another."""
        start, size = row.filled, self._prefixes.size
        tokens_1T = np.array([row.text.prompt[start : start + size]], np.int32)
        place = np.int32(start), np.int32(slot), np.bool_(start == 0)
        self.counters.reused_tokens += size
        row.filled += size
        return decode.write_chunk(self._statics, state, chunk, tokens_1T, *place)

    def _columns(self, running: Sequence[bool]) -> Columns:
        rows = [row or _NOBODY for row in self._rows]

        def column(values: Iterable[Any], dtype: type) -> np.ndarray:
            return np.array(list(values), dtype)

        return Columns(
            active_B=column(running, bool),
            fresh_B=column((not row.text.tokens for row in rows), bool),
            token_B=column((row.text.tokens[-1:] or [0] for row in rows), np.int32)[:, 0],
            position_B=column((row.position for row in rows), np.int32),
            produced_B=column((len(row.text.tokens) for row in rows), np.int32),
            limit_B=column((row.limit for row in rows), np.int32),
            ignore_eos_B=column((row.sampling.ignore_eos for row in rows), bool),
            wants_scores_B=column((row.sampling.logprobs is not None for row in rows), bool),
            key_words_B4=column((row.key_words for row in rows), np.uint32),
            settings=Settings.of([row.sampling for row in rows]),
        )

    def _fetched(self, out: Produced) -> Produced:
        """Returns it on the host, but scores, which are most of it, only if anyone wants them."""
        wanted = any(row.sampling.logprobs is not None for row in self._rows if row)
        return out._replace(
            tokens_BM=np.asarray(out.tokens_BM),
            count_B=np.asarray(out.count_B),
            scores=jax.device_get(out.scores) if wanted else out.scores,
        )

    def _deliver(self, out: Produced) -> None:
        """Gives each slot's new tokens to whoever asked for them, and frees the slots that have ended."""
        for slot, row in enumerate(self._rows):
            if row is None:
                continue
            for m, token in enumerate(out.tokens_BM[slot, : out.count_B[slot]].tolist()):
                if token == decode.NO_NUMBER:
                    row.inbox.append(Event(row.number, None, "", _no_number(row)))
                    self._rows[slot] = None
                    break
                self.counters.tokens += 1
                text = row.text.push(token)
                if row.sampling.logprobs is not None:
                    row.text.scores.append(_score(out, slot, m, row.sampling.logprobs))
                ended = row.text.finish_reason is not None
                result = row.completion() if ended else None
                if ended or not row.only_result:
                    row.inbox.append(Event(row.number, token, text, result))
                if ended:
                    self._rows[slot] = None
                    break


@dataclasses.dataclass
class Counters:
    """What an engine has done so far.

    The share of the slots that was used is `tokens / (steps * slots)`; with speculation it may be above 1.
    """

    prompt_tokens: int = 0
    """Fed."""
    reused_tokens: int = 0
    """Of prompts, not fed because others had them in common."""
    tokens: int = 0
    """Of continuations. What a dispatch went on to draw after a stop string counts as nothing."""
    steps: int = 0
    """In which each slot could have drawn."""


_Inbox = collections.deque[Event]


@dataclasses.dataclass(eq=False)
class _Row:
    """A request in line or in a slot."""

    number: int
    sampling: Sampling
    limit: int
    text: Continuation
    inbox: _Inbox
    key_words: tuple[int, ...]
    only_result: bool = False
    """Whoever asked wants no event of each token."""
    filled: int = 0
    """How much of the prompt is in the slot's cache."""

    @property
    def is_filled(self) -> bool:
        return self.filled == len(self.text.prompt)

    @property
    def is_fresh(self) -> bool:
        return self.is_filled and not self.text.tokens

    @property
    def position(self) -> int:
        """Where the last token goes; of a fresh slot, where the first one will."""
        return len(self.text.prompt) + max(len(self.text.tokens), 1) - 1

    def completion(self) -> Completion:
        return self.text.completion(with_scores=self.sampling.logprobs is not None)


_NOBODY = _Row(
    number=0,
    sampling=Sampling(temperature=0),
    limit=0,
    text=Continuation(None, (0,), limit=0, stop=(), stop_ids=()),
    inbox=collections.deque(),
    key_words=(0, 0, 0, 0),
)


def _no_number(row: _Row) -> RequestError:
    return RequestError(
        "not_a_number",
        f"after {len(row.text.prompt) + len(row.text.tokens)} tokens the model's logits are no finite numbers: "
        "its weights are damaged, or the precision is too narrow for them",
    )


def _key_words(sampling: Sampling, id_: str) -> tuple[int, ...]:
    """The four 32-bit words that a request's random key is folded from: two of the seed, two of the id."""
    digest = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()
    seed = sampling.seed.to_bytes(8, "little")
    return tuple(np.frombuffer(seed + digest[:8], "<u4").tolist())


def _score(out: Produced, slot: int, m: int, alternatives: int) -> TokenScore:
    chosen_BM, ids_BMK, values_BMK = out.scores
    ids, values = (x[slot, m, :alternatives].tolist() for x in (ids_BMK, values_BMK))
    top = tuple(zip(ids, values, strict=True))
    return TokenScore(int(out.tokens_BM[slot, m]), float(chosen_BM[slot, m]), top)


def _doubling(smallest: int, largest: int) -> tuple[int, ...]:
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def _covering(length: int) -> int:
    """Returns the smallest power of two that is no less than `length`."""
    return 1 << (length - 1).bit_length()


def _nbytes(arrays: Any) -> int:
    """Returns the bytes of a tree of arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
