"""How much memory is left where arrays go."""

from typing import Any

import psutil


def free(device: Any) -> int | None:
    """Returns the bytes that `device` has left for arrays; None if it does not say."""
    if device.platform == "cpu":
        return psutil.virtual_memory().available
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def spell(nbytes: int) -> str:
    """Returns a number of bytes for people to read.

    >>> spell(1_234_567_890)
    '1.23 GB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"
