"""What goes into the generation engine and what comes out of it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from core.errors import RequestError
from core.sampling import Sampling

FinishReason = Literal["eos", "length", "stop", "cancelled"]

DEFAULT_SAMPLING = Sampling()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, as text or as token ids; `id` is what its random draws depend on (by default its index).

    A number is the same id as its digits.
    """

    prompt: str | Sequence[int]
    sampling: Sampling = DEFAULT_SAMPLING
    id: str | int | None = None


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
    """One token of a request, the text that it makes certain, and with the last one the result.

    `request` is the ticket that `Engine.submit` gave, or the request's place in the call. A request that produces
    nothing, or cannot be served, has one event without a token.
    """

    request: int
    token: int | None
    text: str
    result: Completion | RequestError | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None while it goes on, and for an error."""
        return self.result.finish_reason if isinstance(self.result, Completion) else None
