"""Where compiled programs are kept between runs, so that a second start does not compile."""

import functools
import hashlib
import os
import platform
from pathlib import Path

import jax

_WORTH_KEEPING_S = 0.1  # of compilation


def keep(where: str = "auto") -> None:
    """Lets JAX keep compiled programs on the disk, unless the environment says already where (or `where` is "off").

    Args:
      where: "off", a folder, or "auto" for one in the user's cache, if it can be written to. Programs for a CPU are for
        that very kind, so its name is part of the latter's path.
    """
    if where == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = _own() if where == "auto" else where
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_S)


def _own() -> Path | None:
    """Returns a folder in the user's cache; None where nothing can be written to it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    folder = home / "flaxmill" / "compiled" / _kind_of_machine()
    if not folder.is_absolute():  # no home, or a path that the standard ignores
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


@functools.cache
def _kind_of_machine() -> str:
    """A name that is the same where a processor has the same instructions."""
    said = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(said.encode()).hexdigest()[:12]
