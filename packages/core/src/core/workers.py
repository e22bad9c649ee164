"""A few threads over many pieces of work; the first that fails stops the others.

Threads pay for hashing, for NumPy on large arrays, and for reading and writing files: all of these let other threads
run meanwhile. Pieces of work know nothing of each other, and what comes out is the same for any number of threads.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

COUNT = min(4, os.cpu_count() or 1)
"""As many threads as pay: beyond a few, the memory and the disk are what is waited for."""


class Stopped(Exception):
    """Raised by a piece of work that ends early because nobody waits for its result any more."""


def each(
    work: Callable[[Item, threading.Event], Result], items: Sequence[Item], *, threads: int
) -> list[Result]:
    """Returns what `work` gives for each item, in the order of `items`; they are begun in that order.

    When one raises, or this thread is interrupted, the event that all are given is set and those not begun are
    dropped; the error goes on as soon as those under way have ended, so `work` looks at the event now and then.
    """
    stop = threading.Event()
    if threads == 1:
        return [work(item, stop) for item in items]

    failures: list[BaseException] = []  # the first is the cause, the others may only be stopped

    def begin(item: Item) -> Result:
        if stop.is_set():
            raise Stopped
        try:
            return work(item, stop)
        except BaseException as error:
            failures.append(error)
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(begin, item) for item in items]
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, Stopped):
                raise failures[0] from None
            raise
    return [future.result() for future in futures]


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], Result]) -> Iterator[Callable[[], Result]]:
    """Runs `work` on a thread of its own and gives a function that waits for its result.

    At the end of the block the event that `work` was given is set, and its end is waited for.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, stop)
        try:
            yield future.result
        finally:
            stop.set()
