"""What stops a job; what is wrong with a row is a record instead."""

from core.errors import FlaxmillError


class JobError(FlaxmillError):
    """A job that cannot go on: what was found, what was expected, what to do next."""


class Unreachable(JobError):
    """Something outside could not be read or written; the same may work the next time."""


class UsageError(FlaxmillError, ValueError):
    """Arguments that cannot be; nothing has been touched."""


KEPT = "finished shards are kept: run the same command again to go on"
"""What to do next, where the error does not say."""


def told(doing: str, error: Exception) -> str:
    """Returns in one line what failed, why, and what to do next, for a launcher that hears of it from a worker."""
    is_ours = isinstance(error, FlaxmillError)
    what = str(error) if is_ours else f"{type(error).__name__}: {error}"
    line = f"{doing} failed: {' '.join(what.split())}"
    return line if is_ours and not isinstance(error, Unreachable) else f"{line}; {KEPT}"
