"""The memory that XLA computes in on a CPU: it asks the C library for it in every update anew, and gives it back.

In pages of 4 KB the system has to find and clear half a million for an update of GPT-2 124M: a sixth of its time, of a
small model's a third (docs/log.md). So what is small enough is kept, and glibc asks for pages of 2 MB if it is told to
as a program starts.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h
_BLOCK, _KEPT = 2**28, 2**29  # as glibc has it for smaller ones: twice the largest block


def keep() -> None:
    """Has the C library keep what this process gives back, up to 512 MB, instead of asking the system for it again.

    That is for blocks of up to 256 MB, in other threads than the first of up to 64 MB.
    """
    with contextlib.suppress(AttributeError):  # another C library, which has other ways
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _BLOCK)
        mallopt(_TRIM_THRESHOLD, _KEPT)


def start_again_with_huge() -> None:
    """Returns if there is nothing to be gained, else starts this very program again, with its arguments."""
    asked = tunables(os.environ)
    if asked is not None:
        os.environ[TUNABLES] = asked
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def tunables(environment: Mapping[str, str]) -> str | None:
    """Returns what GLIBC_TUNABLES should be on this system; None where there is nothing to be gained by it."""
    return wanted(environment, _mode())


def wanted(environment: Mapping[str, str], mode: str) -> str | None:
    """Returns what GLIBC_TUNABLES should be; None where the user has decided, or the system gives none when asked."""
    given = environment.get(TUNABLES, "")
    if _HUGE in given or "[madvise]" not in mode:
        return None
    return ":".join(filter(None, [given, f"{_HUGE}=1"]))


def _mode() -> str:
    try:
        return _MODE.read_text()
    except OSError:
        return ""
