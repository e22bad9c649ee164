"""One shard, from ranges of the input to a part: read its rows, generate, write, commit.

What a shard becomes depends on the plan and the model alone: not on the worker, the runner, the other shards, or how
often it was tried before. Beam is not needed here.
"""

import dataclasses
import hashlib
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from core import Completion, Request, RequestError, Sampling
from serve_batch import asking, host, inputs, parts, records, stores
from serve_batch import plan as plan_lib
from serve_batch.asking import Outcome
from serve_batch.errors import JobError
from serve_batch.output import OutputFolder, Receipt
from serve_batch.plan import Plan, Shard
from serve_batch.records import LongPrompts, Prompt, RowError, Source

REPORTED_ROWS = 64
"""Rows between two words of progress."""


class Row(NamedTuple):
    number: int
    """In the whole input, from 0."""
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
    long_prompts: LongPrompts = "error"
    retried_codes: frozenset[str] | None = None
    """Of the error rows that are done again in shards that are done; empty for all, None for none."""
    retried_with: Mapping[str, plan_lib.Scalar] = dataclasses.field(default_factory=dict)
    """What of the fingerprint is not the plan's when error rows are done again."""

    def plan(self) -> Plan:
        """Returns what the launcher has written down.

        Raises:
          JobError: it cannot be seen from here.
        """
        plan = self.output.read_plan()
        if plan is None:
            raise JobError(
                f"there is no plan in {self.output.place} for a worker on {socket.gethostname()}: workers use "
                "the launcher's paths, so the output folder, the input and the model lie where all see them"
            )
        return plan

    def start(self) -> "Work":
        """Returns what this process needs for any shard of the job; loads the model if no earlier call did.

        Raises:
          JobError: this process has other versions of the code, or another model.
        """
        plan = self.plan()
        revision = self._check_fingerprint(plan)
        engine = host.shared(
            self.model,
            slots=self.slots,
            revision=revision,
            precision=self.precision,
            top_logprobs=self.sampling.logprobs or 0,
        )
        return Work(job=self, plan=plan, engine=engine, device=host.device())

    def _check_fingerprint(self, plan: Plan) -> str:
        """Returns the revision of the model, once all that changes a record is found to be what was planned."""
        expected = {**plan.fingerprint, **self.retried_with}
        host.check_code(str(expected.get("core")))
        found = plan_lib.fingerprint(
            self.model,
            self.sampling,
            slots=self.slots,
            precision=self.precision,
            long_prompts=self.long_prompts,
            output_format=plan.output_format,
        )
        if told := plan_lib.differences(expected, found):
            raise JobError(
                f"a worker on {socket.gethostname()} has not what the job was planned with: "
                f"{'; '.join(told[:4])}; install the same packages and the same model for both"
            )
        return str(found["revision"])


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
    """Yields the rows of `shard`, one at a time.

    Raises:
      JobError: an input is damaged, or not what it was.
    """
    index = shard.first_row
    store = stores.at(plan.root)
    for span in shard.spans:
        entry = plan.inputs[span.input]
        format = inputs.line_format(entry.name)
        rows = inputs.rows(store, entry, span.start, span.end)
        for line, (offset, found) in enumerate(rows, start=span.line):
            yield Row(index, Source(entry.name, offset, line), _content(found, format, defaults))
            index += 1


def _content(
    found: bytes | dict[str, Any] | RowError, format: records.Format | None, defaults: Sampling
) -> Prompt | RowError:
    if isinstance(found, bytes):
        assert format is not None
        return records.parse(found, format, defaults)
    return found if isinstance(found, RowError) else records.from_fields(found, defaults)


def generate(shard: Shard, work: Work) -> Receipt:
    """Generates `shard` and commits it; of a shard that is done, the error rows that the job is to do again.

    Raises:
      JobError: the input is not what was planned. Whatever else is raised comes from the engine or the disk; no part
        or receipt is left in any case, or those that were there.
    """
    done = work.job.output.receipt(work.plan, shard)
    if done is not None:  # a runner may ask again for what is done
        return _retry(shard, done, work) if done.selected(work.job.retried_codes) else done
    output, plan = work.job.output, work.plan
    if work.job.retried_with:
        raise JobError(
            f"shard {shard.number} is no longer done, and would be done with other settings than the job's "
            f"({', '.join(work.job.retried_with)}); run the job without --retry_errors first"
        )
    rows = ((row, None) for row in read(plan, shard, work.job.sampling))
    with output.store.writing(plan.part_name(shard)) as file:
        written = _write(file, rows, shard, work)
        output.expect_plan(plan)
        output.write_errors(plan, shard, written.failed)
    output.write_receipt(shard, written.receipt)
    return written.receipt


def _retry(shard: Shard, done: Receipt, work: Work) -> Receipt:
    """Does the error rows of a finished shard again; see `serve_batch.output` for the order of its steps."""
    output, plan = work.job.output, work.plan
    output.expect_whole(plan, shard, done)
    kept = (
        None if _is_retried(record, work.job) else Kept(as_it_is, record)
        for as_it_is, record in output.read_part(plan, shard)
    )
    rows = zip(read(plan, shard, work.job.sampling), kept, strict=True)
    with output.store.writing(plan.part_name(shard)) as file:
        written = _write(file, rows, shard, work)
        receipt = dataclasses.replace(written.receipt, retried_with=dict(work.job.retried_with))
        output.expect_plan(plan)
        output.write_receipt(shard, dataclasses.replace(receipt, previous=done))
    output.write_errors(plan, shard, written.failed)
    output.write_receipt(shard, receipt)
    return receipt


def _is_retried(record: Mapping[str, Any], job: Job) -> bool:
    codes = job.retried_codes
    return record["status"] == "error" and (not codes or record["error"]["code"] in codes)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A record that is not done again, as it stands in its part and as it reads."""

    as_it_is: Any
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Written:
    receipt: Receipt
    failed: list[Any]
    """The error records, as they are kept."""


def _write(
    file: BinaryIO, rows: Iterable[tuple[Row, Kept | None]], shard: Shard, work: Work
) -> _Written:
    """Writes the part of `shard`, the records that are kept and those of the rows that have to be done.

    Raises:
      JobError: these are not the rows that were planned.
    """
    tally, model = _Tally(), work.model
    failed: list[Any] = []
    with parts.Writer(file, work.plan.output_format) as part:
        for row, outcome, truncated in _complete(rows, work):
            if isinstance(outcome, Kept):
                kept, record = outcome.as_it_is, outcome.record
                part.keep(kept)
            else:
                record = records.record(
                    row.content,
                    outcome,
                    index=row.number,
                    source=row.source,
                    model=model,
                    answers=asking.answers(row.content, outcome, work.engine),
                    truncated=truncated,
                )
                kept = part.write(record)
            if tally.add(row, record):
                failed.append(kept)
    if tally.rows != shard.rows:
        raise JobError(
            f"shard {shard.number} was planned with {shard.rows} rows, now has {tally.rows}: an input was "
            "modified while the job ran; start again with --overwrite"
        )
    return _Written(tally.receipt(work.plan, shard, work.device, part), failed)


def _complete(
    rows: Iterable[tuple[Row, Kept | None]], work: Work
) -> Iterator[tuple[Row, Outcome | Kept, int]]:
    """Yields each row with what became of it and how many tokens of its prompt were left out, in order."""
    samples: list[Completion | RequestError | RowError] = []
    unsaid: list[Outcome] = []
    reports = work.job.reports_progress
    for (row, count, truncated), result in work.engine.complete(_requests(rows, work)):
        outcome: Outcome | Kept
        if isinstance(result, Kept):
            outcome = result
        else:
            samples.append(result)
            if len(samples) < count:
                continue
            outcome = asking.outcome(row.content, samples)
            samples = []
        if reports:
            unsaid.append([] if isinstance(outcome, Kept) else outcome)
            if len(unsaid) == REPORTED_ROWS:
                _report(work.job.output.progress_file, unsaid)
                unsaid.clear()
        yield row, outcome, truncated
    if unsaid:
        _report(work.job.output.progress_file, unsaid)


def _requests(
    rows: Iterable[tuple[Row, Kept | None]], work: Work
) -> Iterator[tuple[tuple[Row, int, int], Request | RequestError | RowError | Kept]]:
    """Yields what to ask of the engine, a request a sample, or why there is nothing to ask.

    With it go the row, how many samples it has, and how many tokens of its prompt are left out.
    """
    now, long_prompts = work.plan.now, work.job.long_prompts
    for row, kept in rows:
        content = row.content
        if kept is not None:
            yield (row, 1, 0), kept
            continue
        if isinstance(content, RowError):
            yield (row, 1, 0), content
            continue
        key = row.source.key if content.id is None else str(content.id)
        try:
            samples, truncated = asking.requests(
                content, key, work.engine, now=now, long_prompts=long_prompts
            )
        except RequestError as error:
            yield (row, 1, 0), error
            continue
        for request in samples:
            yield (row, content.n, truncated), request


def _report(path: Path, results: list[Outcome]) -> None:
    """Appends one short line, which the system keeps whole, for the launcher to read."""
    tokens = sum(len(c.tokens) for r in results if not isinstance(r, RowError) for c in r)
    errors = sum(isinstance(r, RowError) for r in results)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{len(results)} {tokens} {errors}\n".encode())
    finally:
        os.close(descriptor)


class _Tally:
    """What a receipt counts, as the records go by."""

    def __init__(self) -> None:
        self.rows = self._truncated = self._prompt_tokens = self._completion_tokens = 0
        self._errors: Counter[str] = Counter()
        self._ids: list[bytes] = []

    def add(self, row: Row, record: Mapping[str, Any]) -> bool:
        """Counts a record; returns whether it is an error."""
        self.rows += 1
        if row.content.id is not None:
            kind_and_id = f"{type(row.content.id).__name__} {row.content.id}"
            self._ids.append(hashlib.blake2b(kind_and_id.encode(), digest_size=8).digest())
        if record["status"] == "error":
            self._errors[record["error"]["code"]] += 1
            return True
        self._truncated += record["truncated_tokens"] > 0
        self._prompt_tokens += record["prompt_tokens"]
        self._completion_tokens += record["completion_tokens"]
        return False

    def receipt(self, plan: Plan, shard: Shard, device: str, part: parts.Writer) -> Receipt:
        return Receipt(
            plan=plan.digest,
            shard=shard.number,
            rows=self.rows,
            errors=dict(sorted(self._errors.items())),
            truncated=self._truncated,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            nbytes=part.nbytes,
            sha256=part.sha256,
            device=device,
            ids=b"".join(self._ids).hex(),
        )
