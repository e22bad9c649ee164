"""What each of Beam's runners has to be told, said before anything is read or started."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from apache_beam.runners.portability.fn_api_runner import fn_runner

import core
import serve_batch
from serve_batch import runners
from serve_batch.errors import JobError, Unreachable, UsageError
from serve_batch.output import OutputFolder
from serve_batch.runners import GenerateError
from serve_batch.shards import Job

POOL = ["--environment_type=EXTERNAL", "--environment_config=localhost:1"]


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Returns the options that a runner is given; this machine has a `java`, and nothing else."""
    (tmp_path / "java").write_text("#!/bin/sh\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    def options(name: str, *flags: str, workers: int = 1, output: str = "/out") -> dict[str, Any]:
        with runners.cluster(name, flags, workers=workers, output=output) as (_, found):
            return found.get_all_options()

    return options


@pytest.fixture
def job_server() -> Any:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        listening.listen()
        yield f"--job_endpoint=localhost:{listening.getsockname()[1]}"


def test_what_goes_without_saying(chosen, job_server, tmp_path):
    flink = chosen("FlinkRunner", workers=3)
    assert (flink["environment_type"], flink["parallelism"]) == ("LOOPBACK", 3)
    # Beam takes a job for failed that runs for longer than it waits for an answer, five minutes.
    assert flink["job_server_timeout"] > 10**7
    assert not flink["streaming"]
    spark = chosen("SparkRunner", "--spark_master_url=spark://host:7077", POOL[1])
    assert spark["environment_type"] == "EXTERNAL"
    assert chosen("PortableRunner", job_server, POOL[1])["environment_type"] == "EXTERNAL"
    (tmp_path / "prism").write_text("")
    (tmp_path / "prism").chmod(0o755)
    prism = chosen("PrismRunner")
    assert (prism["environment_type"], prism["prism_location"]) == (
        "LOOPBACK",
        f"{tmp_path}/prism",
    )


def test_what_is_said_counts(chosen):
    flags = ["--parallelism=7", "--job_server_timeout=5", "--environment_type=DOCKER"]
    options = chosen("FlinkRunner", *flags, workers=3)
    assert [options[name] for name in ("parallelism", "job_server_timeout")] == [7, 5]
    assert options["environment_type"] == "DOCKER"


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("PortableRunner", [], "needs -- --job_endpoint=HOST:PORT"),
        ("PortableRunner", ["--job_endpoint=here"], "job_endpoint is 'here'; expected HOST:PORT"),
        ("FlinkRunner", ["--flink_master=host:8081"], "FlinkRunner does not know where workers"),
        ("SparkRunner", ["--spark_master_url=spark://h:1"], "SparkRunner does not know where"),
        ("FlinkRunner", ["--environment_type=EXTERNAL"], "external_service_address"),
        ("FlinkRunner", ["--job_server_java_launcher=jav"], "there is no 'jav' to run it: install"),
        ("PrismRunner", [], "`go install github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0`"),
        ("PrismRunner", ["--prism_locatoin=x"], "Beam 2.77.0 has no option --prism_locatoin"),
        ("FlinkRunner", ["--runner=SparkRunner"], "--runner after `--`"),
        ("DataflowRunner", [], r"cannot write to /out: give --output=gs://"),
    ],
)
def test_what_is_missing_is_named(chosen, name, flags, told):
    with pytest.raises(UsageError, match=told):
        chosen(name, *flags)


def test_a_job_server_that_does_not_answer_is_named(chosen):
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))
        endpoint = f"localhost:{nobody.getsockname()[1]}"
        with pytest.raises(JobError, match=f"no job server answers at {endpoint}: "):
            chosen("PortableRunner", f"--job_endpoint={endpoint}", *POOL)


@pytest.mark.parametrize("name", ["SparkRunner", "PrismRunner"])
def test_workers_that_a_runner_does_not_take_are_refused(chosen, name):
    with pytest.raises(UsageError, match=r"workers is 2; .*: leave --workers out"):
        chosen(name, workers=2)


def test_dataflow_wants_its_extra_and_an_image(chosen, monkeypatch):
    from serve_batch import clusters

    with pytest.raises(UsageError, match=r"apache-beam\[gcp\]"):
        chosen("DataflowRunner", output="gs://bucket/out")
    monkeypatch.setattr(clusters, "_is_installed", lambda module: True)
    with pytest.raises(UsageError, match="--sdk_container_image=IMAGE"):
        chosen("DataflowRunner", output="gs://bucket/out")
    image = "--sdk_container_image=image"
    with pytest.raises(UsageError, match="Missing required option: project"):
        chosen("DataflowRunner", image, output="gs://bucket/out")
    google = ["--project=project", "--region=r1", "--temp_location=gs://bucket/tmp"]
    options = chosen("DataflowRunner", image, *google, workers=4, output="gs://bucket/out")
    assert (options["max_num_workers"], options["sdk_location"]) == (4, "container")
    assert "no_use_multiple_sdk_containers" in options["experiments"]


def test_a_runner_that_cannot_be_used_has_touched_nothing(model, write_jsonl, tmp_path):
    write_jsonl([{"prompt": "a"}])
    paths = {"model": model, "input": tmp_path / "input" / "*", "output": tmp_path / "out"}
    with pytest.raises(UsageError, match="job_endpoint"):
        serve_batch.run(**paths, runner="PortableRunner")
    assert not (tmp_path / "out").exists()


def test_a_worker_that_does_not_see_the_output_folder_says_so(model, tmp_path):
    """As on a node that does not share the launcher's file system."""
    nowhere = OutputFolder(tmp_path / "elsewhere")
    job = Job(
        model=model, output=nowhere, sampling=core.Sampling(), slots=4, reports_progress=False
    )
    with pytest.raises(JobError, match=r"no plan in .*elsewhere for a worker on .*: workers use"):
        job.start()


def test_an_option_that_no_job_server_has_is_named(model, write_jsonl, tmp_path):
    """Beam's own job service, in this process, describes its options as the others do."""
    write_jsonl([{"prompt": "a"}])
    paths = {"model": model, "input": tmp_path / "input" / "*", "output": tmp_path / "out"}
    flags = ["--job_endpoint=embed", "--max_bundle_sise=3"]
    told = "neither Beam nor its job server has an option --max_bundle_sise$"
    with pytest.raises(UsageError, match=told):
        serve_batch.run(**paths, runner="PortableRunner", beam_options=flags)


def test_workers_in_this_process_do_not_print(
    model, write_jsonl, tmp_path, capfd, monkeypatch, join_parts
):
    """`--job_endpoint=embed` is the portable protocol without a server: job service, gRPC, a worker in a thread."""
    write_jsonl([{"prompt": f"Prompt {i}"} for i in range(20)])
    paths: dict[str, Any] = {"model": model, "input": tmp_path / "input" / "*", "slots": 4}
    portable = {"runner": "PortableRunner", "beam_options": ["--job_endpoint=embed"]}

    def die(self: core.Engine, steps: int) -> None:
        raise MemoryError("out of\ndevice memory")

    with monkeypatch.context() as patch:
        patch.setattr(core.Engine, "_advance", die)
        with pytest.raises(
            JobError, match=r"^shard 0 failed: MemoryError: out of device memory; f"
        ):
            serve_batch.run(**paths, **portable, output=tmp_path / "out")
    serve_batch.run(**paths, **portable, output=tmp_path / "out")
    serve_batch.run(**paths, output=tmp_path / "local")
    assert join_parts(tmp_path / "out") == join_parts(tmp_path / "local")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("raised", "kind", "told"),
    [
        (RuntimeError("a trace\nit fell over"), JobError, "it fell over; finished shards are kept"),
        (UsageError("no option --x"), UsageError, "no option --x$"),
        (
            Unreachable("cannot reach x"),
            JobError,
            "cannot reach x; finished shards are kept: [^;]*$",
        ),
        (GenerateError("shard 3 failed: look"), JobError, "shard 3 failed: look$"),
    ],
)
def test_what_a_runner_itself_raises_ends_with_what_to_do_next(
    run, write_jsonl, monkeypatch, raised, kind, told
):
    def fall_over(*_: Any) -> None:
        raise raised

    write_jsonl([{"prompt": "a"}])
    monkeypatch.setattr(fn_runner.FnApiRunner, "run_pipeline", fall_over)
    with pytest.raises(kind, match=f"^{told}"):
        run()
