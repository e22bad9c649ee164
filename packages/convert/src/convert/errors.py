"""The one exception of this package."""

from collections.abc import Sequence

from core.errors import FlaxmillError


class ConvertError(FlaxmillError):
    """A checkpoint that cannot be converted, in one line; `problems` holds every mismatch when there can be several.

    The line shows the first problems and counts the rest, because a wrong `n_layer` alone makes hundreds.
    """

    SHOWN = 8

    def __init__(self, message: str, problems: Sequence[str] = ()):
        self.summary, self.problems = message, tuple(problems)
        shown = "; ".join(self.problems[: self.SHOWN])
        rest = len(self.problems) - self.SHOWN
        if self.problems:
            message += f": {shown}" + (f"; and {rest} more" if rest > 0 else "")
        super().__init__(" ".join(message.split()))
