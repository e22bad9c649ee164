"""Models by name: from the Hugging Face hub, through its cache in HF_HOME, pinned to one commit.

`huggingface_hub` finds, authenticates and transfers. Added here: a download that breaks is kept and resumed,
also by the next process (since 2.0 the library deletes it); what arrived is hashed before it is trusted; and without
a network one request fails in seconds, instead of a row of retries.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from convert import download, sources
from convert.errors import ConvertError
from convert.sources import safetensors, torch_zip

KNOWN = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
}
"""Short names, and the repositories they stand for; any other model is "owner/name"."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: `sizes` has every file that is there, in bytes where they are known."""

    repo: str
    revision: str
    sizes: Mapping[str, int | None]

    @property
    def origin(self) -> dict[str, str]:
        """What a manifest says of where the weights come from."""
        return {"repo": self.repo, "revision": self.revision}


def looks_like_path(name: str) -> bool:
    """Tells whether `name` is no NAME or OWNER/NAME, but the way to a place on this machine."""
    parts = name.split("/")
    return len(parts) > 2 or any(part in ("", ".", "..", "~") for part in parts)


def local_folder(name: str) -> Path | None:
    """Returns models/src/NAME, whose files are used instead of the hub's, where it holds any."""
    if looks_like_path(name):
        return None
    folder = source_folder(name)
    return folder if folder.is_dir() and any(folder.iterdir()) else None


def source_folder(name: str) -> Path:
    """Returns where a model's files are put by hand."""
    return Path("models/src") / name


def default_out(name: str) -> Path:
    """Returns the model folder that `--model=name` makes when no other is asked for."""
    return Path("models") / name.rpartition("/")[2]


def resolve(name: str, revision: str | None = None) -> Snapshot:
    """Returns the commit that `revision` (or the default branch) of the model is now, with one request.

    Without a network it is the commit that the cache has whole.

    Raises:
      ConvertError: no such model or revision, or neither network nor cache.
    """
    from huggingface_hub import HfApi

    from convert import openai

    repo = KNOWN.get(name, name)
    if looks_like_path(repo) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConvertError(
            f"{name!r} is neither a path here nor a model: expected {', '.join(KNOWN)}, "
            f"OpenAI's {', '.join(openai.MODELS)}, or OWNER/NAME"
        )
    try:
        with _explained(repo, revision):
            info = HfApi().model_info(
                repo, revision=revision, timeout=download.TIMEOUT_S, files_metadata=True
            )
    except download.Unreachable as error:
        if cached := _cached(repo, revision):
            return cached
        raise ConvertError(
            f"{error}, and the cache has no whole copy of {repo}. Put {sources.CONFIG}, "
            f"{safetensors.SINGLE} (or its shards and {safetensors.INDEX}) and tokenizer.json "
            f"(or vocab.json and merges.txt) into {source_folder(name)} and run this again"
        ) from error
    if info.sha is None:
        raise ConvertError(
            f"{_endpoint()} names no commit for {repo}; expected 'sha' in its answer"
        )
    _remember(repo, revision, info.sha)
    return Snapshot(repo, info.sha, {file.rfilename: file.size for file in info.siblings or ()})


def fetch_companions(snapshot: Snapshot, *, quiet: bool | None = None) -> Path:
    """Downloads config, index and tokenizer files where they are not cached; returns the snapshot's folder."""
    from huggingface_hub import hf_hub_download

    wanted = (sources.CONFIG, _weights(snapshot)[1], *sources.COMPANIONS)
    names = [name for name in wanted if name in snapshot.sizes]
    if sources.CONFIG not in names:
        raise ConvertError(f"{snapshot.repo} has no {sources.CONFIG} at {snapshot.revision}")
    with _explained(snapshot.repo, snapshot.revision), download.muted(quiet):
        paths = [
            Path(hf_hub_download(snapshot.repo, name, revision=snapshot.revision)) for name in names
        ]
    return paths[0].parent


def fetch_weights(snapshot: Snapshot, *, quiet: bool | None = None) -> None:
    """Downloads the weights where they are not cached, resuming what an earlier attempt has left.

    Raises:
      ConvertError: there are none, the connection stays broken, or what arrived is not what the hub has.
    """
    names = weight_names(snapshot)
    with _explained(snapshot.repo, snapshot.revision), download.muted(quiet):
        for name in names:
            _fetch_large(snapshot, name)


def weight_names(snapshot: Snapshot) -> list[str]:
    """Returns the weights of a snapshot whose companions are there; the index decides, if there is one."""
    single, index = _weights(snapshot)
    if index in snapshot.sizes:
        path = _in_cache(snapshot.repo, index, snapshot.revision)
        assert path is not None, "the index is a companion and companions come first"
        names = sorted(set(safetensors.shard_names(path).values()))
        if absent := [name for name in names if name not in snapshot.sizes]:
            raise ConvertError(
                f"{snapshot.repo} lacks {', '.join(absent)} at {snapshot.revision}, which its {index} names"
            )
        return names
    if single in snapshot.sizes:
        return [single]
    held = sorted(n for n in snapshot.sizes if n.endswith((".h5", ".msgpack", ".safetensors")))
    raise ConvertError(
        f"{snapshot.repo} has no {safetensors.SINGLE} nor {torch_zip.SINGLE}, and no index of either, at "
        f"{snapshot.revision}; found {', '.join(held) or 'no weights'}"
    )


def _weights(snapshot: Snapshot) -> tuple[str, str]:
    """Returns the names of the weights and of their index: PyTorch's where a repository has no safetensors."""
    kinds = [(kind.SINGLE, kind.INDEX) for kind in (safetensors, torch_zip)]
    return next((kind for kind in kinds if any(name in snapshot.sizes for name in kind)), kinds[0])


def _fetch_large(snapshot: Snapshot, name: str) -> None:
    """Puts a file's content into the cache as the library would, then lets the library link it into the snapshot."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    if _in_cache(snapshot.repo, name, snapshot.revision):
        return
    url = hf_hub_url(snapshot.repo, name, revision=snapshot.revision)
    metadata = get_hf_file_metadata(url, timeout=download.TIMEOUT_S)
    etag = metadata.etag or ""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) or metadata.size is None:
        raise ConvertError(
            f"{url}: expected a hash as ETag and a size, found {etag!r}, {metadata.size}"
        )
    blob = _cache_folder(snapshot.repo) / "blobs" / etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(blob.with_name(f"{etag}.resume.lock")):
        if not blob.exists():
            _transfer(url, name, blob, metadata.size)
    hf_hub_download(snapshot.repo, name, revision=snapshot.revision)


def _transfer(url: str, name: str, blob: Path, size: int) -> None:
    """Downloads to `blob`.incomplete, checks the hash, and gives it its name."""
    from huggingface_hub.utils import build_hf_headers

    partial = blob.with_name(blob.name + ".incomplete")
    download.fetch(url, partial, size, name=name, headers=build_hf_headers())
    _check_hash(partial, blob.name)
    partial.rename(blob)


def _check_hash(path: Path, expected: str) -> None:
    """Deletes a download that is not what the hub named: by SHA-256, or by git's SHA-1 for a file outside LFS."""
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(expected) == 40:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: digest).hexdigest()
    if found != expected:
        path.unlink()
        raise ConvertError(
            f"the download has hash {found}, the hub says {expected}; it was deleted, run this again"
        )


def _cached(repo: str, revision: str | None) -> Snapshot | None:
    """Returns the snapshot that the cache holds of `revision`, if its weights are all there."""
    config = _in_cache(repo, sources.CONFIG, revision)
    if config is None:
        return None
    folder = config.parent
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    snapshot = Snapshot(repo, folder.name, sizes)
    try:
        return snapshot if all(name in sizes for name in weight_names(snapshot)) else None
    except ConvertError:
        return None


def _in_cache(repo: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _remember(repo: str, revision: str | None, commit: str) -> None:
    """Notes in the cache which commit a branch was, as the library does, for the day without a network."""
    ref = _cache_folder(repo) / "refs" / (revision or "main")
    if ref.name != commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        new.write_text(commit)
        new.replace(ref)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextlib.contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turns the library's errors into one line each."""
    from huggingface_hub import errors

    where = _endpoint()
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise ConvertError(f"{repo} has no revision {revision!r} on {where}") from error
    except errors.GatedRepoError as error:
        raise ConvertError(
            f"{repo} is gated: accept its terms at {where}/{repo}, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConvertError(
            f"{where} has no model {repo}; if it is private, `hf auth login` first"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code >= 500:
            raise download.Unreachable(f"{where} is down ({error.response.status_code})") from error
        raise ConvertError(f"{where} refuses {repo}: {download.reason(error)}") from error
    except (
        download.http_error(),
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
    ) as error:
        raise download.Unreachable(
            f"no network: {where} cannot be reached ({download.reason(error)})"
        ) from error
    except (ValueError, OSError) as error:
        raise ConvertError(f"{repo} from {where}: {download.reason(error)}") from error
