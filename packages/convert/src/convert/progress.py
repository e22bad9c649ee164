"""The progress bars of this package, on stderr: bytes done, or steps where there are only a few long ones."""

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def bar(verb: str, total_bytes: int, quiet: bool | None) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told of every byte done; `quiet=None` shows the bar on a terminal only."""
    with tqdm(total=total_bytes, desc=verb, unit="B", unit_scale=True, disable=quiet) as shown:

        def advance(nbytes: int) -> None:
            shown.update(nbytes)

        yield advance


@contextlib.contextmanager
def steps(verb: str, total: int, quiet: bool | None) -> Iterator[Callable[[], None]]:
    """Gives a function to be called after every step; the bar shows when the first two seconds are over."""
    with tqdm(total=total, desc=verb, unit="step", delay=2, disable=quiet) as shown:

        def advance() -> None:
            shown.update()

        yield advance
