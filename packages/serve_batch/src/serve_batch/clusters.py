"""Beam's runners for clusters: what each has to be told, and what goes without saying.

The launcher plans, holds the output folder, watches and finishes as it does for a local job. Workers elsewhere read
the plan, the input and the model, and write their parts, under the paths that the launcher uses: those are on storage
that all share, or, as the model may be, in the workers' image.
"""

import importlib.util
import re
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apache_beam.options import pipeline_options as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.portability.api import beam_job_api_pb2
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkRunner
from apache_beam.runners.portability.job_server import JobServer
from apache_beam.runners.portability.portable_runner import JobServiceHandle, PortableRunner
from apache_beam.runners.portability.prism_runner import PrismRunner
from apache_beam.runners.portability.spark_runner import LOCAL_MASTER_PATTERN, SparkRunner
from apache_beam.runners.runner import PipelineRunner, create_runner

from serve_batch.errors import JobError, UsageError

_CONNECT_S = 10
_YEAR_S = 365 * 24 * 3600


def runner(
    name: str, flags: Sequence[str], *, workers: int, output: str
) -> tuple[PipelineRunner, list[str]]:
    """Returns Beam's runner `name`, and `flags` with those added that a batch job wants; nothing is started.

    Raises:
      UsageError: a flag is missing, or something that the runner needs is not installed here.
    """
    found, check = _RUNNERS[name]
    # What the user says comes last, and is what counts.
    flags = [*check(PipelineOptions(list(flags)), workers, output), *flags]
    instance = found()
    problems = PipelineOptionsValidator(PipelineOptions(flags), instance).validate()
    if problems:
        raise UsageError(f"{name}, after `--`: {' '.join(' '.join(problems).split())}")
    return instance, flags


class _Handle(JobServiceHandle):
    """A job server whose word on options is not lost: of one that nobody has, Beam only warns."""

    def get_pipeline_options(self) -> Any:
        request = beam_job_api_pb2.DescribePipelineOptionsRequest()
        described = self.job_service.DescribePipelineOptions(request, timeout=self.timeout)
        names = {option.name for option in described.options}
        unknown = self.options.get_all_options(retain_unknown_options=True).keys()
        unknown -= self.options.get_all_options().keys() | names
        if unknown:
            raise UsageError(f"neither Beam nor its job server has an option --{min(unknown)}")
        return super().get_pipeline_options()


class Portable(PortableRunner):
    """A runner whose job server, if it starts one, ends with it and not with the process."""

    _server: JobServer | None = None

    def create_job_service_handle(
        self, job_service: Any, options: PipelineOptions
    ) -> JobServiceHandle:
        return _Handle(job_service, options)

    def default_job_server(self, options: PipelineOptions) -> Any:
        server: Any = super().default_job_server(options)
        # What Beam wraps it in takes over the process's signals.
        self._server = getattr(server, "_job_server", server)
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


class _Flink(Portable, FlinkRunner):
    pass


class _Spark(Portable, SparkRunner):
    pass


class _Prism(Portable, PrismRunner):
    pass


def _flink(options: PipelineOptions, workers: int, output: str) -> list[str]:
    master = options.view_as(beam.FlinkRunnerOptions).flink_master
    flags = _job_server("FlinkRunner", options) + _environment(
        "FlinkRunner", options, in_this_process=master in MAGIC_HOST_NAMES
    )
    return [*flags, f"--parallelism={workers}"] if workers > 1 else flags


def _spark(options: PipelineOptions, workers: int, output: str) -> list[str]:
    master = options.view_as(beam.SparkRunnerOptions).spark_master_url
    _expect_one(workers, "SparkRunner runs as many as the cluster has executors")
    return _job_server("SparkRunner", options) + _environment(
        "SparkRunner", options, in_this_process=bool(re.match(LOCAL_MASTER_PATTERN, master))
    )


def _prism(options: PipelineOptions, workers: int, output: str) -> list[str]:
    _expect_one(workers, "PrismRunner runs on this machine")
    flags = _environment("PrismRunner", options, in_this_process=True)
    if _endpoint(options):
        return [*_job_server("PrismRunner", options), *flags]
    if options.view_as(beam.PrismRunnerOptions).prism_location:
        return [*flags, f"--job_server_timeout={_YEAR_S}"]
    # Beam would download it, and wait for a network that does not answer without end.
    path = shutil.which("prism")
    if path is None:
        raise UsageError(
            "PrismRunner needs Prism: `go install github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0`, "
            "then put it on the PATH, or give -- --prism_location=PATH"
        )
    return [*flags, f"--prism_location={path}", f"--job_server_timeout={_YEAR_S}"]


def _portable(options: PipelineOptions, workers: int, output: str) -> list[str]:
    _expect_one(workers, "PortableRunner runs as many as its job server says")
    endpoint = _endpoint(options)
    if not endpoint:
        raise UsageError("PortableRunner needs -- --job_endpoint=HOST:PORT of a job server")
    return _job_server("PortableRunner", options) + _environment(
        "PortableRunner", options, in_this_process=endpoint == "embed"
    )


def _dataflow(options: PipelineOptions, workers: int, output: str) -> list[str]:
    if not output.startswith("gs://"):
        raise UsageError(
            f"DataflowRunner's workers cannot write to {output}: give --output=gs://..."
        )
    # Beam finds its own modules without the extra, and fails when the job is sent.
    if not all(map(_is_installed, ("google.auth", "google.cloud.storage", "apitools"))):
        raise UsageError(
            "DataflowRunner needs Beam's gcp extra: `uv pip install 'apache-beam[gcp]==2.77.*'`"
        )
    if not options.view_as(beam.WorkerOptions).sdk_container_image:
        raise UsageError(
            "DataflowRunner needs an image with this code and the model: -- --sdk_container_image=IMAGE"
        )
    # One process a machine, which has all its accelerators.
    flags = ["--sdk_location=container", "--experiments=no_use_multiple_sdk_containers"]
    return [*flags, f"--num_workers={workers}", f"--max_num_workers={workers}"]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent is missing
        return False


def _expect_one(workers: int, why: str) -> None:
    if workers > 1:
        raise UsageError(f"workers is {workers}; {why}: leave --workers out")


def _endpoint(options: PipelineOptions) -> str | None:
    return options.view_as(beam.PortableOptions).job_endpoint


def _job_server(name: str, options: PipelineOptions) -> list[str]:
    """Makes sure that a job server answers, or can be started."""
    endpoint = _endpoint(options)
    if endpoint is None:
        java = options.view_as(beam.JobServerOptions).job_server_java_launcher
        if shutil.which(java) is None:
            raise UsageError(
                f"{name} starts Beam's job server, and there is no {java!r} to run it: install Java 11 or later, "
                "or give -- --job_endpoint=HOST:PORT of one that runs"
            )
    elif endpoint != "embed":
        _expect_answer(endpoint)
    # For Beam it is also the time after which a job that still runs has failed.
    return [f"--job_server_timeout={_YEAR_S}"]


def _expect_answer(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except ValueError:
        raise UsageError(f"job_endpoint is {endpoint!r}; expected HOST:PORT") from None
    except OSError as error:
        raise JobError(f"no job server answers at {endpoint}: {error.strerror or error}") from None


def _environment(name: str, options: PipelineOptions, *, in_this_process: bool) -> list[str]:
    """Returns where workers run, if that goes without saying."""
    portable = options.view_as(beam.PortableOptions)
    if portable.environment_type:
        return []
    if portable.environment_config or portable.lookup_environment_option(
        "external_service_address"
    ):
        return ["--environment_type=EXTERNAL"]
    if in_this_process:
        return ["--environment_type=LOOPBACK"]
    # Beam's default is an image of its own, without this code.
    raise UsageError(
        f"{name} does not know where workers run: give -- --environment_type=EXTERNAL "
        "--environment_config=HOST:PORT of a worker pool, or DOCKER and an image (docs/batch.md)"
    )


_Check = Callable[[PipelineOptions, int, str], list[str]]
_RUNNERS: Mapping[str, tuple[Callable[[], PipelineRunner], _Check]] = {
    "FlinkRunner": (_Flink, _flink),
    "SparkRunner": (_Spark, _spark),
    "PrismRunner": (_Prism, _prism),
    "PortableRunner": (Portable, _portable),
    "DataflowRunner": (lambda: create_runner("DataflowRunner"), _dataflow),
}
WITH_A_JOB_SERVER = ("FlinkRunner", "SparkRunner", "PortableRunner")
"""Whose job server has options that Beam does not know in Python."""
