"""Where files lie: in a folder of this machine, or below a URL, of an object store most often, by way of fsspec.

Both kinds keep one promise: a name that exists is whole. A local file is synced and then renamed; an object appears
when its upload is complete, so that nothing is ever renamed there. A store knows nothing of what it holds.
"""

import abc
import contextlib
import fcntl
import functools
import io
import itertools
import os
import socket
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from serve_batch.errors import JobError, Unreachable, UsageError

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_HERE = "file://"
_BUFFER_BYTES = 1 << 16
_AT_ONCE = 256
_BLOCK_BYTES = 8 << 20
"""Read ahead of an object: a request takes tens of milliseconds, whatever its size."""


class Stat(NamedTuple):
    size: int
    version: str | int
    """Something that changes when the file does: the time of its last change, or an object's tag."""


def is_remote(place: str | Path) -> bool:
    return "://" in str(place) and not str(place).startswith(_HERE)


def absolute(place: str | Path) -> str:
    """Returns a URL as its store spells it, a path without `..`; links are kept, whatever they lead to.

    Raises:
      UsageError: nothing that is installed can reach it.
    """
    if not is_remote(place):
        return os.path.abspath(str(place).removeprefix(_HERE))  # noqa: PTH100
    protocol = str(place).partition("://")[0]
    return f"{protocol}://{_filesystem(protocol)._strip_protocol(str(place)).rstrip('/')}"


def at(place: str | Path) -> "Store":
    """Returns the store below `place`.

    Raises:
      UsageError: nothing that is installed can reach it.
    """
    return Remote(absolute(place)) if is_remote(place) else Local(absolute(place))


class Store(abc.ABC):
    """Files by their names below `place`, with forward slashes."""

    def __init__(self, place: str):
        self.place = place

    @abc.abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Returns a file whose reads raise Unreachable when they fail.

        Raises:
          OSError: there is no such file.
        """

    @abc.abstractmethod
    def stat(self, name: str) -> Stat:
        """Raises OSError where there is no such file."""

    @abc.abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns the names of the files in `folder` itself, and their sizes; none if there is no such folder."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file if it is there."""

    @abc.abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Yields a file that appears under `name`, whole, when the block ends, and not at all if it raises."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, which appears whole."""
        with self.writing(name) as file:
            file.write(content)

    @abc.abstractmethod
    def holding(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Holds the lock of that name.

        Raises:
          JobError: another process holds it, or it cannot be made.
        """

    def read(self, name: str) -> bytes:
        """Raises OSError where there is no such file."""
        with self.open(name) as file:
            return file.read()

    def read_each(self, names: Iterable[str]) -> Iterator[bytes]:
        """Yields the contents of many small files, in order."""
        return map(self.read, names)


class Local(Store):
    @property
    def path(self) -> Path:
        return Path(self.place)

    def open(self, name: str) -> BinaryIO:
        path = self.path / name
        return io.BufferedReader(_Reached(path.open("rb", buffering=0), str(path)), _BUFFER_BYTES)

    def stat(self, name: str) -> Stat:
        found = (self.path / name).stat()
        return Stat(found.st_size, found.st_mtime_ns)

    def sizes(self, folder: str = "") -> dict[str, int]:
        prefix = f"{folder}/" if folder else ""
        try:
            with os.scandir(self.path / folder) as entries:
                return {prefix + e.name: e.stat().st_size for e in entries if e.is_file()}
        except FileNotFoundError:
            return {}

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def writing(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return committing(self.path / name)

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """The system lets go when the process dies."""
        path = self.path / name
        descriptor = self._open_lock(path)
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, _me().encode(), 0)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def _open_lock(self, path: Path) -> int:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise JobError(f"cannot write to {self.path}: {error.strerror}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                os.close(descriptor)
                raise JobError(
                    f"another job ({holder}) is writing to {self.path}; "
                    "wait for it, or choose another output"
                ) from None
            # A job that ended in between has removed the file that was opened.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)


@contextlib.contextmanager
def committing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that appears as `path`, whole and synced, when the block ends, and not at all if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself, so that it survives a power cut
    finally:
        os.close(descriptor)


class Remote(Store):
    """Below a URL; an object that is there may be replaced, and is then whole all the same."""

    @property
    def _fs(self) -> Any:
        return _filesystem(self.place.partition("://")[0])

    def _url(self, name: str) -> str:
        return f"{self.place}/{name}" if name else self.place

    def open(self, name: str) -> BinaryIO:
        fs = self._fs
        options = {"block_size": _BLOCK_BYTES, "cache_type": "readahead"}
        with reached(self._url(name)):
            file = fs.open(fs._strip_protocol(self._url(name)), "rb", **options)
        # fsspec's own cannot read a part of a line.
        return io.BufferedReader(_Reached(file, self._url(name)), _BUFFER_BYTES)

    def read(self, name: str) -> bytes:
        fs = self._fs
        with reached(self._url(name)):
            return fs.cat_file(fs._strip_protocol(self._url(name)))  # one request

    def read_each(self, names: Iterable[str]) -> Iterator[bytes]:
        fs, left = self._fs, iter(names)
        while some := list(itertools.islice(left, _AT_ONCE)):
            paths = [fs._strip_protocol(self._url(name)) for name in some]
            with reached(self.place):
                contents = fs.cat(paths)  # all at the same time
            yield from (contents[path] for path in paths)

    def stat(self, name: str) -> Stat:
        fs = self._fs
        fs.invalidate_cache()
        with reached(self._url(name)):
            return _stat(fs.info(fs._strip_protocol(self._url(name))))

    def sizes(self, folder: str = "") -> dict[str, int]:
        fs, prefix = self._fs, f"{folder}/" if folder else ""
        fs.invalidate_cache()  # what was listed before may be another's work by now
        with reached(self._url(folder)):
            try:
                found = fs.ls(fs._strip_protocol(self._url(folder)), detail=True)
            except FileNotFoundError:
                return {}
        files = [entry for entry in found if entry["type"] == "file"]
        return {prefix + entry["name"].rpartition("/")[2]: entry["size"] for entry in files}

    def remove(self, name: str) -> None:
        fs = self._fs
        with reached(self._url(name)), contextlib.suppress(FileNotFoundError):
            fs.rm_file(fs._strip_protocol(self._url(name)))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """The file grows on this machine and is sent when it is whole: not every store forgets what was begun."""
        with tempfile.NamedTemporaryFile(prefix="flaxmill-") as file:
            yield cast(BinaryIO, file)
            file.flush()
            fs = self._fs
            with reached(self._url(name)):
                fs.put_file(file.name, fs._strip_protocol(self._url(name)))

    def write(self, name: str, content: bytes) -> None:
        fs = self._fs
        with reached(self._url(name)):
            fs.pipe_file(fs._strip_protocol(self._url(name)), content)  # one request

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """An object store does not know who has died: the lock of a job that was killed stays, and says whose it is."""
        fs = self._fs
        path = fs._strip_protocol(self._url(name))
        with reached(self._url(name)):
            fs.invalidate_cache()
            try:
                if fs.exists(path):  # not every store knows what "create" asks of it
                    raise FileExistsError
                fs.pipe_file(path, _me().encode(), mode="create")
            except FileExistsError:
                holder = fs.cat_file(path)[:200].decode(errors="replace")
                raise JobError(
                    f"another job ({holder}) is writing to {self.place}; wait for it, or choose another output. "
                    f"If it was killed, remove {self._url(name)} and run the same command again"
                ) from None
        try:
            yield
        finally:
            self.remove(name)


def find(pattern: str) -> dict[str, Stat]:
    """Returns the URLs that a remote glob matches."""
    protocol = pattern.partition("://")[0]
    fs = _filesystem(protocol)
    with reached(pattern):
        fs.invalidate_cache()
        found = fs.glob(fs._strip_protocol(pattern), detail=True)
        return {
            f"{protocol}://{path}": _stat(info)
            for path, info in found.items()
            if info["type"] == "file"
        }


def is_folder(place: str) -> bool:
    """Whether a path or a URL is a folder, or the beginning of some objects' names."""
    if not is_remote(place):
        return Path(place).is_dir()
    fs = _filesystem(place.partition("://")[0])
    with reached(place):
        return fs.isdir(fs._strip_protocol(place))


def _stat(info: dict[str, Any]) -> Stat:
    tags = ("ETag", "etag", "generation", "mtime", "LastModified", "updated", "created")
    return Stat(info["size"], next((str(info[tag]) for tag in tags if info.get(tag)), ""))


@functools.cache
def _filesystem(protocol: str) -> Any:
    """Raises UsageError where nothing that is installed speaks `protocol`."""
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        what = f"pip install 'flaxmill-serve-batch[{extra}]'" if extra else str(error)
        raise UsageError(f"{protocol}:// needs a package that is missing: {what}") from error
    except ValueError as error:
        raise UsageError(f"there is no {protocol}://; give a path, gs:// or s3://") from error


@contextlib.contextmanager
def reached(place: str) -> Iterator[None]:
    """Makes one line of whatever a store's library raises: most often no credentials, or no network.

    Raises:
      Unreachable: what it was; but FileNotFoundError as it is.
    """
    try:
        yield
    except (JobError, FileNotFoundError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise Unreachable(f"cannot reach {place}: {what}") from error


class _Reached(io.RawIOBase):
    """A file of which a read that fails is told from whatever is wrong with what was read."""

    def __init__(self, file: Any, place: str):
        self._file, self._place = file, place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int | None:
        with reached(self._place):
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
