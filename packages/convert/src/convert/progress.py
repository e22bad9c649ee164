"""The one progress bar of this package: bytes done, on stderr."""

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
