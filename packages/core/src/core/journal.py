"""Which tensors of an unfinished folder are finished: one JSON object a line, appended when a tensor is written.

A journal is a claim, not a proof: a power cut may keep a line and lose the bytes it tells of. Whoever reads it hashes
them again.
"""

import errno
import json
import os
import threading
from collections.abc import Mapping
from typing import Any


class Journal:
    """A journal in an open file that this process alone writes; its threads may append at the same time."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def entries(self) -> dict[str, Mapping[str, Any]]:
        """Returns the last line about every tensor, by name. Lines that are damaged are as if they were not there.

        A last line without an end is cut off, so that the next one has a line of its own.
        """
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        whole = content[: content.rfind(b"\n") + 1]
        os.ftruncate(self._descriptor, len(whole))
        entries = (_entry(line) for line in whole.split(b"\n"))
        return {entry["name"]: entry for entry in entries if entry is not None}

    def append(self, **entry: Any) -> None:
        """Appends a line, which outlives this process however it ends."""
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def clear(self) -> None:
        """Removes every line."""
        os.ftruncate(self._descriptor, 0)


def _entry(line: bytes) -> Mapping[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("name"), str) else None
