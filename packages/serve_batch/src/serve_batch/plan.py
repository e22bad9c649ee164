"""What a job will do, decided before it starts and written down: the input files, the shards, and the fingerprint.

A shard is a run of consecutive rows, kept as ranges of the input files (`serve_batch.inputs`), so that a worker reads
them itself; no prompt ever travels through the pipeline. Shards follow the order of the input, hence the parts
they become, concatenated, do too. The fingerprint names everything that changes a row's output: a job resumes only
where it is the same.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from core.config import PRECISIONS
from core.tokenizer import GENERATION_CONFIG, TOKENIZER_FILES
from serve_batch import inputs as inputs_lib
from serve_batch import records, stores
from serve_batch.errors import JobError, UsageError
from serve_batch.inputs import Input

if TYPE_CHECKING:
    from core import Sampling

Scalar = str | int | float | bool | None
OutputFormat = Literal["jsonl", "parquet"]
OUTPUT_FORMATS: tuple[OutputFormat, ...] = ("jsonl", "parquet")


class Span(NamedTuple):
    """Whole rows of one input: from `start` to `end` as `inputs.row_ends` counts, the first of them number `line`."""

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
        return f"part-{shard.number:05d}-of-{len(self.shards):05d}.{self.output_format}"

    @functools.cached_property
    def digest(self) -> str:
        """Which plan it is, to those who have read it before."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def output_format(self) -> OutputFormat:
        return cast(OutputFormat, self.fingerprint["output_format"])

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Plan":
        """Raises ValueError where `content` is no plan of this version."""
        try:
            plan = cls._of(json.loads(content))
            plan._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return plan

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> "Plan":
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

    def _check(self) -> None:
        """Raises ValueError or TypeError for what `make` would not have made."""
        _expect(isinstance(self.root, str), "a root that is no string")
        _expect(self.output_format in OUTPUT_FORMATS, "no output format")
        _expect(all(isinstance(v, Scalar) for v in self.fingerprint.values()), "a fingerprint")
        for entry in self.inputs:
            _expect(isinstance(entry.name, str), "an input without a name")
            _expect(type(entry.size) is int and isinstance(entry.version, str | int), "an input")
        ends, row = [0] * len(self.inputs), 0
        for number, shard in enumerate(self.shards):
            numbers = (*shard[:3], *(n for span in shard.spans for n in span))
            _expect(all(type(n) is int and n >= 0 for n in numbers), "a shard")
            _expect(shard[:2] == (number, row) and shard.rows > 0, "shards that do not follow")
            row += shard.rows
            for span in shard.spans:
                is_next = span.input < len(ends) and span.start == ends[span.input] < span.end
                _expect(is_next and span.line > 0, "ranges that do not follow")
                ends[span.input] = span.end
        for entry, end in zip(self.inputs, ends, strict=True):
            whole = end == entry.size or not inputs_lib.is_by_bytes(entry.name)
            _expect(whole, f"not all of {entry.name}")


def _expect(holds: bool, found: str) -> None:
    if not holds:
        raise ValueError(f"it has {found}")


def check_settings(*, slots: int, precision: str | None, long_prompts: str) -> None:
    """Raises UsageError for settings of an engine and its rows that cannot be."""
    if slots < 1:
        raise UsageError(f"slots is {slots}; expected 1 or more")
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if long_prompts not in records.LONG_PROMPTS:
        choices = ", ".join(records.LONG_PROMPTS)
        raise UsageError(f"long_prompts {long_prompts!r} is not one of {choices}")


def make(
    root: str,
    inputs: Sequence[Input],
    *,
    shard_size: int,
    fingerprint: Mapping[str, Scalar],
) -> Plan:
    """Returns the plan for `inputs`, reading each once to find its rows: about a second per gigabyte.

    Raises:
      JobError: a file cannot be read, is damaged, or changes meanwhile.
    """
    shards = tuple(_shards(root, inputs, shard_size))
    return Plan(
        root=root,
        inputs=tuple(inputs),
        shards=shards,
        fingerprint=fingerprint,
        date=datetime.date.today().isoformat(),
    )


def changes(
    plan: Plan, root: str, inputs: Sequence[Input], fingerprint: Mapping[str, Scalar]
) -> list[str]:
    """Returns what is not as it was when `plan` was made, a phrase each; nothing if the job can go on."""
    told = differences(plan.fingerprint, fingerprint)
    if plan.root != root:
        return [*told, f"the inputs' root was {plan.root}, is {root}"]
    before, now = {i.name: i for i in plan.inputs}, {i.name: i for i in inputs}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "added" if name not in before else "removed" if name not in now else "modified"
            told.append(f"input {root}/{name} was {what}")
    return told


def differences(was: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> list[str]:
    """Returns in what two fingerprints differ, a phrase each."""
    return [
        f"{name} was {was.get(name)!r}, is {now.get(name)!r}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]


def absolute_path(path: str | Path) -> Path:
    """Returns `path` without `..`, links kept: what they lead to may have another name."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _shards(root: str, inputs: Sequence[Input], size: int) -> Iterator[Shard]:
    """Yields shards of `size` rows, the last one of what is left; small files share a shard."""
    store = stores.at(root)
    number = first_row = rows = 0
    spans: list[Span] = []
    for input_number, entry in enumerate(inputs):
        start = end = 0
        first_line = line = 1
        for ends in inputs_lib.row_ends(store, entry):
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


def fingerprint(
    model: Path,
    sampling: "Sampling",
    *,
    slots: int,
    precision: str | None = None,
    long_prompts: records.LongPrompts = "error",
    output_format: OutputFormat = "jsonl",
) -> dict[str, Scalar]:
    """Returns everything that changes what a row becomes, as names and values that can be told to a person."""
    return {
        "schema_version": records.SCHEMA_VERSION,
        "model": model.name,
        "revision": model_revision(model),
        **text_files(model),
        **{name: _scalar(value) for name, value in dataclasses.asdict(sampling).items()},
        "slots": slots,
        "precision": precision,
        "long_prompts": long_prompts,
        "output_format": output_format,
        **{name: code_version(name) for name in ("core", "serve_batch")},
        **{
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "jinja2", "msgspec", "pyarrow", "tokenizers")
        },
    }


def text_files(model: Path) -> dict[str, str]:
    """Returns digests of what a model folder says, beside its weights, about text: read whenever it is loaded."""
    names = {"tokenizer": TOKENIZER_FILES, "generation_config": (GENERATION_CONFIG,)}
    return {
        told: _digest(path for path in map(model.joinpath, files) if path.exists())
        for told, files in names.items()
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
    sources = [path for path in folder.rglob("*") if path.suffix in (".py", ".cc", ".h")]
    return f"{version}+{_digest(sorted(sources))[:12]}"


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
