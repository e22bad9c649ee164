"""Part files: records in, bytes out, and back; JSON lines or Parquet.

A record is kept in the form in which it stands in the file, so that one that is not done again is not written anew.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from serve_batch import records

if TYPE_CHECKING:
    from serve_batch.parquet import Writer as ParquetWriter

_CHUNK_LINES = 64


class Writer:
    """Writes the records of a part to `file`; what they came to is known when the block ends."""

    def __init__(self, file: BinaryIO, format: str):
        self._file = _Hashed(file)
        self._parquet: ParquetWriter | None = None
        self._lines: list[bytes] = []
        if format == "parquet":
            from serve_batch import parquet

            self._parquet = parquet.Writer(cast(BinaryIO, self._file))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
            if self._parquet is not None:
                self._parquet.close()

    @property
    def nbytes(self) -> int:
        return self._file.nbytes

    @property
    def sha256(self) -> str:
        return self._file.digest.hexdigest()

    def write(self, record: Mapping[str, Any]) -> Any:
        """Writes a record, and returns it as it is kept."""
        kept = records.to_line(record) if self._parquet is None else record
        self.keep(kept)
        return kept

    def keep(self, kept: Any) -> None:
        """Writes what `write` or `read` gave."""
        if self._parquet is not None:
            self._parquet.write(kept)
            return
        self._lines.append(kept)
        if len(self._lines) == _CHUNK_LINES:
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            self._file.write(b"".join(self._lines))
            self._lines.clear()


def read(file: BinaryIO, format: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the records of a part, each as it is kept and as it reads."""
    if format == "parquet":
        from serve_batch import parquet

        for record in parquet.read_records(file):
            yield record, record
        return
    for line in file:
        yield line, records.from_json(line)


class _Hashed:
    """A file that is written from its beginning, with the digest and the size of what was."""

    closed = False

    def __init__(self, file: BinaryIO):
        self._file, self.nbytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.nbytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.nbytes

    def flush(self) -> None:
        self._file.flush()
