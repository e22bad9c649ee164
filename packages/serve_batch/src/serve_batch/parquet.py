"""Parquet files as rows of fields that JSON could hold, and records as Parquet files.

Both sides take a bounded number of rows at a time. What a file's header claims is not believed: rows are counted as
they come.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serve_batch import records
from serve_batch.records import RowError

_BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20
ROW_GROUP_ROWS = 1024


class Rows:
    """The rows of a file, by their numbers."""

    is_seekable = False

    def __init__(self, file: BinaryIO):
        self._file = file
        self._parquet = pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        self._names = self._parquet.schema_arrow.names
        self._check_columns()
        self.position = 0
        self._batches = self._from_group(0)
        self._rest: pa.RecordBatch | None = None

    def close(self) -> None:
        self._parquet.close(force=True)
        self._file.close()

    def row_ends(self) -> Iterator[np.ndarray]:
        """Reads every column, so that damage is found before there is work to lose."""
        rows = 0
        for batch in self._batches:
            yield np.arange(rows + 1, rows + batch.num_rows + 1)
            rows += batch.num_rows
        if rows != self._parquet.metadata.num_rows:
            raise ValueError(
                f"its footer says {self._parquet.metadata.num_rows} rows, there are {rows}"
            )

    def rows(self, start: int, end: int) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        self._go_to(start)
        while self.position < end:
            batch = self._next()
            taken = min(batch.num_rows, end - self.position)
            self._rest = batch.slice(taken) if taken < batch.num_rows else None
            for row in _rows(batch.slice(0, taken)):
                yield self.position, row
                self.position += 1

    def _check_columns(self) -> None:
        twice = sorted({name for name in self._names if self._names.count(name) > 1})
        if twice:
            raise ValueError(f"it has two columns {twice[0]!r}; rename one")
        if not set(records.PROMPTS).intersection(self._names):
            wanted = ", ".join(records.PROMPTS)
            raise ValueError(
                f"it has none of the columns {wanted}; it has {', '.join(self._names)}"
            )

    def _go_to(self, start: int) -> None:
        metadata = self._parquet.metadata
        first = 0  # row of the group
        if start > self.position:
            for group in range(metadata.num_row_groups):
                size = metadata.row_group(group).num_rows
                if self.position < first <= start < first + size:
                    self._batches, self._rest = self._from_group(group), None
                    self.position = first
                first += size
        while self.position < start:
            batch = self._next()
            skipped = min(batch.num_rows, start - self.position)
            self._rest = batch.slice(skipped) if skipped < batch.num_rows else None
            self.position += skipped

    def _next(self) -> pa.RecordBatch:
        batch = self._rest or next(self._batches, None)
        if batch is None:
            raise EOFError("it is shorter than it was")
        return batch

    def _from_group(self, group: int) -> Iterator[pa.RecordBatch]:
        metadata = self._parquet.metadata
        for number in range(group, metadata.num_row_groups):
            about = metadata.row_group(number)
            row_bytes = about.total_byte_size // max(about.num_rows, 1)
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
            yield from self._parquet.iter_batches(size, row_groups=[number], use_threads=False)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    """Yields the fields of each row, or why a value of it cannot be a field."""
    names = batch.schema.names
    unusable: dict[int, str] = {}
    columns = []
    for name, column in zip(names, batch.columns, strict=True):
        values, refused = _values(column, drops_nulls=name in ("messages", "tools"))
        columns.append(values)
        unusable |= {row: f"column {name!r}: {why}" for row, why in refused.items()}
    for row, values in enumerate(zip(*columns, strict=True)):
        fields = dict(zip(names, values, strict=True))
        yield records.unusable(fields, unusable[row]) if row in unusable else fields


def _values(column: pa.Array, *, drops_nulls: bool) -> tuple[list[Any], dict[int, str]]:
    """Returns a column as JSON's values, null for those that are none, and why those are not, by row."""
    try:
        _check_depth(column.type)
        wanted = _spelled(column.type)
        values = (column if wanted == column.type else column.cast(wanted)).to_pylist()
        convert = _converter(wanted, drops_nulls)
    except (pa.ArrowException, ValueError, OSError) as error:
        name = str(column.type)
        why = f"{name[:100]} cannot be JSON: {' '.join(str(error).split())}"
        there = np.flatnonzero(np.asarray(column.is_valid()))
        return [None] * len(column), {int(row): why for row in there}
    if convert is None:
        return values, {}
    refused = {}
    for row, value in enumerate(values):
        try:
            values[row] = convert(value)
        except ValueError as error:
            values[row], refused[row] = None, str(error)
    return values, refused


def _check_depth(type_: pa.DataType) -> None:
    level = [type_]
    for _ in range(records.MAX_DEPTH):
        level = [outer.field(i).type for outer in level for i in range(outer.num_fields)]
    if level:
        raise ValueError(f"it is nested deeper than {records.MAX_DEPTH}")


_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


@functools.lru_cache(maxsize=256)
def _spelled(type_: pa.DataType) -> pa.DataType:
    """Returns the type as which Arrow spells out what JSON has no type for: dates and decimals as text."""
    t = pa.types
    if t.is_temporal(type_) or t.is_decimal(type_):
        return pa.string()
    if t.is_dictionary(type_):
        return _spelled(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType):
        return _spelled(type_.storage_type)
    if t.is_binary_view(type_):
        return pa.large_binary()
    if any(is_one(type_) for is_one in _LISTS):
        return pa.large_list(_spelled(type_.value_type))
    if t.is_struct(type_):
        return pa.struct([(field.name, _spelled(field.type)) for field in type_])
    if t.is_map(type_):
        return pa.map_(_spelled(type_.key_type), _spelled(type_.item_type))
    return type_


Converter = Callable[[Any], Any]


@functools.lru_cache(maxsize=256)
def _converter(type_: pa.DataType, drops_nulls: bool) -> Converter | None:
    """Returns what makes a value of a spelled type JSON's, or raises ValueError; None where it is JSON's already."""
    t = pa.types
    if t.is_floating(type_):
        return _finite
    if t.is_binary(type_) or t.is_large_binary(type_) or t.is_fixed_size_binary(type_):
        return _text
    if t.is_large_list(type_):
        inner = _converter(type_.value_type, drops_nulls)
        return None if inner is None else functools.partial(_list, inner=inner)
    if t.is_struct(type_):
        fields = {field.name: _converter(field.type, drops_nulls) for field in type_}
        if len(fields) < type_.num_fields:
            raise ValueError("two of its fields have one name")
        return functools.partial(_object, fields=fields, drops_nulls=drops_nulls)
    if t.is_map(type_):
        inner = _converter(type_.item_type, drops_nulls)
        return functools.partial(_mapping, inner=inner)
    if any(is_one(type_) for is_one in _OF_JSON):
        return None
    raise ValueError("JSON has no such type")  # of which what writes JSON might make anything


_OF_JSON = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
)


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    return value


def _text(value: bytes | None) -> str | None:
    """Returns bytes as text: some writers mark no column as text."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        raise ValueError("it holds bytes that are not UTF-8") from None


def _list(values: list[Any] | None, inner: Converter) -> list[Any] | None:
    return None if values is None else [inner(value) for value in values]


def _object(
    value: dict[str, Any] | None, fields: Mapping[str, Converter | None], drops_nulls: bool
) -> dict[str, Any] | None:
    """Returns a struct, in which null may be how its writer had to say that there is nothing."""
    if value is None:
        return None
    made = {name: f(value[name]) if f else value[name] for name, f in fields.items()}
    return {k: v for k, v in made.items() if v is not None} if drops_nulls else made


def _mapping(pairs: list[tuple[Any, Any]] | None, inner: Converter | None) -> dict | None:
    if pairs is None:
        return None
    made = {key: inner(value) if inner else value for key, value in pairs}
    if len(made) < len(pairs) or not all(isinstance(key, str) for key in made):
        raise ValueError("a map needs keys that are strings, each once")
    return made


_SCORED = [("token", pa.int32()), ("logprob", pa.float64())]
_SAMPLE = [
    ("text", pa.string()),
    ("channels", pa.string()),
    ("tool_calls", pa.string()),
    ("token_ids", pa.list_(pa.int32())),
    ("finish_reason", pa.string()),
    ("logprobs", pa.list_(pa.struct([*_SCORED, ("top", pa.list_(pa.struct(_SCORED)))]))),
    ("completion_tokens", pa.int64()),
]
SCHEMA = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("id", pa.string()),
        ("index", pa.int64()),
        (
            "source",
            pa.struct([("file", pa.string()), ("offset", pa.int64()), ("line", pa.int64())]),
        ),
        ("status", pa.string()),
        *_SAMPLE,
        ("prompt_tokens", pa.int64()),
        ("truncated_tokens", pa.int64()),
        ("samples", pa.list_(pa.struct(_SAMPLE))),
        ("error", pa.struct([("code", pa.string()), ("message", pa.string())])),
        ("seed", pa.int64()),
        ("model", pa.struct([("name", pa.string()), ("revision", pa.string())])),
        ("input", pa.string()),
    ]
)
"""Of a record. What has no columns of its own, because it may be anything, is JSON."""


class Writer:
    """Records to a Parquet file: the same bytes for the same records, with the same pyarrow.

    Every setting that has a bearing on the bytes is given, so that none of them is a default of the day.
    """

    def __init__(self, file: BinaryIO):
        self._writer = pq.ParquetWriter(
            file,
            SCHEMA,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=True,
            write_statistics=True,
            write_page_checksum=True,
            store_schema=True,
        )
        self._waiting: list[dict[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(_row(record))
        if len(self._waiting) == ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=SCHEMA))
            self._waiting.clear()


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record as the schema has it."""
    samples = record["samples"]
    return {
        **_json_in(record, ("channels", "tool_calls", "input")),
        "id": str(record["id"]),
        "samples": samples and [_json_in(s, ("channels", "tool_calls")) for s in samples],
    }


def _json_in(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    there = [name for name in names if fields[name] is not None]
    return {**fields, **{name: records.to_json(fields[name]).decode() for name in there}}


def read_records(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yields the records of a part as they were written, but for the type of ids, which are strings."""
    parquet = pq.ParquetFile(file, pre_buffer=False)
    for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
        for row in batch.to_pylist():
            yield _record(row)


def _record(row: dict[str, Any]) -> dict[str, Any]:
    samples = row["samples"]
    return {
        **_json_out(row, ("channels", "tool_calls", "input")),
        "samples": samples and [_json_out(s, ("channels", "tool_calls")) for s in samples],
    }


def _json_out(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    read = {name: records.from_json(fields[name]) for name in names if fields[name] is not None}
    return {**fields, **read}
