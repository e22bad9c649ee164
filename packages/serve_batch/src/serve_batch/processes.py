"""`--workers=N`: shards are done by processes of this machine, without Beam between.

The launcher hands out shard numbers over a pipe to each worker and gets them back done. Beam's own worker processes
are not used: their runner waits without end for one that was killed. Here a pipe that breaks is a worker that died, and
its shards go to the others; and it is a launcher that died, and the worker ends. A worker of which nothing is heard,
not even that it lives, is killed: it was stopped, or the machine does not let it run.
"""

import collections
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from serve_batch import devices, errors
from serve_batch.errors import KEPT, JobError, UsageError

if TYPE_CHECKING:
    from serve_batch.shards import Job, Work

SHARDS_AT_ONCE = 2
"""Shards that a worker is given: the second fills the slots that the end of the first leaves free."""

_DEATHS = 2
"""Workers that a shard may cost before it is held to be the cause."""

_SILENCE_S = 600.0
_BEATS = 20
"""How often a worker says that it lives in the time after which it is held to be dead."""


def check(workers: int) -> None:
    """Raises UsageError where there are accelerators, but not one for each worker."""
    there = len(devices.visible())
    if 0 < there < workers:
        raise UsageError(f"workers is {workers}; this machine has accelerators for {there}")


def generate(job: "Job", shards: Iterable[int], workers: int) -> None:
    """Does `shards` in up to `workers` processes; all of them have ended when this returns or raises.

    Raises:
      JobError: a shard cannot be done, or no worker is left to do it.
    """
    todo = collections.deque(shards)
    deaths: collections.Counter[int] = collections.Counter()
    with _crew(job, min(workers, len(todo))) as crew:
        heard = time.monotonic()
        while True:
            for worker in crew * SHARDS_AT_ONCE:  # each one, then each a second one
                worker.take_from(todo)
            busy = [worker for worker in crew if worker.shards]
            if not busy:
                return
            ready = connection.wait([worker.pipe for worker in busy], _SILENCE_S / _BEATS)
            waited, heard = time.monotonic() - heard, time.monotonic()
            for worker in busy:
                try:
                    if worker.pipe in ready:
                        worker.hear()
                    else:
                        worker.miss(waited)
                except (EOFError, OSError):
                    crew.remove(worker)
                    _give_back(worker, todo, deaths, left=len(crew))


def _give_back(
    worker: "_Worker", todo: collections.deque[int], deaths: collections.Counter[int], *, left: int
) -> None:
    """Puts the shards of a worker that died back in line; raises JobError where that would not help."""
    how = worker.end()
    deaths.update(worker.shards)
    if not left:
        raise JobError(f"the last of the worker processes {how}; {KEPT}")
    if worker.shards and max(deaths[shard] for shard in worker.shards) >= _DEATHS:
        numbers = " or ".join(map(str, worker.shards))
        raise JobError(
            f"a worker process {how}, as another before it; shard {numbers} may be the cause; {KEPT}"
        )
    logging.getLogger(__name__).warning("a worker process %s; %d go on without it", how, left)
    todo.extendleft(reversed(worker.shards))


class _Worker:
    """A worker process as the launcher sees it."""

    def __init__(self, job: "Job"):
        self.shards: list[int] = []
        self._silence_s = 0.0
        self.pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    __name__,
                    str(theirs.fileno()),
                    str(_SILENCE_S / _BEATS),
                ],
                env=os.environ | {devices.ONE: "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt at the terminal is the launcher's to hear
            )
        with contextlib.suppress(OSError):  # dead already; it is noticed when it is listened to
            self.pipe.send(job)

    def take_from(self, todo: collections.deque[int]) -> None:
        if todo and len(self.shards) < SHARDS_AT_ONCE:
            self.shards.append(todo.popleft())
            with contextlib.suppress(OSError):
                self.pipe.send(self.shards[-1])

    def hear(self) -> None:
        """Takes in what it says: that it lives, a shard that is done, or why one cannot be.

        Raises:
          EOFError, OSError: it is dead.
          JobError: what it said.
        """
        said = self.pipe.recv()
        if isinstance(said, str):
            raise JobError(said)
        self._silence_s = 0.0
        if said is not None:
            self.shards.remove(said)

    def miss(self, waited_s: float) -> None:
        """Takes in that it said nothing for that long.

        Raises:
          TimeoutError: it is held to be dead.
        """
        # If the launcher was stopped itself, that counts for no more than a beat.
        self._silence_s += min(waited_s, _SILENCE_S / _BEATS)
        if self._silence_s > _SILENCE_S:
            raise TimeoutError

    def end(self) -> str:
        """Kills it, and returns how it ended if it had before."""
        self._process.kill()
        self.pipe.close()
        code = self._process.wait()
        if self._silence_s > _SILENCE_S:
            return f"was killed, as nothing was heard of it for {_SILENCE_S:.0f} s"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


@contextlib.contextmanager
def _crew(job: "Job", count: int) -> Iterator[list[_Worker]]:
    """Yields so many workers, and leaves none behind, nor a file that one had begun."""
    crew: list[_Worker] = []
    started: list[_Worker] = []
    try:
        for _ in range(count):
            started.append(_Worker(job))
        crew.extend(started)
        yield crew
    except BaseException:
        for worker in started:
            worker.end()
        job.output.remove_leftovers()
        raise
    for worker in started:
        worker.end()
    if len(crew) < len(started):
        job.output.remove_leftovers()


def _main(descriptor: int, beat_s: float) -> None:
    """A worker process: shard numbers come in, and go back when they are done."""
    launcher: Connection = Connection(descriptor)
    job: Job = launcher.recv()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    saying = threading.Lock()
    with contextlib.suppress(OSError):
        launcher.send(None)  # before a thread can fail, and holds `saying` for good
    threading.Thread(target=_beat, args=(launcher, saying, beat_s), daemon=True).start()
    threading.Thread(target=_start, args=(job, todo, launcher, saying), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the launcher has what it wants, or is dead
        while True:
            todo.put(launcher.recv())
    os._exit(0)


def _beat(launcher: Connection, saying: threading.Lock, every_s: float) -> None:
    """Says again and again that this process lives, until the launcher is gone."""
    with contextlib.suppress(OSError):
        while True:
            with saying:
                launcher.send(None)
            time.sleep(every_s)


def _start(
    job: "Job", todo: "queue.SimpleQueue[int]", launcher: Connection, saying: threading.Lock
) -> None:
    with _telling("starting a worker", launcher, saying):
        work = job.start()
    for _ in range(SHARDS_AT_ONCE):
        threading.Thread(target=_work, args=(work, todo, launcher, saying), daemon=True).start()


def _work(
    work: "Work", todo: "queue.SimpleQueue[int]", launcher: Connection, saying: threading.Lock
) -> None:
    from serve_batch import shards

    while True:
        number = todo.get()
        with _telling(f"shard {number}", launcher, saying):
            shards.generate(work.plan.shards[number], work)
        with saying:
            launcher.send(number)


@contextlib.contextmanager
def _telling(doing: str, launcher: Connection, saying: threading.Lock) -> Iterator[None]:
    """Tells the launcher what is raised, which ends the job and with it this process."""
    try:
        yield
    except Exception as error:
        with saying:
            launcher.send(errors.told(doing, error))
            threading.Event().wait()


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]))
