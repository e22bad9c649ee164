"""The generation engine: prompts in, continuations out. It sees token ids; text is a matter of the last few lines.

Prefill and the whole decode loop are one jit. Requests run in groups that share their static shapes: the
number of slots, the prefill bucket and the cache length, and those of a request follow from its own length alone. So a
continuation does not depend on its neighbours, on the order of the requests or on how many there are. Random draws
depend on the seed, the request's id and the token's position.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from core import decode
from core import sampling as sampling_lib
from core.decode import Inputs, Scores, Shape, Statics
from core.errors import RequestError as RequestError
from core.errors import TokenizerError
from core.models import Model, Params
from core.sampling import Sampler, Sampling, Settings
from core.tokenizer import Tokenizer

FinishReason = Literal["eos", "length", "stop"]

SMALLEST_PREFILL = 16
SMALLEST_CACHE = 64
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
        stops = set(config.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_id is not None:
            stops.add(tokenizer.eos_id)
        self._statics = Statics(
            model=model,
            sampler=sampler,
            dtype=jnp.dtype(dtype or params["wte"]["embedding"].dtype),
            stop_ids=tuple(sorted(stops)),
            # A padded vocabulary has rows that no tokenizer can read; they are never sampled.
            vocab_size=min(
                config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size
            ),
            missing_ids=tokenizer.missing_ids if tokenizer else (),
        )

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

    def complete(self, requests: Sequence[Request]) -> list[Completion | RequestError]:
        """Returns one result a request, in order; a request that cannot be served gives its error as a value."""
        results: dict[int, Completion | RequestError] = {}
        groups: dict[tuple[int, int, int, bool], list[_Row]] = {}
        for index, request in enumerate(requests):
            try:
                row = self._row(index, request)
            except RequestError as error:
                results[index] = error
            else:
                groups.setdefault(row.group, []).append(row)
        for _, rows in sorted(groups.items()):
            for start in range(0, len(rows), self.slots):
                batch = rows[start : start + self.slots]
                for row, completion in zip(batch, self._run(batch), strict=True):
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
        chosen_T, ids_TK, values_TK = decode.score(
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
        if request.sampling.stop and self.tokenizer is None:
            raise RequestError(
                "tokenizer_missing", "stop strings need a tokenizer; this model has none"
            )
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
        if len(tokens) > config.context_length:
            raise RequestError(
                "prompt_too_long",
                f"the prompt has {len(tokens)} tokens; the model's context is {config.context_length}",
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
        limit = min(sampling.max_new_tokens, self.model.config.context_length - len(prompt) + 1)
        shape = Shape(
            prefill=self._bucket(len(prompt), SMALLEST_PREFILL),
            cache=self._bucket(len(prompt) + max(limit, 1) - 1, SMALLEST_CACHE),
            logprobs=None if sampling.logprobs is None else self._at_most_all(sampling.logprobs),
        )
        id_ = str(index) if request.id is None else request.id
        return _Row(index, id_, prompt, sampling, limit, shape)

    def _at_most_all(self, alternatives: int) -> int:
        return min(alternatives, self.model.config.vocab_size)

    def _bucket(self, length: int, smallest: int) -> int:
        bucket = smallest
        while bucket < length:
            bucket *= 2
        return min(bucket, self.model.config.context_length)

    def _run(self, rows: "Sequence[_Row]") -> list[Completion]:
        """Returns the completions of rows of one group, at most as many as there are slots."""
        inputs = _inputs(rows, self.slots)
        steps = STOP_CHECK_STEPS if rows[0].sampling.stop else max(row.limit for row in rows)
        state = decode.start(self._statics, rows[0].shape, self.params, inputs, steps)
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
            state = decode.go_on(self._statics, self.params, inputs, state, steps)
        scores = None if state.scores is None else _host_scores(state.scores, out_BM)
        return [
            text.completion(None if scores is None else scores[slot])
            for slot, text in enumerate(texts)
        ]

    def _stream(self, row: "_Row") -> Iterator[Event]:
        text = _Text(self.tokenizer, row, self._statics.stop_ids)
        if text.finish_reason is not None:
            yield Event(None, "", text.finish_reason)
            return
        inputs = _inputs([row], 1)
        state = decode.start(self._statics, row.shape, self.params, inputs, 1)
        while True:
            out_M, produced = np.asarray(state.out_BM)[0], int(state.produced_B[0])
            for token in out_M[len(text.tokens) : produced].tolist():
                yield Event(token, text.push(token), text.finish_reason)
                if text.finish_reason is not None:
                    return
            state = decode.go_on(self._statics, self.params, inputs, state, STREAM_STEPS)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request that has been checked."""

    index: int
    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    limit: int
    shape: Shape

    @property
    def group(self) -> tuple[int, int, int, bool]:
        """Rows of one group run together."""
        logprobs = -1 if self.shape.logprobs is None else self.shape.logprobs
        return self.shape.prefill, self.shape.cache, logprobs, bool(self.sampling.stop)

    @property
    def key_words(self) -> tuple[int, ...]:
        """The four 32-bit words that its random key is folded from: two of the seed, two of the id."""
        digest = hashlib.sha256(self.id.encode("utf-8", "surrogatepass")).digest()
        seed = self.sampling.seed.to_bytes(8, "little")
        return tuple(np.frombuffer(seed + digest[:8], "<u4").tolist())


def _inputs(rows: Sequence[_Row], slots: int) -> Inputs:
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
    return Inputs(
        prompt_BT=jnp.asarray(prompt_BT),
        length_B=jnp.asarray(length_B),
        limit_B=jnp.asarray(limit_B),
        ignore_eos_B=jnp.asarray(ignore_eos_B),
        key_words_B4=jnp.asarray(key_words_B4),
        settings=Settings.of([row.sampling for row in rows] + spare),
    )


def _host_scores(scores: Scores, out_BM: np.ndarray) -> list[list[TokenScore]]:
    chosen, ids, values = (np.asarray(x).tolist() for x in scores)
    return [
        [
            TokenScore(token, chosen[b][m], tuple(zip(ids[b][m], values[b][m], strict=True)))
            for m, token in enumerate(tokens)
        ]
        for b, tokens in enumerate(out_BM.tolist())
    ]


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
