"""What made a run, for whoever has to make it again: the versions, the commit, the command."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("flaxmill-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def facts() -> dict[str, Any]:
    """Returns what environment.json holds; the commit is null where this code is no checkout of git's."""
    return {
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in DISTRIBUTIONS},
    }


def _commit() -> str | None:
    """The commit that this file is of, with a + if tracked files differ from it."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
    ]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
