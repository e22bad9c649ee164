"""The generation engine: prompts in, continuations out. It sees token ids; text is a matter of the last few lines.

Prefill and the whole decode loop are one jit. Requests run in groups that share their static shapes: the
number of slots, the prefill bucket and the cache length, and those of a request follow from its own length alone. So a
continuation does not depend on its neighbours, on the order of the requests or on how many there are. Random draws
depend on the seed, the request's id and the token's position.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import sampling as sampling_lib
from core.errors import RequestError as RequestError
from core.errors import TokenizerError
from core.kv_cache import KVCache
from core.models import Model, Params
from core.sampling import Sampler, Sampling, Settings
from core.tokenizer import Tokenizer

FinishReason = Literal["eos", "length", "stop"]

SMALLEST_PREFILL = 16
SMALLEST_CACHE = 64
PREFILL_TOKENS = 1024  # prefill takes as many rows at once as fit in this many tokens
STOP_CHECK_STEPS = 16  # steps between looks at the text, for requests with stop strings
STREAM_STEPS = 4  # tokens a dispatch while streaming, after the first
DEFAULT_SAMPLING = Sampling()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, as text or as token ids; `id` is what its random draws depend on (by default its index)."""

    prompt: str | Sequence[int]
    sampling: Sampling = DEFAULT_SAMPLING
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token's log-probability under the model, in nats, and the likeliest tokens at its place.

    The first token of a text has none (None): nothing comes before it.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A continuation: `tokens` with the end-of-text token if it ended there, `text` without that or a stop string."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: tuple[int, ...]
    logprobs: tuple[TokenScore, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """One token of a stream, the text that it completes, and with the last one why it ended."""

    token: int | None
    text: str
    finish_reason: FinishReason | None = None


class Engine:
    """Generates with one model; not thread-safe.

    Args:
      model: from `core.load` or `core.build`.
      params: its parameters; never donated, so they may be a mapped file.
      tokenizer: None allows prompts of token ids only, and gives no text.
      slots: rows that decode together; results depend on it in the last bits, so keep it with a job.
      sampler: draws the tokens; see `core.sampling.Sampler`.
      dtype: of activations and cache; by default that of the embeddings.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 16,
        sampler: Sampler = sampling_lib.sample,
        dtype: Any = None,
    ):
        if slots < 1:
            raise ValueError(f"slots is {slots}; expected 1 or more")
        self.model, self.params, self.tokenizer, self.slots = model, params, tokenizer, slots
        config = model.config
        eos = tokenizer.eos_id if tokenizer is not None else None
        stops = {config.eos_token_id, eos} - {None}
        self._statics = _Statics(
            model=model,
            sampler=sampler,
            dtype=jnp.dtype(dtype or params["wte"]["embedding"].dtype),
            stop_ids=tuple(sorted(id_ for id_ in stops if id_ is not None)),
            # A padded vocabulary has rows that no tokenizer can read; they are never sampled.
            vocab_size=min(
                config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size
            ),
        )

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling = DEFAULT_SAMPLING
    ) -> list[str]:
        """Returns the continuation of each prompt.

        Raises:
          RequestError: a prompt cannot be served; nothing has been generated.
        """
        requests = [Request(prompt, sampling) for prompt in prompts]
        for request in requests:
            self.check(request)
        return [c.text for c in self.complete(requests) if isinstance(c, Completion)]

    def complete(self, requests: Sequence[Request]) -> list[Completion | RequestError]:
        """Returns one result a request, in order; a request that cannot be served gives its error as a value."""
        results: dict[int, Completion | RequestError] = {}
        groups: dict[_Shape, list[_Row]] = {}
        for index, request in enumerate(requests):
            try:
                row = self._row(index, request)
            except RequestError as error:
                results[index] = error
            else:
                groups.setdefault(row.shape, []).append(row)
        for shape, rows in sorted(groups.items(), key=lambda item: item[0].order):
            for start in range(0, len(rows), self.slots):
                batch = rows[start : start + self.slots]
                for row, completion in zip(batch, self._run(shape, batch), strict=True):
                    results[row.index] = completion
        return [results[index] for index in range(len(requests))]

    def stream(
        self, prompt: str | Sequence[int], sampling: Sampling = DEFAULT_SAMPLING, *, id: str = "0"
    ) -> Iterator[Event]:
        """Yields an event a token, as they are produced; the last one says why the text ended.

        Raises:
          RequestError: the prompt cannot be served.
        """
        return self._stream(self._row(0, Request(prompt, sampling, id)))

    def score(self, tokens: Sequence[int], top: int = 0) -> list[TokenScore]:
        """Returns each token's log-probability given those before it, and the `top` likeliest at its place.

        Raises:
          RequestError: `tokens` are none, too many or unknown.
        """
        prompt = self._prompt_tokens(tokens)
        padded = np.zeros((1, self._bucket(len(prompt), SMALLEST_PREFILL)), np.int32)
        padded[0, : len(prompt)] = prompt
        chosen_T, ids_TK, values_TK = _score(
            self._statics, self._at_most_all(top), self.params, jnp.asarray(padded)
        )
        chosen, ids, values = (np.asarray(x).tolist() for x in (chosen_T, ids_TK, values_TK))
        return [TokenScore(prompt[0], None)] + [
            TokenScore(token, chosen[t], tuple(zip(ids[t], values[t], strict=True)))
            for t, token in enumerate(prompt[1:])
        ]

    def check(self, request: Request) -> tuple[int, ...]:
        """Returns the request's prompt as token ids.

        Raises:
          RequestError: it cannot be served: `bad_prompt`, `tokenizer_missing`, `prompt_empty`, `prompt_too_long`,
            `token_out_of_range`.
        """
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
        if len(tokens) > config.n_positions:
            raise RequestError(
                "prompt_too_long",
                f"the prompt has {len(tokens)} tokens; the model's context is {config.n_positions}",
            )
        wrong = next((t for t in tokens if not 0 <= t < config.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                "token_out_of_range",
                f"token id {wrong} is outside the model's vocabulary of {config.vocab_size}",
            )
        return tuple(int(t) for t in tokens)

    def _row(self, index: int, request: Request) -> "_Row":
        prompt, sampling = self.check(request), request.sampling
        # The last token need not fit: it is produced, not fed.
        limit = min(sampling.max_new_tokens, self.model.config.n_positions - len(prompt) + 1)
        shape = _Shape(
            prefill=self._bucket(len(prompt), SMALLEST_PREFILL),
            cache=self._bucket(len(prompt) + max(limit, 1) - 1, SMALLEST_CACHE),
            logprobs=None if sampling.logprobs is None else self._at_most_all(sampling.logprobs),
            has_stops=bool(sampling.stop),
        )
        id_ = str(index) if request.id is None else request.id
        return _Row(index, id_, prompt, sampling, limit, shape)

    def _at_most_all(self, alternatives: int) -> int:
        return min(alternatives, self.model.config.vocab_size)

    def _bucket(self, length: int, smallest: int) -> int:
        bucket = smallest
        while bucket < length:
            bucket *= 2
        return min(bucket, self.model.config.n_positions)

    def _run(self, shape: "_Shape", rows: "Sequence[_Row]") -> list[Completion]:
        inputs = _Inputs.of(rows, self.slots)
        steps = STOP_CHECK_STEPS if shape.has_stops else max(row.limit for row in rows)
        state = _start(self._statics, shape, self.params, inputs, steps)
        texts = [_Text(self.tokenizer, row, self._statics.stop_ids) for row in rows]
        while True:
            out_BM, produced_B = np.asarray(state.out_BM), np.asarray(state.produced_B)
            for text, out_M, produced in zip(texts, out_BM, produced_B, strict=False):
                for token in out_M[len(text.tokens) : produced].tolist():
                    if text.finish_reason is None:
                        text.push(token)
            if all(text.finish_reason for text in texts):
                break
            done = [text.finish_reason is not None for text in texts]
            done += [True] * (self.slots - len(rows))
            state = state._replace(done_B=jnp.asarray(done))
            state = _go_on(self._statics, shape, self.params, inputs, state, steps)
        scores = None if state.scores is None else state.scores.of_rows(out_BM)
        return [
            text.completion(None if scores is None else scores[slot])
            for slot, text in enumerate(texts)
        ]

    def _stream(self, row: "_Row") -> Iterator[Event]:
        text = _Text(self.tokenizer, row, self._statics.stop_ids)
        if text.finish_reason is not None:
            yield Event(None, "", text.finish_reason)
            return
        inputs = _Inputs.of([row], 1)
        state = _start(self._statics, row.shape, self.params, inputs, 1)
        while True:
            out_M, produced = np.asarray(state.out_BM)[0], int(state.produced_B[0])
            for token in out_M[len(text.tokens) : produced].tolist():
                yield Event(token, text.push(token), text.finish_reason)
                if text.finish_reason is not None:
                    return
            state = _go_on(self._statics, row.shape, self.params, inputs, state, STREAM_STEPS)


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What the compiled functions of an engine are specialised to."""

    model: Model
    sampler: Sampler
    dtype: jnp.dtype
    stop_ids: tuple[int, ...]
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a request's own length and options make static; requests of one shape run together."""

    prefill: int
    cache: int
    logprobs: int | None
    has_stops: bool

    @property
    def order(self) -> tuple[int, int]:
        return self.prefill, self.cache


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request that has been checked."""

    index: int
    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    limit: int
    shape: _Shape

    @property
    def key_words(self) -> tuple[int, ...]:
        """The four 32-bit words that its random key is folded from: two of the seed, two of the id."""
        digest = hashlib.sha256(self.id.encode("utf-8", "surrogatepass")).digest()
        seed = self.sampling.seed.to_bytes(8, "little")
        return tuple(np.frombuffer(seed + digest[:8], "<u4").tolist())


class _Inputs(NamedTuple):
    """What the rows bring, an array a column."""

    prompt_BT: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    ignore_eos_B: jax.Array
    key_words_B4: jax.Array
    settings: Settings

    @classmethod
    def of(cls, rows: Sequence[_Row], slots: int) -> "_Inputs":
        """Lays `rows` out over the slots; a slot that stays free is a one-token prompt that is done at once."""
        prompt_BT = np.zeros((slots, rows[0].shape.prefill), np.int32)
        length_B, limit_B = np.ones(slots, np.int32), np.zeros(slots, np.int32)
        ignore_eos_B, key_words_B4 = np.zeros(slots, bool), np.zeros((slots, 4), np.uint32)
        for slot, row in enumerate(rows):
            prompt_BT[slot, : len(row.prompt)] = row.prompt
            length_B[slot], limit_B[slot] = len(row.prompt), row.limit
            ignore_eos_B[slot] = row.sampling.ignore_eos
            key_words_B4[slot] = row.key_words
        spare = [Sampling(temperature=0)] * (slots - len(rows))
        return cls(
            prompt_BT=jnp.asarray(prompt_BT),
            length_B=jnp.asarray(length_B),
            limit_B=jnp.asarray(limit_B),
            ignore_eos_B=jnp.asarray(ignore_eos_B),
            key_words_B4=jnp.asarray(key_words_B4),
            settings=Settings.of([row.sampling for row in rows] + spare),
        )


class _Scores(NamedTuple):
    """Log-probabilities of the tokens produced, and of the likeliest K at their places."""

    chosen_BM: jax.Array
    top_ids_BMK: jax.Array
    top_values_BMK: jax.Array

    def of_rows(self, out_BM: np.ndarray) -> list[list[TokenScore]]:
        chosen, ids, values = (np.asarray(x).tolist() for x in self)
        return [
            [
                TokenScore(token, chosen[b][m], tuple(zip(ids[b][m], values[b][m], strict=True)))
                for m, token in enumerate(tokens)
            ]
            for b, tokens in enumerate(out_BM.tolist())
        ]


class _State(NamedTuple):
    """A decode in progress. `token_B` has been produced and not yet been fed; it goes to `position_B`."""

    cache: KVCache
    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array
    done_B: jax.Array
    produced_B: jax.Array
    out_BM: jax.Array
    scores: _Scores | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(
    statics: _Statics, shape: _Shape, params: Params, inputs: _Inputs, steps: jax.Array | int
) -> _State:
    """Prefill and up to `steps` tokens a row."""
    logits_BV, cache = _prefill(statics, shape, params, inputs)
    B, V = logits_BV.shape
    T, M = shape.prefill, shape.cache
    is_prompt_BT = jnp.arange(T)[None] < inputs.length_B[:, None]
    seen_BV = jnp.zeros((B, V), bool)
    seen_BV = jax.vmap(lambda seen_V, ids_T: seen_V.at[ids_T].set(True, mode="drop"))(
        seen_BV, jnp.where(is_prompt_BT, inputs.prompt_BT, V)
    )
    scores = None
    if shape.logprobs is not None:
        top = (B, M, shape.logprobs)
        scores = _Scores(jnp.zeros((B, M)), jnp.zeros(top, jnp.int32), jnp.zeros(top))
    state = _State(
        cache=cache,
        token_B=jnp.zeros(B, jnp.int32),
        position_B=inputs.length_B - 1,
        seen_BV=seen_BV,
        done_B=inputs.limit_B == 0,
        produced_B=jnp.zeros(B, jnp.int32),
        out_BM=jnp.zeros((B, M), jnp.int32),
        scores=scores,
    )
    state = _take(statics, inputs, logits_BV, state)
    return _decode(statics, params, inputs, state, steps - 1)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _go_on(
    statics: _Statics,
    shape: _Shape,
    params: Params,
    inputs: _Inputs,
    state: _State,
    steps: jax.Array | int,
) -> _State:
    """Up to `steps` more tokens a row."""
    del shape  # it is in the shapes of the state
    return _decode(statics, params, inputs, state, steps)


def _prefill(
    statics: _Statics, shape: _Shape, params: Params, inputs: _Inputs
) -> tuple[jax.Array, KVCache]:
    """Returns the logits_BV after each prompt, and a cache of the full length with the prompts in it.

    Rows go through in chunks of a size that the bucket alone decides: scores take B N T T numbers.
    """
    B, T = inputs.prompt_BT.shape
    rows = next(r for r in range(max(1, min(B, PREFILL_TOKENS // T)), 0, -1) if B % r == 0)
    config = statics.model.config

    def chunk(arguments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, KVCache]:
        prompt_BT, length_B = arguments
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None], prompt_BT.shape)
        empty = KVCache.zeros(config, rows, T, statics.dtype)
        logits_B1V, cache = statics.model.extend(
            params, prompt_BT, positions_BT, empty, only_B=length_B - 1, dtype=statics.dtype
        )
        return logits_B1V[:, 0], cache

    chunks = inputs.prompt_BT.reshape(-1, rows, T), inputs.length_B.reshape(-1, rows)
    logits_CBV, caches = jax.lax.map(chunk, chunks)
    room = ((0, 0), (0, 0), (0, shape.cache - T), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x.reshape(B, *x.shape[2:]), room), caches)
    return logits_CBV.reshape(B, -1), cache


def _decode(
    statics: _Statics, params: Params, inputs: _Inputs, state: _State, steps: jax.Array | int
) -> _State:
    """Feeds the last tokens and draws the next ones, `steps` times or until every row is done."""

    def goes_on(carry: tuple[jax.Array, _State]) -> jax.Array:
        step, state = carry
        return (step < steps) & ~state.done_B.all()

    def step_on(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        step, state = carry
        logits_B1V, cache = statics.model.extend(
            params,
            state.token_B[:, None],
            state.position_B[:, None],
            state.cache,
            dtype=statics.dtype,
        )
        return step + 1, _take(statics, inputs, logits_B1V[:, 0], state._replace(cache=cache))

    return jax.lax.while_loop(goes_on, step_on, (jnp.int32(0), state))[1]


def _take(statics: _Statics, inputs: _Inputs, logits_BV: jax.Array, state: _State) -> _State:
    """Draws each row's next token from `logits_BV` and books it; rows that are done stay as they are."""
    B, V = logits_BV.shape
    position_B = state.position_B + 1
    keys_B = jax.vmap(_token_key)(inputs.key_words_B4, position_B)
    readable_V = jnp.arange(V) < statics.vocab_size
    drawn_B = statics.sampler(
        jnp.where(readable_V[None], logits_BV, -jnp.inf), keys_B, inputs.settings, state.seen_BV
    )
    active_B = ~state.done_B
    rows_B = jnp.arange(B)
    slot_B = jnp.where(active_B, state.produced_B, state.out_BM.shape[1])  # beyond the end: dropped

    def book(column: jax.Array, values: jax.Array) -> jax.Array:
        return column.at[rows_B, slot_B].set(values, mode="drop")

    scores = state.scores
    if scores is not None:
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        chosen_B = jnp.take_along_axis(logprobs_BV, drawn_B[:, None], axis=-1)[:, 0]
        top_BK, ids_BK = jax.lax.top_k(logprobs_BV, scores.top_ids_BMK.shape[2])
        scores = _Scores(*map(book, scores, (chosen_B, ids_BK, top_BK)))
    produced_B = state.produced_B + active_B.astype(jnp.int32)
    is_stop_B = jnp.isin(drawn_B, jnp.array(statics.stop_ids, jnp.int32)) & ~inputs.ignore_eos_B
    return state._replace(
        token_B=jnp.where(active_B, drawn_B, state.token_B),
        position_B=jnp.where(active_B, position_B, state.position_B),
        seen_BV=state.seen_BV.at[rows_B, drawn_B].max(active_B),
        done_B=state.done_B | is_stop_B | (produced_B >= inputs.limit_B),
        produced_B=produced_B,
        out_BM=book(state.out_BM, drawn_B),
        scores=scores,
    )


def _token_key(words_4: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.key(0)
    for word in (*words_4, position):
        key = jax.random.fold_in(key, word)
    return key


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    statics: _Statics, top: int, params: Params, tokens_1T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the log-probability of each token but the first, and the `top` likeliest ids and values there."""
    logits_1TV = statics.model.apply(params, tokens_1T, dtype=statics.dtype)
    logprobs_TV = jax.nn.log_softmax(logits_1TV[0, :-1], axis=-1)
    chosen_T = jnp.take_along_axis(logprobs_TV, tokens_1T[0, 1:, None], axis=-1)[:, 0]
    values_TK, ids_TK = jax.lax.top_k(logprobs_TV, top)
    return chosen_T, ids_TK, values_TK


class _Text:
    """A continuation as it grows: tokens in, text out, and the reason why it ended.

    Text that may turn out to begin a stop string, or that is part of a character, is held back.
    """

    def __init__(self, tokenizer: Tokenizer | None, row: _Row, stop_ids: tuple[int, ...]):
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = "length" if row.limit == 0 else None
        self._row = row
        self._stop_ids = () if row.sampling.ignore_eos else stop_ids
        self._decoder = tokenizer.stream() if tokenizer is not None else None
        self._held = ""

    def push(self, token: int) -> str:
        """Returns the text that is certain with `token`; the whole rest if the continuation ends with it."""
        self.tokens.append(token)
        if token in self._stop_ids:
            self.finish_reason = "eos"
        elif self._decoder is not None:
            self._held += self._decoder.push(token)
        found = [at for stop in self._row.sampling.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.finish_reason = "stop"
            return self._release(len(self._held))
        if self.finish_reason is None and len(self.tokens) == self._row.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._held += self._decoder.flush() if self._decoder is not None else ""
            return self._release(len(self._held))
        return self._release(len(self._held) - self._begun_stop())

    def completion(self, scores: list[TokenScore] | None) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            text=self.text,
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=self._row.prompt,
            logprobs=None if scores is None else tuple(scores[: len(self.tokens)]),
        )

    def _begun_stop(self) -> int:
        """How many of the last characters held may be the beginning of a stop string."""
        lengths = (
            length
            for stop in self._row.sampling.stop
            for length in range(1, min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self.text += released
        return released
