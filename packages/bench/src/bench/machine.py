"""The machine under the benchmark, in words, and how busy others keep it."""

import contextlib
import hashlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

from core import memory

BUSY = 0.1  # above this share of all cores, figures say more about the neighbours than about us


def threads() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Returns the facts that figures depend on."""
    return {
        "cpu": _cpu(),
        "threads": threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def free_memory_bytes() -> int:
    """Returns what processes can still have, the page cache given up, within the limits of a container."""
    return memory.free_on_host()


class Neighbours:
    """Measures what share of all cores others use from now on: everyone but this process and those it started."""

    def __init__(self) -> None:
        self._clock, self._others_s = time.perf_counter(), _others_s()

    def share(self) -> float:
        elapsed = time.perf_counter() - self._clock
        used_s = _others_s() - self._others_s
        return max(0.0, used_s / elapsed / (psutil.cpu_count() or 1))


def _others_s() -> float:
    """Returns the seconds of all cores spent since the start of the machine on processes that are not ours.

    Time stolen from a virtual machine is another's too.
    """
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(
        times, "guest_nice", 0.0
    )  # counted as user already
    return sum(times) - idle - guests - ours_s()


def ours_s() -> float:
    """Returns the seconds of all cores that this process and those it started have used."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # gone in the meantime
            total += sum(process.cpu_times()[:4])  # of its own, and of its children that have ended
    return total


def instructions() -> str:
    """Returns a hash of what this processor can execute: of another one, compiled code may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor() or platform.machine()]
    known = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return hashlib.sha256(" ".join(sorted(known.split())).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Returns the processor's name, with family and model where Linux tells them: clouds hide the generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"
