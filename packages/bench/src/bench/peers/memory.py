"""What a process has of memory that no file backs, as Linux tells it in /proc. Standard library only."""

import contextlib
import os
import re
import select
import threading
import time
from pathlib import Path

SAMPLE_S = 0.002  # what lasts shorter is not seen; a look takes a fiftieth of it


def anonymous(pid: int) -> int | None:
    """Returns a process's anonymous bytes in memory; None if it is gone or the system does not tell."""
    return _kib(Path(f"/proc/{pid}/status"), "RssAnon")


def proportional(pid: int) -> int | None:
    """Returns a process's bytes in memory, of those that it shares with n - 1 others an n-th."""
    return _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def _kib(path: Path, key: str) -> int | None:
    with contextlib.suppress(OSError):  # the process has ended, or this is no Linux
        found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


class Sampler(threading.Thread):
    """Follows a process's anonymous memory from now until `stop`.

    A line that can be read from `mark`, a monotonic clock's nanoseconds, tells that the work begins: what came before
    is not at its peak, and what the process had then is `idle_bytes`.
    """

    def __init__(self, pid: int, *, mark: int | None = None, idle_bytes: int | None = None) -> None:
        super().__init__(daemon=True)
        self.idle_bytes, self.peak_bytes = idle_bytes, idle_bytes
        self.started_s: float | None = None
        self._pid, self._mark, self._over = pid, mark, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.is_set():
            self._look()
            if self._mark is None:
                time.sleep(SAMPLE_S)
            elif select.select([self._mark], [], [], SAMPLE_S)[0]:
                self._begin(self._mark)

    def _look(self) -> None:
        found = anonymous(self._pid)
        if found is not None:
            self.peak_bytes = max(found, self.peak_bytes or 0)

    def _begin(self, mark: int) -> None:
        self._mark = None
        if line := os.read(mark, 100):  # empty: the process has ended without a mark
            self.started_s = int(line) / 1e9
            self.idle_bytes = self.peak_bytes = anonymous(self._pid)

    def stop(self) -> None:
        self._over.set()
        self.join()
