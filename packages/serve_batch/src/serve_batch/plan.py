"""What a job will do, decided before it starts and written down: the input files, the shards, and the fingerprint.

A row is a line. A shard is a run of consecutive rows, kept as byte ranges of the input files, so that a worker opens
the files and seeks; no prompt ever travels through the pipeline. Shards follow the order of the input, hence the parts
they become, concatenated, do too. The fingerprint names everything that changes a row's output: a job resumes only
where it is the same.
"""

import dataclasses
import datetime
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from core.errors import FlaxmillError
from core.tokenizer import GENERATION_CONFIG, TOKENIZER_FILES
from serve_batch import records

if TYPE_CHECKING:
    from core import Sampling

Scalar = str | int | float | bool | None

_BLOCK_BYTES = 1 << 20


class JobError(FlaxmillError):
    """A job that cannot go on: what was found, what was expected, what to do next."""


class UsageError(FlaxmillError, ValueError):
    """Arguments that cannot be; nothing has been touched."""


class Input(NamedTuple):
    name: str
    """The path below the root of the inputs, with forward slashes."""
    size: int
    mtime_ns: int


class Span(NamedTuple):
    """Whole lines of one input: bytes `start` to `end`, the first of them line number `line`."""

    input: int
    start: int
    end: int
    line: int


class Shard(NamedTuple):
    number: int
    first_row: int
    rows: int
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    root: str
    inputs: tuple[Input, ...]
    shards: tuple[Shard, ...]
    fingerprint: Mapping[str, Scalar]
    date: str
    """The day it was made, YYYY-MM-DD: what chat templates are told that ask for it, however long the job takes."""

    @property
    def now(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.date)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def part_name(self, shard: Shard) -> str:
        return f"part-{shard.number:05d}-of-{len(self.shards):05d}.jsonl"

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Plan":
        """Raises ValueError, KeyError or TypeError where `content` is no plan of this version."""
        fields = json.loads(content)
        return cls(
            root=fields["root"],
            inputs=tuple(Input(*i) for i in fields["inputs"]),
            shards=tuple(
                Shard(number, first_row, rows, tuple(Span(*s) for s in spans))
                for number, first_row, rows, spans in fields["shards"]
            ),
            fingerprint=fields["fingerprint"],
            date=datetime.date.fromisoformat(fields["date"]).isoformat(),
        )


def make(
    root: Path,
    inputs: Sequence[Input],
    *,
    shard_size: int,
    fingerprint: Mapping[str, Scalar],
) -> Plan:
    """Returns the plan for `inputs`, reading each once to find its lines: about a second per gigabyte.

    Raises:
      JobError: a file cannot be read, or changes meanwhile.
    """
    shards = tuple(_shards(root, inputs, shard_size))
    return Plan(
        root=str(root),
        inputs=tuple(inputs),
        shards=shards,
        fingerprint=fingerprint,
        date=datetime.date.today().isoformat(),
    )


def changes(
    plan: Plan, root: Path, inputs: Sequence[Input], fingerprint: Mapping[str, Scalar]
) -> list[str]:
    """Returns what is not as it was when `plan` was made, a phrase each; nothing if the job can go on."""
    names = {**plan.fingerprint, **fingerprint}
    told = [
        f"{name} was {plan.fingerprint.get(name)!r}, is {fingerprint.get(name)!r}"
        for name in names
        if plan.fingerprint.get(name) != fingerprint.get(name)
    ]
    if plan.root != str(root):
        return [*told, f"the inputs' root was {plan.root}, is {root}"]
    before, now = {i.name: i for i in plan.inputs}, {i.name: i for i in inputs}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "added" if name not in before else "removed" if name not in now else "modified"
            told.append(f"input {root / name} was {what}")
    return told


def find_inputs(patterns: Sequence[str | Path], *, output: Path) -> tuple[Path, list[Input]]:
    """Returns the root of the inputs, and the files that `patterns` match, in the order of their names.

    The root is where the fixed part of the patterns ends; it does not depend on which files there are.

    Raises:
      JobError: nothing matches, a file is in no known format, or `output` would be among the inputs.
    """
    absolute = [absolute_path(pattern) for pattern in patterns]
    found: set[Path] = set()
    for pattern in absolute:
        if pattern.is_dir():
            raise JobError(f"input {pattern} is a folder; give a glob such as {pattern}/*.jsonl")
        if _would_match(pattern, output):
            raise JobError(
                f"the output folder {output} would match the input {pattern}; choose another output"
            )
        matches = glob.iglob(str(pattern), recursive=True)  # noqa: PTH207 (absolute patterns)
        files = [path for path in map(Path, matches) if not path.is_dir()]
        if not files:
            raise JobError(f"no file matches {pattern}")
        found.update(files)
    _check_formats(found)
    root = Path(os.path.commonpath([_fixed_part(pattern) for pattern in absolute]))
    names = sorted(path.relative_to(root).as_posix() for path in found)
    return root, [_stat(root, name) for name in names]


def absolute_path(path: str | Path) -> Path:
    """Returns `path` without `..`, links kept: what they lead to may have another name."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _fixed_part(pattern: Path) -> Path:
    """Returns the folder above the first wildcard, or above the file."""
    while glob.has_magic(str(pattern)):
        if not glob.has_magic(str(pattern.parent)):
            break
        pattern = pattern.parent
    return pattern.parent


def _would_match(pattern: Path, output: Path) -> bool:
    """Whether `pattern` would take what a job writes into `output` for its input."""
    fixed = _fixed_part(pattern)
    if "**" in pattern.parts:
        return output.is_relative_to(fixed)
    parts = [output / "part-00000-of-00001.jsonl", output / "errors" / "part-00000-of-00001.jsonl"]
    return any(
        len(part.parts) == len(pattern.parts) and all(map(fnmatchcase, part.parts, pattern.parts))
        for part in parts
    )


def _check_formats(paths: Iterable[Path]) -> None:
    unknown = sorted(str(path) for path in paths if path.suffix not in records.FORMATS)
    if unknown:
        known = " and ".join(records.FORMATS)
        raise JobError(
            f"{len(unknown)} of the inputs are neither {known.replace('and', 'nor')}: "
            f"{', '.join(unknown[:3])}; Parquet and compressed input are not supported yet"
        )


def _stat(root: Path, name: str) -> Input:
    try:
        name.encode()
        stat = (root / name).stat()
    except UnicodeEncodeError:
        raise JobError(f"the file name {name!r} is not UTF-8; rename the file") from None
    except OSError as error:
        raise JobError(f"cannot read input {root / name}: {error.strerror}") from error
    return Input(name, stat.st_size, stat.st_mtime_ns)


def _shards(root: Path, inputs: Sequence[Input], size: int) -> Iterator[Shard]:
    """Yields shards of `size` rows, the last one of what is left; small files share a shard."""
    number = first_row = rows = 0
    spans: list[Span] = []
    for input_number, entry in enumerate(inputs):
        start = end = 0
        first_line = line = 1
        for ends in _line_ends(root / entry.name, entry.size):
            while len(ends):
                taken, ends = ends[: size - rows], ends[size - rows :]
                rows, line, end = rows + len(taken), line + len(taken), int(taken[-1])
                if rows == size:
                    spans.append(Span(input_number, start, end, first_line))
                    yield Shard(number, first_row, rows, tuple(spans))
                    number, first_row, rows = number + 1, first_row + rows, 0
                    spans, start, first_line = [], end, line
        if end > start:
            spans.append(Span(input_number, start, end, first_line))
    if rows:
        yield Shard(number, first_row, rows, tuple(spans))


def _line_ends(path: Path, size: int) -> Iterator[np.ndarray]:
    """Yields, block by block, the offsets just after each line of the file."""
    offset = last_end = 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (offset + 1)
                offset += len(block)
                last_end = int(ends[-1]) if len(ends) else last_end
                yield ends
    except OSError as error:
        raise JobError(f"cannot read input {path}: {error.strerror}") from error
    if offset != size:
        raise JobError(
            f"input {path} is being written to ({size} bytes, then {offset}); wait for it"
        )
    if offset > last_end:  # the last line has no newline
        yield np.array([offset])


def fingerprint(
    model: Path, sampling: "Sampling", *, slots: int, precision: str | None = None
) -> dict[str, Scalar]:
    """Returns everything that changes what a row becomes, as names and values that can be told to a person."""
    return {
        "schema_version": records.SCHEMA_VERSION,
        "model": model.name,
        "revision": model_revision(model),
        "tokenizer": _digest(
            path for path in map(model.joinpath, TOKENIZER_FILES) if path.exists()
        ),
        "generation_config": _digest(path for path in [model / GENERATION_CONFIG] if path.exists()),
        **{name: _scalar(value) for name, value in dataclasses.asdict(sampling).items()},
        "slots": slots,
        "precision": precision,
        **{name: code_version(name) for name in ("core", "serve_batch")},
        **{
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "jinja2", "tokenizers")
        },
    }


def model_revision(model: Path) -> str:
    """Returns a digest of a model folder's configuration and weights, as its manifest has them.

    Raises:
      core.CheckpointError: `model` is no whole model folder.
    """
    from core import checkpoint  # imports jax

    folder = checkpoint.open(model)
    tensors = folder.manifest["tensors"]
    weights = {name: (t["dtype"], t["shape"], t["sha256"]) for name, t in tensors.items()}
    content = json.dumps([folder.config.to_dict(), weights], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _scalar(value: Any) -> Scalar:
    return value if isinstance(value, Scalar) else json.dumps(value)


@functools.cache
def code_version(package: str) -> str:
    """Returns the version of an installed package with a digest of its sources, and does not import it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise JobError(f"the package {package} is not installed")
    folder = Path(spec.submodule_search_locations[0])
    version = importlib.metadata.version(f"flaxmill-{package.replace('_', '-')}")
    return f"{version}+{_digest(sorted(folder.rglob('*.py')))[:12]}"


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
