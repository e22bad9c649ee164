"""How much memory is left where arrays go."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


class _Names(NamedTuple):
    """What a version of Linux's control groups calls the limit, the use, and what of that only caches files."""

    limit: str
    used: str
    caches: tuple[str, str]


_V1 = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def free(device: Any) -> int | None:
    """Returns the bytes that `device` has left for arrays; None if it does not say."""
    if device.platform == "cpu":
        return free_on_host()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def free_on_host(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Returns the bytes that this process may still take: of the machine's, and within the limits of its containers.

    What only caches files counts as free, in both.
    """
    rooms = [_room(folder, names) for folder, names in _folders(cgroups, own)]
    known = [room for room in rooms if room is not None]
    return max(0, min([psutil.virtual_memory().available, *known]))


def _folders(cgroups: Path, own: Path) -> Iterator[tuple[Path, _Names]]:
    """Yields the control groups that this process is in, the innermost first, as far as they can be seen from here.

    In a container the names may be those outside of it: then there is only what is mounted.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            root, names = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", _V1
        else:
            continue
        inner = root / name.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, names
            if folder == root:
                break


def _room(folder: Path, names: _Names) -> int | None:
    """Returns what is left of a control group's limit; None if it has none or cannot be read."""
    try:
        limit, used = (int((folder / name).read_text()) for name in (names.limit, names.used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + sum(int(stat.get(name, 0)) for name in names.caches)
    except (OSError, ValueError):  # "max" is no number: no limit
        return None


def spell(nbytes: int) -> str:
    """Returns a number of bytes for people to read.

    >>> spell(1_234_567_890)
    '1.23 GB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"
