"""What stops a job; what is wrong with a row is a record instead."""

from core.errors import FlaxmillError


class JobError(FlaxmillError):
    """A job that cannot go on: what was found, what was expected, what to do next."""


class UsageError(FlaxmillError, ValueError):
    """Arguments that cannot be; nothing has been touched."""


def told(doing: str, error: Exception) -> str:
    """Returns in one line what failed, and why, for a launcher that hears of it from a worker."""
    what = str(error) if isinstance(error, FlaxmillError) else f"{type(error).__name__}: {error}"
    return f"{doing} failed: {' '.join(what.split())}"
