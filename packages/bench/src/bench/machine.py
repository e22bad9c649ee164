"""The machine under the benchmark, in words, and how busy others keep it."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil

BUSY = 0.1  # above this share of all cores, figures say more about the neighbours than about us


def threads() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Returns the facts that figures depend on. Takes a second, to see how busy the cores are without us."""
    return {
        "cpu": _cpu(),
        "threads": threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "busy_before": psutil.cpu_percent(interval=1.0) / 100,
    }


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
