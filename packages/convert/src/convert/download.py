"""Transfers that survive: bytes that arrived are kept, and the next attempt asks only for the rest.

Plain HTTP through `huggingface_hub`'s client, which honours proxies and the system's certificates. Whose files they
are, and what proves that they are right, is for `hub` and `openai` to know.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from convert.errors import ConvertError

TIMEOUT_S = 10.0
"""How long a server may take to begin an answer before it counts as out of reach."""


class Unreachable(ConvertError):
    """A server that does not answer: no network, a closed one, or a server that is down."""


def fetch(
    url: str, partial: Path, size: int, *, name: str, headers: Mapping[str, str] | None = None
) -> None:
    """Downloads to `partial`, from where it ends, for as long as every attempt brings some bytes.

    Raises:
      Unreachable: an attempt brought nothing; what is there is kept.
      ConvertError: another number of bytes than `size` arrived; they are deleted.
    """
    from huggingface_hub.file_download import http_get

    asked = {**(headers or {}), "Accept-Encoding": "identity"}
    while True:
        start = partial.stat().st_size if partial.exists() else 0
        if start > size:
            partial.unlink()
            start = 0
        try:
            with partial.open("ab", buffering=0) as file:
                if start < size:
                    http_get(url, file, resume_size=start, headers=asked, displayed_filename=name)
            break
        except http_error() as error:  # some of which are OSErrors too
            kept = partial.stat().st_size
            if kept <= start:
                raise Unreachable(
                    f"{name}: the connection broke ({reason(error)}); {kept:,} of {size:,} bytes are kept, "
                    "run this again to resume"
                ) from error
        except OSError as error:
            if error.errno is not None:
                raise
            break  # the library counted the bytes and did not find what the answer promised
    if (found := partial.stat().st_size) != size:
        partial.unlink()
        raise ConvertError(
            f"{name}: {found:,} bytes arrived of {size:,} that {url} should have; "
            "they were deleted, run this again"
        )


def http_error() -> type[Exception]:
    """Returns the base of all transport errors of the HTTP library that this `huggingface_hub` uses."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]


def reason(error: BaseException) -> str:
    """Returns an error's type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def muted(quiet: bool | None) -> Iterator[None]:
    """Silences the library's warnings (our errors say what matters) and, if `quiet`, its progress bars."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, shown = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if quiet and shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if quiet and shown:
            enable_progress_bars()
