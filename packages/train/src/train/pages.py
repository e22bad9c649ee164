"""Huge pages for what XLA computes in on a CPU, which it asks the C library for anew in every update and gives back.

In pages of 4 KB the system has to find and clear half a million for an update of GPT-2 124M: a sixth of its time, of a
small model's a third (docs/log.md). glibc asks for pages of 2 MB if it is told to as a program starts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_again_with_huge() -> None:
    """Returns if there is nothing to be gained, else starts this very program again, with its arguments."""
    tunables = wanted(os.environ, _mode())
    if tunables is not None:
        os.environ[_TUNABLES] = tunables
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def wanted(environment: Mapping[str, str], mode: str) -> str | None:
    """Returns what GLIBC_TUNABLES should be; None where the user has decided, or the system gives none when asked."""
    given = environment.get(_TUNABLES, "")
    if _HUGE in given or "[madvise]" not in mode:
        return None
    return ":".join(filter(None, [given, f"{_HUGE}=1"]))


def _mode() -> str:
    try:
        return _MODE.read_text()
    except OSError:
        return ""
