"""Folders that appear whole: whoever looks sees the old content or the new, never a part of either."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from core.errors import CheckpointError


@contextlib.contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """Gives an empty sibling of `path` to fill, which takes that name, on the disk for good, when the block ends well.

    The sibling is `path`.partial.RANDOM and nobody else's, so of two writers each fills its own and the later one
    stays. A folder that had the name at the start is replaced (whether it may be is for the caller to decide): it moves
    to `path`.old.RANDOM, the new one takes the name, the old one is deleted. Between the two renames, for a moment,
    nothing has the name; a process killed in that moment leaves both folders whole beside it. If the block raises, what
    was filled is removed and `path` is as it was.

    What killed processes have left is never touched, because it cannot be told from the work of a living one: it is
    safe to remove by hand.

    Raises:
      FileExistsError: another writer took the name meanwhile.
    """
    path = Path(os.path.realpath(path))
    token = secrets.token_hex(4)
    partial, old = (path.with_name(f"{path.name}.{kind}.{token}") for kind in ("partial", "old"))
    replaces = path.exists()
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        if replaces:
            with contextlib.suppress(FileNotFoundError):  # another writer is between its renames
                path.rename(old)
        _rename(partial, path)
        _sync_one(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Gives the name of a sibling of `path` to write a file at, which takes that name when the block ends well.

    As `fresh`: on the disk before it is renamed, in the place of a file that was there; removed if the block raises.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial.{secrets.token_hex(4)}")
    try:
        yield partial
        _sync_one(partial)
        partial.replace(path)
        _sync_one(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(
    path: Path, *, overwrite: bool, is_own: Callable[[Path], bool], kind: str
) -> None:
    """Checks that nothing is at `path`, or what may go: with `overwrite`, an empty folder or what `is_own`.

    Raises:
      CheckpointError: `path` exists, and must not be replaced; `kind` says what could have been.
    """
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists; choose another folder or pass --overwrite")
    empty = path.is_dir() and not any(path.iterdir())
    if not empty and not is_own(path):
        raise CheckpointError(f"{path} is not {kind} and is not overwritten; remove it yourself")


def check_space(path: Path, nbytes: int) -> None:
    """Raises CheckpointError if the disk where `path` is or would be has less than `nbytes` free."""
    parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise CheckpointError(
            f"{path}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )


def _rename(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError as error:
        if not path.exists():
            raise
        raise FileExistsError(
            f"{path}: something else was written there meanwhile; choose another folder or run this again"
        ) from error


def _sync(folder: Path) -> None:
    """Waits until a folder and all in it is on the disk: a rename may get there before the contents do."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
