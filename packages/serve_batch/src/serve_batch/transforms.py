"""Prompts to completions inside a pipeline of one's own: `Generate`.

A bundle streams through: prompts fill the slots of the process's engine as they come, and a record goes on as soon as
its row is finished, with the timestamp and the window of its prompt. What a row becomes depends on the row alone, as in
a job of files (`serve_batch.run`), which is what to use for millions of prompts: it resumes.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import core
from serve_batch import asking, host, plan, records, runners
from serve_batch.records import LongPrompts, Prompt, RowError, Source

with runners.quiet():
    import apache_beam as beam
    from apache_beam import pvalue
    from apache_beam.metrics.metric import Metrics
    from apache_beam.pvalue import PCollection
    from apache_beam.utils.windowed_value import WindowedValue

_FAILED = "failed"
_NAMESPACE = "serve_batch"


class Generated(NamedTuple):
    ok: PCollection
    failed: PCollection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What serves rows: a model as it was when the pipeline was made, and how it is run."""

    model: Path
    revision: str
    code: str
    sampling: core.Sampling
    slots: int
    precision: str | None
    long_prompts: LongPrompts
    date: str

    @classmethod
    def of(
        cls,
        model: str | Path,
        *,
        sampling: core.Sampling | None,
        slots: int,
        precision: str | None,
        long_prompts: LongPrompts = "error",
    ) -> "Serving":
        """Raises UsageError for arguments that cannot be, core.CheckpointError where there is no model."""
        plan.check_settings(slots=slots, precision=precision, long_prompts=long_prompts)
        folder = Path(plan.absolute_path(model))
        return cls(
            model=folder,
            revision=plan.model_revision(folder),
            code=plan.code_version("core"),
            sampling=sampling or core.Sampling(),
            slots=slots,
            precision=precision,
            long_prompts=long_prompts,
            date=datetime.date.today().isoformat(),
        )

    @property
    def now(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.date)

    def engine(self) -> host.EngineHost:
        """Returns the process's engine, loaded if it is not there.

        Raises:
          JobError: this process has another `core` or another model than the pipeline was made with.
        """
        host.check_code(self.code)
        return host.shared(
            self.model,
            slots=self.slots,
            revision=self.revision,
            precision=self.precision,
            top_logprobs=self.sampling.logprobs or 0,
        )


@dataclasses.dataclass(eq=False)
class Row:
    """A row on its way: what is asked, and what has come of it."""

    content: Prompt | RowError
    requests: list[core.Request]
    truncated: int = 0
    results: dict[int, core.Completion | core.RequestError] = dataclasses.field(
        default_factory=dict
    )

    @classmethod
    def of(cls, element: Any, serving: Serving, engine: host.EngineHost) -> "Row":
        """Returns a row as it is asked; one that cannot be has no requests."""
        content = _content(element, serving.sampling)
        if isinstance(content, RowError):
            return cls(content, [])
        try:
            # A collection has no order, so a row that brings no id is known by what it asks.
            key = _digest(element) if content.id is None else str(content.id)
            requests, truncated = asking.requests(
                content, key, engine, now=serving.now, long_prompts=serving.long_prompts
            )
        except core.RequestError as error:
            return cls(asking.refused(content, error), [])
        return cls(content, requests, truncated)

    @property
    def is_done(self) -> bool:
        return len(self.results) == len(self.requests)

    def record(self, serving: Serving, engine: host.EngineHost) -> dict[str, Any]:
        """Returns the record of a row that is done: that of a job of files, without a place in a file."""
        samples = [result for _, result in sorted(self.results.items())]
        content = self.content
        outcome = content if isinstance(content, RowError) else asking.outcome(content, samples)
        record = records.record(
            content,
            outcome,
            index=0,
            source=Source("", 0, 0),
            model={"name": serving.model.name, "revision": serving.revision[:16]},
            answers=asking.answers(content, outcome, engine),
            truncated=self.truncated,
        )
        del record["index"], record["source"]
        return record | {"id": content.id}


def _content(element: Any, sampling: core.Sampling) -> Prompt | RowError:
    if isinstance(element, str):
        return Prompt(prompt=element, sampling=sampling)
    if isinstance(element, Mapping):
        return records.from_fields(dict(element), sampling)
    what = type(element).__name__
    return RowError(code="not_an_object", message=f"expected a str or a dict, found {what}")


def _digest(element: Any) -> str:
    """Raises core.RequestError where `element` holds what JSON has not."""
    try:
        said = json.dumps(element, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise core.RequestError(
            "bad_id", f"the row has no id, and holds what cannot be written as JSON: {error}"
        ) from error
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Generate(beam.PTransform):
    """Prompts to records of completions, `.ok` and `.failed`.

    A prompt is a str, or a dict with the fields of a row of a JSONL file. With a key before it, `(key, prompt)`, its
    record has that key: `(key, record)`.

        results = prompts | serve_batch.Generate("models/gpt2", sampling=core.Sampling(max_new_tokens=50))
        results.ok | beam.Map(lambda record: record["text"])

    A process has one engine, so all `Generate`s of a pipeline must have the same model and settings.
    A row that cannot be served is a record with an error in `.failed`, an engine that fails raises. Draws depend on the
    seed, the row's `id` (without one, on what it asks) and the token's position.

    Args:
      model: a model folder; workers find it under the same path, and the same model in it.
      sampling: for rows that do not say otherwise.
      slots: rows that decode together in a process. A bundle wants 64 rows a slot, or more.
      precision: one of `core.config.PRECISIONS`; by default what the model is stored in.
      long_prompts: what is done with a prompt that does not fit; one of `records.LONG_PROMPTS`.

    Raises:
      UsageError: arguments that cannot be.
      core.CheckpointError: `model` is no whole model folder.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        sampling: core.Sampling | None = None,
        slots: int = 16,
        precision: str | None = None,
        long_prompts: LongPrompts = "error",
    ):
        super().__init__()
        self._serving = Serving.of(
            model,
            sampling=sampling,
            slots=slots,
            precision=precision,
            long_prompts=long_prompts,
        )

    def expand(self, input_or_inputs: PCollection):  # Beam takes a `-> Generated` for an element's
        results: Any = input_or_inputs | beam.ParDo(_Generate(self._serving)).with_outputs(
            _FAILED, main="ok"
        )
        return Generated(ok=results["ok"], failed=results[_FAILED])


@dataclasses.dataclass(eq=False)
class _Element:
    """A row in the pipeline: its key, if it has one, its time and its window."""

    row: Row
    key: tuple[Any, ...]
    timestamp: Any
    window: Any

    def output(self, record: dict[str, Any]) -> Any:
        value = (*self.key, record) if self.key else record
        output = WindowedValue(value, self.timestamp, (self.window,))
        return output if record["status"] == "ok" else pvalue.TaggedOutput(_FAILED, output)


class _Generate(beam.DoFn):
    def __init__(self, serving: Serving):
        self._serving = serving

    def start_bundle(self) -> None:
        # Not in `setup`: what fails there, Flink and Spark learn of after three minutes, each time that they try.
        self._engine = self._serving.engine()
        self._call: host.Call[tuple[_Element, int]] = self._engine.call()

    def process(
        self,
        element: Any,
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Any]:
        key, prompt = ((element[0],), element[1]) if _is_keyed(element) else ((), element)
        row = Row.of(prompt, self._serving, self._engine)
        asked = _Element(row, key, timestamp, window)
        if not row.requests:
            yield self._finish(asked)
        for sample, request in enumerate(row.requests):
            while self._call.asked >= self._engine.room:
                yield from self._take()
            self._call.ask((asked, sample), request)
        while self._call.has_results:
            yield from self._take()

    def finish_bundle(self) -> Any:
        while self._call.asked:
            yield from self._take()

    def teardown(self) -> None:
        if hasattr(self, "_call"):  # a bundle that failed
            self._call.close()

    def _take(self) -> Iterator[Any]:
        """Waits for a result; yields the record of a row that is done with it."""
        (asked, sample), result = self._call.take()
        asked.row.results[sample] = result
        if asked.row.is_done:
            yield self._finish(asked)

    def _finish(self, asked: _Element) -> Any:
        record = asked.row.record(self._serving, self._engine)
        _count(record)
        return asked.output(record)


def _is_keyed(element: Any) -> bool:
    return isinstance(element, tuple) and len(element) == 2


def _count(record: Mapping[str, Any]) -> None:
    _counter("rows").inc()
    if record["error"]:
        _counter("errors").inc()
        _counter(f"errors.{record['error']['code']}").inc()
        return
    _counter("prompt_tokens").inc(record["prompt_tokens"])
    _counter("completion_tokens").inc(record["completion_tokens"])
    Metrics.distribution(_NAMESPACE, "completion_tokens_per_row").update(
        record["completion_tokens"]
    )


@functools.cache
def _counter(name: str) -> Any:
    return Metrics.counter(_NAMESPACE, name)
