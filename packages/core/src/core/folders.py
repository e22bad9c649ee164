"""Folders that appear whole or not at all: whoever looks sees the old content or the new, never a part of either."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """Gives an empty sibling of `path` to fill, which takes that name when the block ends well.

    A folder that already has the name is moved aside first and deleted last; whether it may be is for the caller to
    decide. If the block raises, what was filled is removed and `path` is as it was.
    """
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    if old.exists() and not path.exists():  # we were killed between the two renames below
        old.rename(path)
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Returns how much room there is on the disk where `path` is or would be."""
    parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(parent).free
