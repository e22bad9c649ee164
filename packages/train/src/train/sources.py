"""Where texts to prepare come from: files, Hugging Face's `datasets`, and a few that are fetched by name.

Every source can be gone through more than once and holds one text at a time, so that a corpus need not fit the memory.
"""

import glob
import hashlib
import http.client
import importlib
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.meta import DataError


@dataclass(frozen=True)
class Source:
    """A text that can be fetched by name."""

    url: str
    sha256: str
    tokenizer: str


_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DATASETS = {
    "shakespeare_char": Source(_SHAKESPEARE_URL, _SHAKESPEARE_SHA256, tokenizer="char"),
    "shakespeare": Source(_SHAKESPEARE_URL, _SHAKESPEARE_SHA256, tokenizer="gpt2"),
}


@dataclass(frozen=True)
class Files:
    """The texts of the files that match a pattern, in the order of their names.

    A .jsonl file has a text a line, in the `field` of a JSON object; a .parquet file one a row, in the column `field`;
    any other file is one text, in UTF-8.
    """

    pattern: str
    field: str = "text"

    def __iter__(self) -> Iterator[str]:
        for path in self.paths():
            match path.suffix:
                case ".jsonl" | ".ndjson":
                    yield from _json_lines(path, self.field)
                case ".parquet":
                    yield from _parquet_rows(path, self.field)
                case _:
                    yield _whole(path)

    def paths(self) -> list[Path]:
        found = glob.glob(self.pattern, recursive=True)  # noqa: PTH207 - absolute patterns too
        paths = sorted(path for path in map(Path, found) if path.is_file())
        if not paths:
            raise DataError(f"--text={self.pattern}: no such file")
        return paths


@dataclass(frozen=True)
class HubDataset:
    """The rows of a data set that Hugging Face's `datasets` loads, from its hub or from a folder."""

    name: str
    split: str = "train"
    field: str = "text"

    def __iter__(self) -> Iterator[str]:
        datasets = import_extra("datasets", extra="datasets", wanted_by=f"--hf_dataset={self.name}")
        name, _, config = self.name.partition(":")
        try:
            rows = datasets.load_dataset(name, config or None, split=self.split)
        except Exception as error:  # it raises many kinds, for what the user or the network did
            raise DataError(f"--hf_dataset={self.name}: {error}") from error
        if self.field not in rows.column_names:
            raise DataError(
                f"--hf_dataset={self.name}: no field {self.field!r}; it has {', '.join(rows.column_names)}. "
                "Choose one with --field"
            )
        for number, row in enumerate(rows):
            yield _text(row[self.field], self.field, f"--hf_dataset={self.name}, row {number:,}")


def import_extra(module: str, *, extra: str, wanted_by: str) -> Any:
    """Imports a package that only this wish needs; without it, the DataError names the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{wanted_by} needs {module}, which is not installed; it is in the extra: "
            f"pip install 'flaxmill-train[{extra}]'"
        ) from error


def fetch(source: Source) -> str:
    """Downloads a named text and checks that it is the one that was meant."""
    try:
        with urllib.request.urlopen(source.url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # a cut connection is no OSError
        reason = getattr(error, "reason", error)
        raise DataError(
            f"cannot fetch {source.url} ({reason}); download it elsewhere and pass it with --text=FILE"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != source.sha256:
        raise DataError(f"{source.url}: sha256 {found}, expected {source.sha256}")
    return content.decode("utf-8")


def _whole(path: Path) -> str:
    try:
        # Bytes first: read_text would turn \r\n into \n, and the corpus is what it is.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start:,}") from error


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, too
                raise DataError(f"{path}, line {number:,}: not JSON ({error})") from error
            if not isinstance(row, dict) or field not in row:
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"{path}, line {number:,}: no field {field!r} but {found:.200}; choose one with --field"
                )
            yield _text(row[field], field, f"{path}, line {number:,}")


def _parquet_rows(path: Path, field: str) -> Iterator[str]:
    parquet = import_extra("pyarrow.parquet", extra="parquet", wanted_by=f"--text={path}")
    lib = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise DataError(
                    f"{path}: no column {field!r} but {', '.join(file.schema_arrow.names):.200}; "
                    "choose one with --field"
                )
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text(value, field, f"{path}, row {number:,}")
                    number += 1
    except (lib.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from error


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is {type(value).__name__}, expected a string")
    return value
