"""One accelerator for each of several processes on a machine, and the same kernels on all of them.

A process that computes with JAX takes every accelerator it sees, and most of their memory. Where several processes
serve on one machine, each leases one: it holds a lock on a file named after the device, which the system lets go when
the process dies, and sees no other device.
"""

import fcntl
import os
import tempfile
import threading
from pathlib import Path

from serve_batch.errors import JobError

ONE = "FLAXMILL_ONE_ACCELERATOR"
"""Set to 1 in the environment of a worker, or of a worker pool that starts several on a machine: each takes one."""

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_AUTOTUNE = "--xla_gpu_autotune_level"

_held: int | None = None
_leasing = threading.Lock()


def visible(devices: Path = Path("/dev")) -> list[str]:
    """Returns the names of the accelerators that this process may use, without touching them."""
    given = os.environ.get(_VISIBLE)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    numbers = (path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*"))
    return sorted((number for number in numbers if number.isdecimal()), key=int)


def lease() -> None:
    """Takes one accelerator for this process until it ends, if it has been told to and there are any.

    To be called before JAX looks for devices.

    Raises:
      JobError: other processes hold them all.
    """
    with _leasing:
        _lease()


def _lease() -> None:
    global _held
    if os.environ.get(ONE) != "1" or _held is not None:
        return
    names = visible()
    for name in names:
        descriptor = _open(Path(tempfile.gettempdir(), f"flaxmill-accelerator-{name}.lock"))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        _held = descriptor
        os.environ[_VISIBLE] = name
        return
    if names:
        raise JobError(
            f"all {len(names)} accelerators of this machine are held by other workers; run fewer of them"
        )


def pin() -> None:
    """Has XLA choose the same GPU kernels in every process: by itself it takes those that it has just found fastest.

    To be called before JAX looks for devices. Whoever sets the level in XLA_FLAGS has it as he says.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if visible() and _AUTOTUNE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_AUTOTUNE}=0".strip()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:
        # Another user's file in a sticky folder may be read, but not asked to be made.
        return os.open(path, os.O_RDONLY)
