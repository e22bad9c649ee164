"""Folders that appear whole: whoever looks sees the old content or the new, never a part of either."""

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
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
    partial = path.with_name(f"{path.name}.partial.{secrets.token_hex(4)}")
    replaces = path.exists()
    partial.mkdir(parents=True)
    try:
        yield partial
        _take_name(partial, path, replaces=replaces)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Partial:
    """A folder to fill, and a file to note in what is done: a descriptor to read and to append to, or None."""

    folder: Path
    notes: int | None
    is_resumed: bool


@contextlib.contextmanager
def resumable(path: Path, work: str, *, resume: bool) -> Iterator[Partial]:
    """Gives, as `fresh` does, a folder to fill for `path`; what is in it outlives a kill and an interrupt.

    `work` is a hash of all that decides what will be in the folder. It names the place, `path`.partial.WORK, which
    holds the folder and the notes. A lock on the notes, which the system takes from a process that ends, tells a living
    writer from a dead one: a living one is an error, what a dead one has left is taken over with `resume` and removed
    without. Places of other work are never touched.

    If the block raises KeyboardInterrupt or SystemExit, the place is kept; any other exception removes it, so that a
    full disk is not left full. On a file system without locks this is `fresh`: there are no notes.

    Raises:
      CheckpointError: another process is filling this place.
      FileExistsError: another writer took the name meanwhile.
      KeyboardInterrupt: with a message that tells how to go on.
    """
    path = Path(os.path.realpath(path))
    place = partial_of(path, work)
    replaces = path.exists()
    notes = _locked(place / "journal.jsonl")
    if notes is None:
        with fresh(path) as folder:
            yield Partial(folder, None, is_resumed=False)
        return
    try:
        folder = place / "folder"
        is_resumed = resume and folder.is_dir() and os.fstat(notes).st_size > 0
        if not is_resumed:
            os.ftruncate(notes, 0)
            _remove(folder)
            folder.mkdir()
        yield Partial(folder, notes, is_resumed)
        _take_name(folder, path, replaces=replaces)
        shutil.rmtree(place, ignore_errors=True)
    except KeyboardInterrupt:
        if not (place / "folder").is_dir():  # it has its name
            shutil.rmtree(place, ignore_errors=True)
            raise
        raise KeyboardInterrupt(
            f"interrupted; what is done is kept in {place}: the same command with --resume goes on from there"
        ) from None
    except Exception:
        shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        os.close(notes)


def partial_of(path: Path, work: str) -> Path:
    """Returns where `resumable` keeps what is unfinished."""
    path = Path(os.path.realpath(path))
    return path.with_name(f"{path.name}.partial.{work}")


def others(path: Path, mine: Path) -> list[Path]:
    """Returns what unfinished work for `path` lies beside it, of living and dead processes, other than `mine`."""
    path = Path(os.path.realpath(path))
    start = f"{path.name}.partial."
    beside = (x for x in path.parent.iterdir() if x.name.startswith(start))
    return sorted(x for x in beside if not mine.is_relative_to(x))


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Removes from `folder` what has another name than `names`."""
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def allocated(folder: Path) -> int:
    """Returns how many bytes of the disk a folder's files take."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


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


def _take_name(partial: Path, path: Path, *, replaces: bool) -> None:
    """Puts `partial`, once it is on the disk, in the place of `path`."""
    old = path.with_name(f"{path.name}.old.{secrets.token_hex(4)}")
    _sync(partial)
    try:
        if replaces:
            with contextlib.suppress(FileNotFoundError):  # another writer is between its renames
                path.rename(old)
        _rename(partial, path)
        _sync_one(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _locked(path: Path) -> int | None:
    """Returns a descriptor of the file `path`, new or not, that is locked until it is closed or this process ends.

    None, and no file, where the file system has no locks.

    Raises:
      CheckpointError: another process holds the lock.
    """
    import fcntl  # not above: only POSIX has it, and only this needs it

    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # its last owner has just removed the folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"{path.parent}: another process is writing just this there; wait until it ends, or end it"
            ) from None
        except OSError:
            os.close(descriptor)
            shutil.rmtree(path.parent, ignore_errors=True)
            return None
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


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
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # which fsync does not say
    finally:
        os.close(descriptor)
