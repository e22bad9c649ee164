"""The Beam pipeline of a job and the runner it runs on; the only module that imports apache_beam.

    the job -> unfinished shards (numbers) -> Reshuffle -> GenerateShards -> receipts

Beam carries shard numbers and receipts, never a prompt: runners keep what flows between stages in memory. Whatever a
worker needs beyond a number it reads from the plan. There is one output, because some runners compute a stage once for
each of several.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from core.errors import FlaxmillError
from serve_batch.plan import UsageError
from serve_batch.shards import Job, Work, generate


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Beam's log lines to itself, and leaves logging as it found it; a failure is raised, not logged."""
    root, beam_logger = logging.getLogger(), logging.getLogger("apache_beam")
    handlers, level = list(root.handlers), beam_logger.level
    if not handlers:
        root.addHandler(logging.NullHandler())  # else Beam calls logging.basicConfig
    # Logged to the root logger while apache_beam is imported without its gcp extra.
    root.addFilter(_is_not_about_apitools)
    beam_logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        root.removeFilter(_is_not_about_apitools)
        root.handlers[:] = handlers
        beam_logger.setLevel(level)


def _is_not_about_apitools(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("apitools not found")


with quiet():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle
    from apache_beam.runners.runner import PipelineRunner


class GenerateError(Exception):
    """Why a shard could not be done, in one line; Beam carries the message alone from a worker to the launcher."""


class GenerateShards(beam.DoFn):
    """Shard numbers to receipts. A bad row is an error record in the part; whatever is raised fails the job."""

    def __init__(self, job: Job):
        self._job = job
        self._work: Work | None = None

    def setup(self) -> None:
        with _told_in_one_line("starting a worker"):
            self._work = self._job.start()

    def process(self, element: int) -> Iterator[dict[str, Any]]:
        assert self._work is not None
        with _told_in_one_line(f"shard {element}"):
            receipt = generate(self._work.plan.shards[element], self._work)
        yield dataclasses.asdict(receipt)


@contextlib.contextmanager
def _told_in_one_line(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        what = (
            str(error) if isinstance(error, FlaxmillError) else f"{type(error).__name__}: {error}"
        )
        raise GenerateError(f"{doing} failed: {' '.join(what.split())}") from error


def unfinished(job: Job) -> Iterator[int]:
    """Yields the numbers of the shards that have no receipt yet."""
    plan = job.output.read_plan()
    assert plan is not None
    for shard in plan.shards:
        if job.output.receipt(plan, shard) is None:
            yield shard.number


def run(job: Job, runner: PipelineRunner | str, options: PipelineOptions) -> None:
    """Runs the pipeline of `job` to its end."""
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        _ = (
            pipeline
            | "Job" >> beam.Create([job])
            | "Unfinished" >> beam.FlatMap(unfinished)
            | "Reshuffle" >> beam.Reshuffle()
            | "Generate" >> beam.ParDo(GenerateShards(job))
        )


def pipeline_options(flags: Sequence[str]) -> PipelineOptions:
    """Returns Beam's options from `--name=value` strings.

    Raises:
      UsageError: Beam has no such option, or a flag of our own decides it.
    """
    options = PipelineOptions(["--default_sdk_harness_log_level=ERROR", *flags])
    with quiet():  # it warns of what it discards
        known = options.get_all_options().keys()
    if unknown := options.get_all_options(retain_unknown_options=True).keys() - known:
        raise UsageError(f"Beam {beam.__version__} has no option --{min(unknown)}")
    given = PipelineOptions(list(flags)).get_all_options(drop_default=True)
    if ours := given.keys() & {"runner", "direct_num_workers", "direct_running_mode"}:
        raise UsageError(f"--{min(ours)} after `--`: use --runner and --workers before it instead")
    return options


def local(beam_options: Sequence[str] = ()) -> tuple[PipelineRunner, PipelineOptions]:
    """Returns Beam's in-process runner, made by ourselves, and its options.

    By name, `DirectRunner` would try to download the Prism runner first and wait for a dead network without end, and
    `FnApiRunner` would give its workers no options at all (beam#34549, and fn_runner.py of 2.77).
    """
    options = pipeline_options(beam_options)
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    runner = fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(info))
    return runner, options


def cause(error: Exception) -> str:
    """Returns in one line why a pipeline failed, from what Beam made of it: a message or a whole traceback."""
    last = str(error).strip().rpartition("\n")[2]
    last = re.sub(r" \[while running '[^']*'\]$", "", last)
    return re.sub(r"^[\w.]*GenerateError: ", "", last) or type(error).__name__
