"""The Beam pipeline of a job and the runner it runs on.

    the job -> unfinished shards (numbers) -> Reshuffle -> GenerateShards -> receipts

Beam carries shard numbers and receipts, never a prompt: runners keep what flows between stages in memory. Whatever a
worker needs beyond a number it reads from the plan. There is one output, because some runners compute a stage once for
each of several.
"""

import contextlib
import dataclasses
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from core.errors import FlaxmillError
from serve_batch import errors
from serve_batch.errors import UsageError
from serve_batch.shards import Job, Work, generate


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Beam's log lines to itself, and leaves logging as it found it; a failure is raised, not logged."""
    root, beam_logger = logging.getLogger(), logging.getLogger("apache_beam")
    servers = [logging.getLogger(name) for name in _JOB_SERVERS]
    handlers, level = list(root.handlers), beam_logger.level
    disabled = [server.disabled for server in servers]
    if not handlers:
        root.addHandler(logging.NullHandler())  # else Beam calls logging.basicConfig
    not_of_beam = _NotOfBeam()
    root.addFilter(not_of_beam)
    beam_logger.setLevel(logging.CRITICAL + 1)
    for server in servers:
        server.disabled = True  # they set their own level
    try:
        yield
    finally:
        root.removeFilter(not_of_beam)
        root.handlers[:] = handlers
        beam_logger.setLevel(level)
        for server, before in zip(servers, disabled, strict=True):
            server.disabled = before


_JOB_SERVERS = ("FlinkJarJobServer", "SparkJarJobServer", "PrismJobServer")


class _NotOfBeam(logging.Filter):
    """Drops what Beam logs to the root logger: what a job server says, and what it misses at its import."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "apache_beam" not in record.pathname


with quiet():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle
    from apache_beam.runners.runner import PipelineResult, PipelineRunner
    from apache_beam.runners.worker import sdk_worker


class GenerateError(Exception):
    """Why a shard could not be done, in one line; Beam carries the message alone from a worker to the launcher."""


class GenerateShards(beam.DoFn):
    """Shard numbers to receipts. A bad row is an error record in the part; whatever is raised fails the job."""

    def __init__(self, job: Job):
        self._job = job
        self._work: Work | None = None

    def process(self, element: int) -> Iterator[dict[str, Any]]:
        # Not in `setup`: what fails there, Flink and Spark learn of after three minutes, each time that they try.
        if self._work is None:
            with _told_in_one_line("starting a worker"):
                self._work = self._job.start()
        work, shard = self._work, self._work.plan.shards[element]
        with _told_in_one_line(f"shard {element}"):
            receipt = generate(shard, work)
        yield dataclasses.asdict(receipt)


@contextlib.contextmanager
def _told_in_one_line(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise GenerateError(errors.told(doing, error)) from error


def unfinished(job: Job) -> Iterator[int]:
    """Yields the numbers of the shards that are to be done."""
    with _told_in_one_line("starting a worker"):
        plan = job.plan()
        receipts = job.output.receipts(plan)
    for shard, receipt in zip(plan.shards, receipts, strict=True):
        if receipt is None or receipt.selected(job.retried_codes):
            yield shard.number


def run(job: Job, runner: PipelineRunner | str, options: PipelineOptions) -> None:
    """Runs the pipeline of `job` to its end; interrupted, it asks for the job to be cancelled."""
    pipeline = beam.Pipeline(runner=runner, options=options)
    _ = (
        pipeline
        | "Job" >> beam.Create([job])
        | "Unfinished" >> beam.FlatMap(unfinished)
        | "Reshuffle" >> beam.Reshuffle()
        | "Generate" >> beam.ParDo(GenerateShards(job))
    )
    with _workers_that_do_not_print():
        result: PipelineResult = pipeline.run()
        try:
            result.wait_until_finish()
        except BaseException:
            with contextlib.suppress(Exception):
                result.cancel()
            raise


def run_on_cluster(job: Job, name: str, beam_options: Sequence[str], *, workers: int) -> None:
    """Runs the pipeline of `job` on Beam's runner `name`, and sends what is left again while that gets on.

    A cluster may give a job up with a machine that it loses: Flink does so for bounded jobs, unless it is configured
    otherwise. What our own code raises is final.
    """
    place = str(job.output.place)
    while left := len(list(unfinished(job))):
        try:
            with cluster(name, beam_options, workers=workers, output=place) as (runner, options):
                return run(job, runner, options)
        except Exception as error:
            still_left = len(list(unfinished(job)))
            if is_told(error) or still_left == left or cause(error) == KeyboardInterrupt.__name__:
                raise
            logging.getLogger(__name__).warning(
                "%s gave the job up: %s; %d shards are left and are sent again",
                name,
                cause(error),
                still_left,
            )


@contextlib.contextmanager
def _workers_that_do_not_print() -> Iterator[None]:
    """Keeps workers in this process (LOOPBACK) from printing the traceback that the job is about to raise."""
    sdk_worker.print = lambda *what, **how: None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del sdk_worker.print  # pyright: ignore[reportAttributeAccessIssue]


def pipeline_options(flags: Sequence[str], *, has_job_server: bool = False) -> PipelineOptions:
    """Returns Beam's options from `--name=value` strings.

    Args:
      flags: what a user gave.
      has_job_server: a server will say which options it has besides.

    Raises:
      UsageError: Beam has no such option, or a flag of our own decides it.
    """
    options = PipelineOptions(["--default_sdk_harness_log_level=ERROR", *flags])
    with quiet():  # it warns of what it discards
        known = options.get_all_options().keys()
    unknown = options.get_all_options(retain_unknown_options=True).keys() - known
    if unknown and not has_job_server:
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


@contextlib.contextmanager
def cluster(
    name: str, beam_options: Sequence[str], *, workers: int, output: str
) -> Iterator[tuple[PipelineRunner, PipelineOptions]]:
    """Yields Beam's runner `name` and its options, of which some go without saying.

    Raises:
      UsageError: an option is missing or unknown, or what the runner needs is not installed here.
    """
    from serve_batch import clusters

    has_job_server = name in clusters.WITH_A_JOB_SERVER
    pipeline_options(beam_options, has_job_server=has_job_server)
    with quiet():
        runner, flags = clusters.runner(name, beam_options, workers=workers, output=output)
    with _readers_that_do_not_print():
        try:
            yield runner, pipeline_options(flags, has_job_server=has_job_server)
        finally:
            if isinstance(runner, clusters.Portable):
                runner.stop()


@contextlib.contextmanager
def _readers_that_do_not_print() -> Iterator[None]:
    """Keeps the thread that reads a job server's messages from printing that the server is gone."""
    hook, name = threading.excepthook, "wait_until_finish_read"

    def filtered(what: threading.ExceptHookArgs) -> None:
        if what.thread is None or what.thread.name != name:
            hook(what)

    threading.excepthook = filtered
    try:
        yield
    finally:
        readers = [thread for thread in threading.enumerate() if thread.name == name]
        for thread in readers:
            thread.join(5)
        if not any(thread.is_alive() for thread in readers):
            threading.excepthook = hook


def is_told(error: Exception) -> bool:
    """Whether it comes from our own code, and says what to do next."""
    return isinstance(error, FlaxmillError | GenerateError) or GenerateError.__name__ in str(error)


def cause(error: Exception) -> str:
    """Returns in one line why a pipeline failed, from what Beam made of it: a message or a whole traceback."""
    if isinstance(error, FlaxmillError):
        return str(error)
    if told := re.search(r"GenerateError: (.*?)(?: \[while running|$)", str(error), flags=re.M):
        return told[1]
    last = str(error).strip().rpartition("\n")[2]
    last = re.sub(r" \[while running '[^']*'\]$", "", last)
    return last or type(error).__name__
