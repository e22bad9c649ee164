"""Flink, Spark and Prism for tests: fetched by coordinate into a cache, run as processes, and gone afterwards.

Nothing here names where anything comes from: Maven, Go and uv are asked as the machine has them configured. Beam's job
servers run on what Maven resolves (see the pom.xml files), the clusters on the jars that the Python packages of Flink
and Spark carry.
"""

import contextlib
import dataclasses
import functools
import hashlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "clusters"
POMS = Path(__file__).parent / "serve_batch" / "clusters"

FLINK_JARS = "apache-flink-libraries==1.19.*"
SPARK_JARS = "pyspark==3.5.*"
PRISM = "github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0"

# What the two engines reach into, on a Java that has modules.
OPENED = (
    *("lang", "lang.invoke", "lang.reflect", "util", "util.concurrent", "nio", "net", "io"),
    *("sun.nio.ch", "sun.security.action", "sun.util.calendar"),
)
OPENS = ["java.base/" + (p if p.startswith("sun") else f"java.{p}") for p in OPENED]
JAVA = ["java", *(f"--add-opens={package}=ALL-UNNAMED" for package in OPENS)]

_FETCH_S = 360
"""For all that is fetched, together."""

_START_S = 180


class Missing(Exception):
    """Why something cannot be had on this machine."""


@functools.cache
def _deadline() -> float:
    return time.monotonic() + _FETCH_S


def _run(command: Sequence[str | Path], **environment: str) -> None:
    tool = shutil.which(command[0])
    if tool is None:
        raise Missing(f"there is no {Path(command[0]).name} on this machine")
    try:
        done = subprocess.run(
            [tool, *map(str, command[1:])],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1, _deadline() - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"{Path(tool).name} is not done after {_FETCH_S} s") from None
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "rror" in line] or [done.stdout]
        raise Missing(f"{Path(tool).name} failed: {lines[0].strip()[:300]}")


def _cached(name: str, key: str, fetch: Callable[[Path], None]) -> Path:
    """Returns the cache's folder for `name`, filled by `fetch` if it is not there for this `key`."""
    folder = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            fetch(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _java() -> None:
    _run(["java", "-version"])


def _resolved(engine: str) -> Path:
    """Returns the folder of the jars that Beam's job server for `engine` runs on."""
    _java()
    pom = POMS / engine / "pom.xml"
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime"]
    return _cached(
        f"{engine}-job-server",
        pom.read_text(),
        lambda to: _run(["mvn", "-q", "-B", "-f", pom, *goal, f"-DoutputDirectory={to}"]),
    )


def _wheel(requirement: str) -> Path:
    _java()
    uv = os.environ.get("UV") or shutil.which("uv") or str(ROOT / ".bootstrap" / "bin" / "uv")
    python = ["--python", sys.executable]
    return _cached(
        requirement.partition("=")[0],
        requirement,
        lambda to: _run(
            [uv, "pip", "install", "-q", "--no-deps", *python, "--target", to, requirement]
        ),
    )


def _prism() -> Path:
    folder = _cached("prism", PRISM, lambda to: _run(["go", "install", PRISM], GOBIN=str(to)))
    return folder / "prism"


_PIECES: Mapping[str, Callable[[], Path]] = {
    "flink job server": lambda: _resolved("flink"),
    "flink": lambda: _wheel(FLINK_JARS),
    "spark job server": lambda: _resolved("spark"),
    "spark": lambda: _wheel(SPARK_JARS),
    "prism": _prism,
}


@functools.cache
def _fetches() -> dict[str, "Future[Path]"]:
    """Begins to fetch everything: Go compiles while Maven waits for the network."""
    one_by_one, beside = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    return {
        name: (beside if name == "prism" else one_by_one).submit(fetch)
        for name, fetch in _PIECES.items()
    }


def fetched(name: str) -> Path:
    """Returns where a piece lies; skips the test, with the reason, where it cannot be had."""
    try:
        return _fetches()[name].result()
    except Missing as why:
        pytest.skip(f"{name}: {why}")


def job_server_jar(engine: str, folder: Path) -> Path:
    """Writes what Beam's own fat jar is to its runner: one file that `java -jar` takes."""
    mains = {"flink": "flink.FlinkJobServerDriver", "spark": "spark.SparkJobServerDriver"}
    jars = sorted(fetched(f"{engine} job server").glob("*.jar"))
    if engine == "spark":
        names = {jar.name for jar in jars}
        sparks = sorted((fetched("spark") / "pyspark" / "jars").glob("*.jar"))
        jars += [jar for jar in sparks if jar.name not in names]
    path = folder / f"{engine}-job-server.jar"
    lines = [
        "Manifest-Version: 1.0",
        f"Main-Class: org.apache.beam.runners.{mains[engine]}",
        f"Add-Opens: {' '.join(OPENS)}",
        f"Class-Path: {' '.join(jar.as_uri() for jar in jars)}",
    ]
    with zipfile.ZipFile(path, "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", "".join(map(_folded, lines)))
    return path


def _folded(line: str) -> str:
    """Returns a manifest's line as it is written: at most 72 bytes, continued after a space."""
    pieces = [line[:70], *(line[i : i + 69] for i in range(70, len(line), 69))]
    return "\r\n ".join(pieces) + "\r\n"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@dataclasses.dataclass
class Daemon:
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """Kills it with what it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def wait_for(self, happened: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + _START_S
        while not happened():
            tail = self.log.read_text(errors="replace")[-2000:]
            assert self.process.poll() is None, f"it ended before {what}: {tail}"
            assert time.monotonic() < deadline, f"no {what} in {_START_S} s: {tail}"
            time.sleep(0.1)


# The system kills it when the tests die, however they die: PR_SET_PDEATHSIG is 1, SIGKILL 9.
_DIES_WITH_THE_TESTS = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
)


@contextlib.contextmanager
def daemon(
    command: Sequence[str | Path], folder: Path, name: str, **environment: str
) -> Iterator[Daemon]:
    """Runs a process in a group of its own until the block ends, however it ends."""
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _DIES_WITH_THE_TESTS, *map(str, command)],
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    found = Daemon(process, log)
    try:
        yield found
    finally:
        found.kill()


def answers(port: int, host: str = "localhost") -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Node:
    """Another machine, as far as the network goes: a namespace, with one wire between it and this one."""

    wire: str
    here: str
    """The address of this machine's end; what is sent there does not leave this machine."""
    there: str
    enter: tuple[str, ...]
    """What a command that is to run there begins with."""

    def cut(self) -> None:
        _run(["ip", "link", "set", self.wire, "down"])


@contextlib.contextmanager
def node(folder: Path) -> Iterator[Node]:
    """Yields a node; its namespace has no name, so nothing is left of it when the tests die."""
    with contextlib.ExitStack() as stack:
        try:
            made = _wired(folder, stack)
        except Missing as why:
            pytest.skip(f"network namespaces: {why}")
        yield made


def _wired(folder: Path, stack: contextlib.ExitStack) -> Node:
    own = Path("/proc/self/ns/net").readlink()
    number = os.getpid() % 2**15
    here = ipaddress.IPv4Address("198.18.0.1") + 4 * number  # a network for measurements, nobody's
    _run(["unshare", "--net", "true"])
    holder = stack.enter_context(
        daemon(["unshare", "--net", "sleep", "infinity"], folder, "node"),
    )
    space = Path(f"/proc/{holder.process.pid}/ns/net")
    holder.wait_for(lambda: space.readlink() != own, "namespace")
    made = Node(f"flax{number}", str(here), str(here + 1), ("nsenter", f"--net={space}"))
    wire = ["ip", "link", "add", made.wire, "type", "veth", "peer", "name", made.wire]
    _run([*wire, "netns", str(holder.process.pid)])
    # What waits there for an answer would keep it for minutes.
    delete = ["ip", "link", "delete", made.wire]
    stack.callback(subprocess.run, delete, check=False, capture_output=True)
    for begin, address in (((), made.here), (made.enter, made.there)):
        _run([*begin, "ip", "address", "add", f"{address}/30", "dev", made.wire])
        _run([*begin, "ip", "link", "set", made.wire, "up"])
    _run([*made.enter, "ip", "link", "set", "lo", "up"])
    return made


@contextlib.contextmanager
def worker_pool(
    folder: Path, *, port: int = 0, node: Node | None = None, **environment: str
) -> Iterator[str]:
    """Yields the address of a worker pool, as on every node of a cluster: `python` is that of the tests."""
    port = port or free_port()
    module = "apache_beam.runners.worker.worker_pool_main"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [*(node.enter if node else ()), sys.executable, "-m", module]
    environment |= {"PATH": path, "JAX_PLATFORMS": "cpu"}
    host = node.there if node else "localhost"
    with daemon([*command, f"--service_port={port}"], folder, "worker-pool", **environment) as pool:
        pool.wait_for(lambda: answers(port, host), "answer of the worker pool")
        yield f"localhost:{port}"


def _json(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{address}", timeout=5) as answer:
        return json.load(answer)


_FLINK_CONF = """
jobmanager.rpc.address: {host}
jobmanager.rpc.port: {rpc}
jobmanager.bind-host: {bind}
rest.address: localhost
rest.port: {rest}
rest.bind-port: {rest}
taskmanager.host: {host}
taskmanager.numberOfTaskSlots: 2
taskmanager.cpu.cores: 2
taskmanager.memory.framework.heap.size: 64m
taskmanager.memory.framework.off-heap.size: 64m
taskmanager.memory.jvm-metaspace.size: 256m
taskmanager.memory.jvm-overhead.min: 64m
taskmanager.memory.jvm-overhead.max: 64m
taskmanager.memory.task.heap.size: 256m
taskmanager.memory.task.off-heap.size: 64m
taskmanager.memory.managed.size: 64m
taskmanager.memory.network.min: 64m
taskmanager.memory.network.max: 64m
heartbeat.interval: 1000
heartbeat.timeout: 10000
io.tmp.dirs: {folder}
blob.storage.directory: {folder}
"""


@dataclasses.dataclass
class Flink:
    """A standalone cluster: a job manager, and task managers that come and go."""

    master: str
    folder: Path
    _command: list[str]

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(_json(f"{self.master}/overview"))
        return False

    def _task_managers(self) -> set[str]:
        return {manager["id"] for manager in _json(f"{self.master}/taskmanagers")["taskmanagers"]}

    @contextlib.contextmanager
    def task_manager(self, name: str, node: Node | None = None) -> Iterator[Daemon]:
        main = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
        command = [*self._command, "-Xmx768m", main, "--configDir", str(self.folder)]
        if node:
            command = [*node.enter, *command, "-D", f"taskmanager.host={node.there}"]
        before = self._task_managers()
        with daemon(command, self.folder, name) as manager:
            manager.wait_for(lambda: self._task_managers() - before, "task manager of Flink's")
            yield manager


@contextlib.contextmanager
def flink(folder: Path, host: str = "localhost") -> Iterator[Flink]:
    """Yields a Flink cluster without task managers yet, which find it at `host`."""
    jars = fetched("flink") / "pyflink" / "lib"
    rest = free_port()
    bind = host if host == "localhost" else "0.0.0.0"  # it calls itself localhost in any case
    ports = {"rpc": free_port(), "rest": rest}
    conf = _FLINK_CONF.format(host=host, bind=bind, folder=folder, **ports)
    (folder / "flink-conf.yaml").write_text(conf)
    found = Flink(f"localhost:{rest}", folder, [*JAVA, "-cp", f"{jars}/*"])
    main = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
    command = [*found._command, "-Xmx512m", main, "--configDir", folder]
    with daemon(command, folder, "job-manager") as manager:
        manager.wait_for(found.answers, "job manager of Flink's")
        yield found


@contextlib.contextmanager
def spark(folder: Path) -> Iterator[str]:
    """Yields the address of a Spark cluster of a master and a worker."""
    home = fetched("spark") / "pyspark"
    port, page = free_port(), free_port()
    environment = {"SPARK_HOME": str(home), "SPARK_SCALA_VERSION": "2.12"}
    environment["SPARK_LOCAL_IP"] = "127.0.0.1"
    java = [*JAVA, "-Xmx512m", "-cp", f"{home}/jars/*"]
    master = [*java, "org.apache.spark.deploy.master.Master", "--host", "localhost"]
    worker = [*java, "org.apache.spark.deploy.worker.Worker", "--cores", "2", "--memory", "2g"]
    address = f"spark://localhost:{port}"
    master += ["--port", str(port), "--webui-port", str(page)]
    worker += ["--host", "localhost", "-d", folder / "work", "--webui-port", str(free_port())]
    with daemon(master, folder, "master", **environment) as first:
        first.wait_for(lambda: answers(port), "master of Spark's")
        with daemon([*worker, address], folder, "worker", **environment) as second:

            def registered() -> bool:
                with contextlib.suppress(OSError):
                    return _json(f"localhost:{page}/json/")["aliveworkers"] == 1
                return False

            second.wait_for(registered, "worker of Spark's")
            yield address
