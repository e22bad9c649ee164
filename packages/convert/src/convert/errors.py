"""The one exception of this package."""

from collections.abc import Sequence

from core.errors import FlaxmillError


class ConvertError(FlaxmillError):
    """A checkpoint that cannot be converted, in one line; `problems` holds every mismatch when there can be several.

    The line shows the first problems and counts the rest, because a wrong `n_layer` alone makes hundreds. Whatever a
    file calls its tensors or puts into its config, the line has an end, and nothing in it but text reaches a terminal.
    """

    SHOWN = 8
    LONGEST = 500, 3000  # characters of a problem, and of the line

    def __init__(self, message: str, problems: Sequence[str] = ()):
        self.summary, self.problems = message, tuple(problems)
        shown = "; ".join(_cut(text, self.LONGEST[0]) for text in self.problems[: self.SHOWN])
        rest = len(self.problems) - self.SHOWN
        if self.problems:
            message += f": {shown}" + (f"; and {rest} more" if rest > 0 else "")
        super().__init__(_printable(_cut(" ".join(message.split()), self.LONGEST[1])))


def _cut(text: str, longest: int) -> str:
    """Returns `text`, its middle left out where it is too long: what was found begins it, what to do ends it."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
