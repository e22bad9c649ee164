"""One shard, from byte ranges to a part: read its rows, generate, write, commit.

What a shard becomes depends on the plan and the model alone: not on the worker, the runner, the other shards, or how
often it was tried before. Beam is not needed here.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core import Completion, Request, RequestError, Sampling
from serve_batch import host, records
from serve_batch.output import OutputFolder, Receipt, committing
from serve_batch.plan import JobError, Plan, Shard, Span
from serve_batch.records import Conversation, Prompt, RowError, Source

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
REPORTED_ROWS = 64
"""Rows between two words of progress."""


@dataclasses.dataclass(frozen=True)
class Row:
    index: int
    source: Source
    content: Prompt | RowError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told: little, and all of it small; the rest is in the plan."""

    model: Path
    output: OutputFolder
    sampling: Sampling
    slots: int
    reports_progress: bool
    precision: str | None = None

    def start(self) -> "Work":
        """Returns what this process needs for any shard of the job; loads the model if no earlier call did.

        Raises:
          JobError: this process has another `core` or another model.
        """
        plan = self.output.read_plan()
        if plan is None:
            raise JobError(f"{self.output.plan_file} is gone; start the job again")
        fingerprint = plan.fingerprint
        host.check_code(str(fingerprint["core"]))
        revision = str(fingerprint["revision"])
        engine = host.shared(
            self.model, slots=self.slots, revision=revision, precision=self.precision
        )
        return Work(job=self, plan=plan, engine=engine, device=host.device())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A job as one process does it."""

    job: Job
    plan: Plan
    engine: host.EngineHost
    device: str

    @property
    def model(self) -> dict[str, str]:
        """The model as records name it."""
        name, revision = (str(self.plan.fingerprint[key]) for key in ("model", "revision"))
        return {"name": name, "revision": revision[:16]}


def read(plan: Plan, shard: Shard, defaults: Sampling) -> Iterator[Row]:
    """Yields the rows of `shard`, a line at a time."""
    index = shard.first_row
    for span in shard.spans:
        name = plan.inputs[span.input].name
        path = Path(plan.root, name)
        format = records.FORMATS[path.suffix]
        for line_number, (offset, line) in enumerate(_lines(path, span), start=span.line):
            source = Source(name, offset, line_number)
            yield Row(index, source, records.parse(line, format, defaults))
            index += 1


def _lines(path: Path, span: Span) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of `span` with their offsets; of one that is too long, only a beginning that shows it."""
    limit = records.MAX_LINE_BYTES + len(_BYTE_ORDER_MARK) + len(b"\r\n")
    with path.open("rb") as file:
        file.seek(span.start)
        offset = span.start
        while offset < span.end:
            line = file.readline(limit)
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(limit)
            # A byte order mark belongs to the file, not to its first row.
            yield offset, line.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else line
            offset = file.tell()


def generate(shard: Shard, work: Work) -> Receipt:
    """Generates `shard` and commits its errors, its part and its receipt, in this order.

    Raises:
      JobError: the input is not what was planned. Whatever else is raised comes from the engine or the disk; no part
        or receipt is left in any case.
    """
    tally = _Tally()
    failed: list[bytes] = []
    with committing(work.job.output.part_file(work.plan, shard)) as part:
        for row, result in _complete(shard, work):
            fields = records.record(
                row.content,
                result,
                index=row.index,
                source=row.source,
                model=work.model,
                answer=_answer(row, result, work),
            )
            line = records.to_line(fields)
            part.write(line)
            tally.add(row, result, line)
            if isinstance(result, RowError):
                failed.append(line)
        if tally.rows != shard.rows:
            raise JobError(
                f"shard {shard.number} was planned with {shard.rows} rows, now has {tally.rows}: an input was "
                "modified while the job ran; start again with --overwrite"
            )
        if failed:
            with committing(work.job.output.errors_file(work.plan, shard)) as errors:
                errors.writelines(failed)
    receipt = tally.receipt(shard, work.device)
    work.job.output.write_receipt(shard, receipt)
    return receipt


def _complete(shard: Shard, work: Work) -> Iterator[tuple[Row, Completion | RowError]]:
    """Yields each row of `shard` with what became of it, in order."""
    rows = read(work.plan, shard, work.job.sampling)
    unsaid: list[Completion | RowError] = []
    for row, result in work.engine.complete((row, _request(row, work)) for row in rows):
        outcome = _outcome(row.content, result)
        if work.job.reports_progress:
            unsaid.append(outcome)
        if len(unsaid) == REPORTED_ROWS:
            _report(work.job.output.progress_file, unsaid)
            unsaid.clear()
        yield row, outcome
    if unsaid:
        _report(work.job.output.progress_file, unsaid)


def _request(row: Row, work: Work) -> Request | RequestError | RowError:
    """Returns what to ask of the engine, or why there is nothing to ask."""
    if isinstance(row.content, RowError):
        return row.content
    prompt = row.content.prompt
    if isinstance(prompt, Conversation):
        try:
            prompt = work.engine.encode(prompt, work.plan.now)
        except RequestError as error:
            return error
    own_id = row.content.id
    key = row.source.key if own_id is None else str(own_id)
    return Request(prompt, row.content.sampling, id=key)


def _answer(row: Row, result: Completion | RowError, work: Work) -> Mapping[str, Any] | None:
    """Returns what `core.harmony.answer` says of a chat model's completion; None for any other."""
    if isinstance(row.content, RowError) or isinstance(result, RowError):
        return None
    if not isinstance(row.content.prompt, Conversation):
        return None
    return work.engine.answer(result, row.content.sampling.stop)


def _outcome(
    row: Prompt | RowError, result: Completion | RequestError | RowError
) -> Completion | RowError:
    if isinstance(result, RequestError):
        return RowError(code=result.code, message=str(result), id=row.id, input=row.input)
    return result


def _report(path: Path, results: list[Completion | RowError]) -> None:
    """Appends one short line, which the system keeps whole, for the launcher to read."""
    tokens = sum(len(r.tokens) for r in results if isinstance(r, Completion))
    errors = sum(isinstance(r, RowError) for r in results)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{len(results)} {tokens} {errors}\n".encode())
    finally:
        os.close(descriptor)


class _Tally:
    """What a receipt counts, as the rows go by."""

    def __init__(self) -> None:
        self.rows = self._prompt_tokens = self._completion_tokens = self._bytes = 0
        self._errors: Counter[str] = Counter()
        self._sha256 = hashlib.sha256()
        self._ids: list[str] = []

    def add(self, row: Row, result: Completion | RowError, line: bytes) -> None:
        self.rows += 1
        self._bytes += len(line)
        self._sha256.update(line)
        if row.content.id is not None:
            kind_and_id = f"{type(row.content.id).__name__} {row.content.id}"
            self._ids.append(hashlib.blake2b(kind_and_id.encode(), digest_size=8).hexdigest())
        if isinstance(result, RowError):
            self._errors[result.code] += 1
        else:
            self._prompt_tokens += len(result.prompt_tokens)
            self._completion_tokens += len(result.tokens)

    def receipt(self, shard: Shard, device: str) -> Receipt:
        return Receipt(
            shard=shard.number,
            rows=self.rows,
            errors=dict(sorted(self._errors.items())),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            bytes=self._bytes,
            sha256=self._sha256.hexdigest(),
            device=device,
            ids="".join(self._ids),
        )
