"""llama.cpp as a peer: one thread, and in float32 whatever can be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

F32 = 0  # ggml's number of the type, for keys and values


class Llama:
    """One GGUF file in llama.cpp."""

    def __init__(self, llama: Any):
        self._llama = llama

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits_TV of a sequence, in one batch."""
        self._llama.reset()
        self._llama.eval(list(tokens))
        return np.array(self._llama.scores[: len(tokens)])

    def continued(self, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
        """The `count` likeliest tokens, one by one through the cache, and the logits_TV that they were taken from."""
        self._llama.reset()
        self._llama.eval(list(prompt))
        tokens, logits = [], []
        for _ in range(count):
            logits.append(np.array(self._llama.scores[self._llama.n_tokens - 1]))
            tokens.append(int(logits[-1].argmax()))
            self._llama.eval(tokens[-1:])
        return tokens, np.stack(logits)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it recognised."""
        return self._llama.tokenize(text.encode(), add_bos=True, special=True)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of ids, special tokens written out."""
        return self._llama.detokenize(list(tokens), special=True)

    @property
    def eos_id(self) -> int:
        """The token that ends a text, -1 if none does."""
        return self._llama.token_eos()


@contextmanager
def opened(path: Path, context: int = 256) -> Iterator[Llama]:
    """Gives the file at `path` in llama.cpp; skips the test where there is no llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp could not be built here")
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        yarn_attn_factor=-1,  # as the file says, and not as this package would have it
        yarn_beta_fast=-1,
        yarn_beta_slow=-1,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    try:
        yield Llama(llama)
    finally:
        llama.close()
