"""A trace of a few iterations for XProf or Perfetto, by jax.profiler."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import jax


class Profiler:
    """Traces iterations `start` to `start` + `count` - 1; leaving its context ends a trace under way.

    A run that begins later, at `first`, is traced from there on: that is what whoever resumes it is looking at.
    """

    def __init__(self, folder: Path, start: int, count: int, *, first: int = 0):
        self._folder, self._start = folder, max(start, first)
        self._end = self._start + count
        self._is_on = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, iteration: int, wait: Callable[[], None]) -> None:
        """Told before each iteration begins; `wait` returns when those that were dispatched are done."""
        if self._is_on and iteration >= self._end:
            wait()
            self._stop()
        elif iteration == self._start < self._end:
            jax.profiler.start_trace(self._folder)
            self._is_on = True

    def _stop(self) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
