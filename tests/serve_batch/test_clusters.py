"""The job on real clusters: standalone Flink and Spark, worker pools, Prism; all write what the local runner writes."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import clusters
from batch_jobs import run_here, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

FLAGS = ["--max_new_tokens=6", "--temperature=0.9", "--top_k=40", "--seed=3", "--slots=4"]
ROWS = [
    b"not JSON" if i % 11 == 7 else {"prompt": f"Prompt {i * 7919 % 1000}", "id": i}
    for i in range(80)
]

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(model: Path, tmp_path: Path) -> list[str]:
    paths = [f"--model={model}", f"--input={tmp_path}/input/*", f"--output={tmp_path}/out"]
    return [sys.executable, "-m", "serve_batch", *paths, *FLAGS]


@pytest.fixture
def expect_the_same(
    command: list[str],
    model: Path,
    write_jsonl: Callable[..., Path],
    join_parts: Callable[[Path], bytes],
    tmp_path: Path,
) -> Callable[..., None]:
    """Runs the job with the flags given, and compares with the local runner's."""

    def check(*flags: str) -> None:
        write_jsonl(ROWS)
        done = subprocess.run(
            [*command, "--shard_size=8", *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        said = done.stderr.splitlines()
        assert (done.returncode, done.stdout, len(said)) == (0, "", 1), done.stderr
        assert "80 rows, 7 errors (bad_json 7); 10 of 10 shards in" in said[0]
        local = tmp_path / "local"
        run_here(model, tmp_path, "local", shard_size=30)
        assert join_parts(tmp_path / "out") == join_parts(local)

    return check


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[list[str]]:
    with clusters.worker_pool(tmp_path) as address:
        yield ["--environment_type=EXTERNAL", f"--environment_config={address}"]


@pytest.fixture
def flink_server(tmp_path: Path) -> str:
    return f"--flink_job_server_jar={clusters.job_server_jar('flink', tmp_path)}"


def test_flink_in_one_process(expect_the_same, flink_server):
    """Workers are threads of the launcher: what `--runner=FlinkRunner` does when nothing more is said."""
    expect_the_same("--runner=FlinkRunner", "--", flink_server)


def test_flink_standalone_with_a_worker_pool(expect_the_same, flink_server, pool, tmp_path):
    with clusters.flink(tmp_path) as flink, flink.task_manager("task-manager"):
        master = f"--flink_master={flink.master}"
        expect_the_same("--runner=FlinkRunner", "--workers=2", "--", flink_server, master, *pool)


@pytest.fixture
def expect_recovery(
    command: list[str],
    model: Path,
    flink_server: str,
    write_jsonl: Callable[..., Path],
    join_parts: Callable[[Path], bytes],
    tmp_path: Path,
) -> Callable[..., None]:
    """Runs a job whose task manager is lost on the way; another comes in its place."""

    def check(flink: clusters.Flink, pool: list[str], lose: Callable[[], None]) -> None:
        write_jsonl([{"prompt": f"Prompt {i * 7919 % 1000}"} for i in range(800)])
        out = tmp_path / "out"
        flags = ["--runner=FlinkRunner", "--", flink_server, f"--flink_master={flink.master}"]
        job = subprocess.Popen([*command, "--shard_size=8", *flags, *pool], cwd=tmp_path, stderr=-1)
        with job:
            try:
                wait_for(lambda: len(list(out.glob("_receipts/*.json"))) >= 5, job, limit_s=240)
                lose()
                done = {p: p.stat().st_mtime_ns for p in out.glob("part-*.jsonl")}
                assert 5 <= len(done) < 100
                with flink.task_manager("second"):
                    _, said = job.communicate(timeout=400)
            finally:
                job.kill()
        assert job.returncode == 0, said.decode()
        again, summary = said.decode().splitlines()
        assert "FlinkRunner gave the job up: " in again
        assert "shards are left and are sent again" in again
        assert "800 rows, 0 errors; 100 of 100 shards in" in summary
        # What was done is not done again.
        assert len([p for p, written in done.items() if p.stat().st_mtime_ns == written]) >= 5
        run_here(model, tmp_path, "local")
        assert join_parts(out) == join_parts(tmp_path / "local")

    return check


def test_a_flink_task_manager_that_is_killed_loses_nothing(expect_recovery, pool, tmp_path):
    with clusters.flink(tmp_path) as flink, flink.task_manager("first") as first:
        expect_recovery(flink, pool, first.kill)


def test_a_flink_task_manager_that_is_cut_off_loses_nothing(expect_recovery, tmp_path):
    """It and its workers go on, see the files, and hear of nothing: what they still write is what others write."""
    port = clusters.free_port()
    with (
        clusters.node(tmp_path) as node,
        clusters.worker_pool(tmp_path, port=port, node=node),
        clusters.worker_pool(tmp_path, port=port) as address,
        clusters.flink(tmp_path, node.here) as flink,
        flink.task_manager("first", node) as first,
    ):
        flags = ["--environment_type=EXTERNAL", f"--environment_config={address}"]
        expect_recovery(flink, flags, node.cut)
        assert first.process.poll() is None
        assert not clusters.answers(port, node.there)


def test_a_launcher_that_is_interrupted_ends_with_its_job_server(
    command, flink_server, pool, write_jsonl, tmp_path
):
    write_jsonl([{"prompt": f"Prompt {i * 7919 % 1000}"} for i in range(800)])
    out = tmp_path / "out"
    with clusters.flink(tmp_path) as flink, flink.task_manager("task-manager"):
        flags = ["--runner=FlinkRunner", "--", flink_server, f"--flink_master={flink.master}"]
        with subprocess.Popen([*command, "--shard_size=8", *flags, *pool], stderr=-1) as job:
            try:
                wait_for(lambda: list(out.glob("_receipts/*.json")), job, limit_s=240)
                job.send_signal(signal.SIGTERM)
                _, said = job.communicate(timeout=120)
            finally:
                job.kill()
        assert (said.decode(), job.returncode) == ("error: interrupted\n", 143)
        assert not (out / "_lock").exists()
        assert not list(filter(_runs(flink_server.partition("=")[2]), Path("/proc").iterdir()))


def _runs(jar: str) -> Callable[[Path], bool]:
    def check(process: Path) -> bool:
        try:
            return jar.encode() in (process / "cmdline").read_bytes()
        except OSError:
            return False

    return check


def test_spark_standalone_with_a_worker_pool(expect_the_same, pool, tmp_path):
    server = f"--spark_job_server_jar={clusters.job_server_jar('spark', tmp_path)}"
    with clusters.spark(tmp_path) as master:
        expect_the_same("--runner=SparkRunner", "--", server, f"--spark_master_url={master}", *pool)


def test_prism_in_this_process(expect_the_same):
    prism = f"--prism_location={clusters.fetched('prism')}"
    expect_the_same("--runner=PrismRunner", "--", prism)


def test_a_job_server_elsewhere_with_a_worker_pool(expect_the_same, pool, tmp_path):
    port = clusters.free_port()
    command = [clusters.fetched("prism"), "--job_port", str(port), "--serve_http=false"]
    with clusters.daemon(command, tmp_path, "prism") as prism:
        prism.wait_for(lambda: clusters.answers(port), "answer of Prism")
        expect_the_same("--runner=PortableRunner", "--", f"--job_endpoint=localhost:{port}", *pool)


def test_a_failure_on_a_cluster_is_one_line(command, flink_server, write_jsonl, tmp_path):
    """What a worker says goes through Java and back, with two stack traces around it."""
    write_jsonl(ROWS)
    program = (
        "import core, sys\n"
        "def die(self, steps): raise MemoryError('out of device memory')\n"
        "core.Engine._advance = die\n"
        "import runpy; sys.argv[0] = 'serve_batch'; runpy.run_module('serve_batch', run_name='__main__')"
    )
    arguments = [*command[3:], "--runner=FlinkRunner", "--", flink_server]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: shard \d+ failed: MemoryError: out of device memory; finished", line)
