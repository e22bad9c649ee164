"""The cache of prompts' beginnings: what many prompts have in common is fed once.

A prompt goes in by chunks of a fixed size, so what a whole chunk leaves in the cache depends on the tokens up to its
end and on nothing else, and putting it there again is the same to the last bit as feeding it. Only a beginning that
comes a second time is kept, and of those the ones used last.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

from core.kv_cache import KVCache

_REMEMBERED = 100_000  # beginnings that came once


class Prefixes:
    """What whole chunks leave in a slot's cache, by the tokens up to their end.

    Args:
      size: tokens a chunk.
      chunk_nbytes: what it leaves.
      limit: bytes to keep at most; less than one chunk keeps nothing.
    """

    def __init__(self, size: int, chunk_nbytes: int, limit: int):
        self.size, self.nbytes = size, 0
        self.limit = limit if limit >= chunk_nbytes else 0
        self._kept: collections.OrderedDict[bytes, KVCache] = collections.OrderedDict()
        self._once: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    def find(self, prompt: Sequence[int], start: int) -> KVCache | None:
        """Returns what the whole chunk from `start` on leaves; None if that is not known or is the prompt's last.

        The last token has to be fed, because the first draw is made from what the model says after it.
        """
        if not self.limit or start + self.size >= len(prompt):
            return None
        key = self._key(prompt, start)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def wants(self, prompt: Sequence[int], start: int) -> bool:
        """Whether the chunk from `start` on, which has just been fed, has come before and is not kept."""
        if not self.limit or start + self.size > len(prompt):
            return False
        key = self._key(prompt, start)
        if key in self._kept:
            return False
        known = key in self._once
        self._once[key] = None
        if len(self._once) > _REMEMBERED:
            self._once.popitem(last=False)
        return known

    def keep(self, prompt: Sequence[int], start: int, chunk: KVCache) -> None:
        """Keeps what the chunk from `start` on left, and forgets what was not used for longest."""
        self._kept[self._key(prompt, start)] = chunk
        self.nbytes += _nbytes(chunk)
        while self.nbytes > self.limit and self._kept:
            _, forgotten = self._kept.popitem(last=False)
            self.nbytes -= _nbytes(forgotten)

    def _key(self, prompt: Sequence[int], start: int) -> bytes:
        tokens = np.asarray(prompt[: start + self.size], np.int32)
        return hashlib.sha256(tokens.tobytes()).digest()


def _nbytes(chunk: KVCache) -> int:
    return sum(x.nbytes for x in (*chunk.k_RKSH, *chunk.v_RKSH))
