"""A continuation as it grows: tokens in, text out, and the reason why it ended."""

from collections.abc import Sequence

from core.requests import Completion, FinishReason, TokenScore
from core.tokenizer import Tokenizer


class Continuation:
    """Text that may turn out to begin a stop string, or that is part of a character, is held back.

    Args:
      tokenizer: None gives no text.
      prompt: the tokens that are continued.
      limit: how many tokens there may be.
      stop: strings that end the text, and are not part of it.
      stop_ids: tokens that end it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: tuple[int, ...],
        *,
        limit: int,
        stop: Sequence[str],
        stop_ids: Sequence[int],
    ):
        self.prompt = prompt
        self.tokens: list[int] = []
        self.scores: list[TokenScore] = []
        self.text = ""
        self.finish_reason: FinishReason | None = "length" if limit == 0 else None
        self._limit, self._stop, self._stop_ids = limit, stop, stop_ids
        self._decoder = tokenizer.stream() if tokenizer is not None else None
        self._held = ""

    def push(self, token: int) -> str:
        """Returns the text that is certain with `token`; the whole rest if the continuation ends with it."""
        self.tokens.append(token)
        if token in self._stop_ids:
            self.finish_reason = "eos"
        elif self._decoder is not None:
            self._held += self._decoder.push(token)
        if found := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            self._held = self._held[: min(found)]
            self.finish_reason = "stop"
            return self._release(len(self._held))
        if self.finish_reason is None and len(self.tokens) == self._limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._held += self._decoder.flush() if self._decoder is not None else ""
            return self._release(len(self._held))
        return self._release(len(self._held) - self._begun_stop()) if self._held else ""

    def cancel(self) -> None:
        """Ends the continuation where it stands; a half character is no text."""
        self.finish_reason = "cancelled"
        self._release(len(self._held))

    def completion(self, *, with_scores: bool) -> Completion:
        """Returns the whole, once it has ended."""
        assert self.finish_reason is not None
        return Completion(
            text=self.text,
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt,
            logprobs=tuple(self.scores) if with_scores else None,
        )

    def _begun_stop(self) -> int:
        """How many of the last characters held may be the beginning of a stop string."""
        if not self._stop:
            return 0
        lengths = (
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self.text += released
        return released
