"""OpenAI's own GPT-2 by name: the TensorFlow checkpoints, from the address at which they were published.

They are files that never change, so what was downloaded once is used without asking again. It lies in the user's cache,
$XDG_CACHE_HOME/flaxmill/gpt-2/NAME, as the hub's downloads lie in theirs: every working folder shares it, and
models/src/NAME stays the place for what somebody has put there by hand. FLAXMILL_GPT2_URL is the address of a mirror.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from convert import download, hub, sources
from convert.errors import ConvertError
from convert.sources import tf_bundle

MODELS = ("124M", "355M", "774M", "1558M")
"""The names, which count millions of parameters: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
HPARAMS = tf_bundle.HPARAMS
WEIGHTS = "model.ckpt.data-00000-of-00001"
INDEX = "model.ckpt.index"
COMPANIONS = ("checkpoint", HPARAMS, INDEX, "encoder.json", "vocab.bpe")
"""All but the weights. The seventh published file, model.ckpt.meta, is a graph that only TensorFlow needs."""


def check_revision(name: str, revision: str | None) -> None:
    """Raises ConvertError if a revision is asked for: OpenAI published each model once."""
    if revision is not None:
        raise ConvertError(
            f"revision {revision!r} pins a download from the hub; {name} is OpenAI's own and has none"
        )


def origin(name: str) -> dict[str, str]:
    """Returns what a manifest says of where the weights come from."""
    return {"url": f"{_base()}/{name}"}


def fetch_companions(name: str, *, quiet: bool | None = None) -> Path:
    """Downloads all but the weights of a model where they are not cached; returns the folder.

    Raises:
      ConvertError: no network, or not the files that were expected.
    """
    folder = _cache() / name
    for file in COMPANIONS:
        _fetch(name, file, quiet)
    return folder


def fetch_weights(name: str, *, quiet: bool | None = None) -> None:
    """Downloads the weights behind `fetch_companions` where they are not cached, resuming an earlier attempt.

    Every tensor's sum is checked before the file takes its name.

    Raises:
      ConvertError: the connection stays broken, or what arrived is not what the index says; that is deleted.
    """
    _fetch(name, WEIGHTS, quiet)


def weights_size(name: str) -> int:
    """Returns the bytes of the weights: of the cached file, or as the server says."""
    weights = _cache() / name / WEIGHTS
    if weights.is_file():
        return weights.stat().st_size
    with _explained(name):
        return _size(f"{_base()}/{name}/{WEIGHTS}")


def _fetch(name: str, file: str, quiet: bool | None) -> None:
    """Puts one published file into the cache, unless it is there."""
    from huggingface_hub.utils import WeakFileLock

    path = _cache() / name / file
    if path.is_file():
        return
    url = f"{_base()}/{name}/{file}"
    with _explained(name), download.muted(quiet):
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f"{file}.lock")):
            if not path.is_file():
                partial = path.with_name(f"{file}.incomplete")
                download.fetch(url, partial, _size(url), name=f"{name}/{file}")
                _check(file, partial)
                partial.rename(path)


def _size(url: str) -> int:
    """Returns the size of the file at `url`, with one request."""
    from huggingface_hub import get_session

    answer = get_session().head(
        url, headers={"Accept-Encoding": "identity"}, timeout=download.TIMEOUT_S
    )
    if answer.status_code >= 500:
        raise download.Unreachable(f"{url} is down ({answer.status_code})")
    size = answer.headers.get("Content-Length", "")
    if answer.status_code != 200 or not size.isdecimal():
        raise ConvertError(
            f"{url}: expected a file and its size, found status {answer.status_code}"
        )
    return int(size)


def _check(file: str, arrived: Path) -> None:
    """Deletes a download that is not what was published: a proxy's page, or a tensor without its sum."""
    try:
        if file == WEIGHTS:
            tf_bundle.check_data(arrived.with_name(INDEX), arrived)
        elif file == INDEX:
            tf_bundle.read_index(arrived)
        elif file.endswith(".json"):
            sources.read_json(arrived)
    except ConvertError as error:
        arrived.unlink()
        raise ConvertError(f"{error.summary}; the download was deleted, run this again") from error


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of the network and the disk into one line each."""
    try:
        yield
    except download.http_error() as error:
        raise _unreachable(name, error) from error
    except OSError as error:
        if error.errno is None:
            raise _unreachable(
                name, error
            ) from error  # the library's way to say that it is told to stay offline
        raise ConvertError(f"{name} from {_base()}: {error}") from error


def _unreachable(name: str, error: Exception) -> download.Unreachable:
    return download.Unreachable(
        f"no network: {_base()} cannot be reached ({download.reason(error)}), and the cache has no whole copy of "
        f"{name}. Put {', '.join(COMPANIONS[1:])} and {WEIGHTS} into {hub.source_folder(name)} and run this again"
    )


def _base() -> str:
    return os.environ.get("FLAXMILL_GPT2_URL", URL).rstrip("/")


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flaxmill" / "gpt-2"
