"""Work that gets a process of its own: conversions and openings, whose memory is counted beside their seconds.

A process is a command or, where an import takes seconds that are not to be measured, a fork of this one after the
import. Standard library only, as far as this file is concerned: it runs in every contestant's environment.

    python -m bench.peers.jobs "cp + sha256sum"       the contestant of that name
    python -m bench.peers.jobs open FOLDER            a process that opens a model folder of ours when it is told to
"""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bench import shapes
from bench.peers import memory, process, protocol
from bench.peers.protocol import Usage
from bench.workloads import Workload

Convert = Callable[[Path, Path], Usage]
"""Makes the second path, which does not exist, from the first, a checkpoint."""

# The clock starts where the interpreter has started; everything that a user waits for after that is counted.
MARKED = """
import os, sys, time
mark, module, *arguments = sys.argv[1:]
os.write(int(mark), b"%d" % time.monotonic_ns())
import runpy
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class Conversion:
    """A task whose every call converts the same checkpoint, from the page cache, into a folder that is then removed.

    Before the clock starts, what earlier calls have left to be written is written.
    """

    def __init__(self, workload: Workload, weights: Path, convert: Convert) -> None:
        self.workload, self.weights, self.convert = workload, weights, convert
        self.values: list[int] = []

    def call(self) -> Usage:
        out = Path.cwd() / "converted"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        _read_through(self.weights)
        try:
            usage = self.convert(self.weights, out)
            self.values = samples(out, self.workload.shape.probes)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return usage

    def outputs(self) -> Mapping[str, Any]:
        return {"values": self.values}


class Command:
    """A task whose every call is a command, from its start to its end; the last line of its stdout may be JSON.

    If that has "seconds", they are what counts, and "parts_s" are told apart. `outputs` are made of the JSON; by
    default they are what it has of "tokens" and "counts". Files of the folder `reads` are read through before.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        outputs: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        judge: Callable[[list[list[list[int]]]], list[float]] | None = None,
        reads: Path | None = None,
        fresh: Path | None = None,
    ) -> None:
        self.command, self.env, self.reads, self.fresh = command, env or {}, reads, fresh
        self.judge = judge
        self._outputs = outputs or (
            lambda told: {k: told[k] for k in ("tokens", "counts") if k in told}
        )
        self.told: Mapping[str, Any] = {}

    def call(self) -> Usage:
        if self.reads:
            _read_through(self.reads)
        if self.fresh:
            shutil.rmtree(self.fresh, ignore_errors=True)
        with tempfile.TemporaryFile("w+") as stdout:
            usage = run(self.command, env=self.env, stdout=stdout)
            stdout.seek(0)
            lines = stdout.read().strip().splitlines()
        self.told = json.loads(lines[-1]) if lines else {}
        return dataclasses.replace(
            usage,
            seconds=self.told.get("seconds", usage.seconds),
            parts_s=self.told.get("parts_s", {}),
        )

    def outputs(self) -> Mapping[str, Any]:
        return self._outputs(self.told) or {"counts": [0]}


def samples(folder: Path, probes: Mapping[str, str]) -> list[int]:
    """Returns bytes from some places of the tensors `probes` names in our words and in Hugging Face's."""
    found: dict[str, tuple[Path, int, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= _places(path)
    values: list[int] = []
    for ours, theirs in probes.items():
        known = [name for name in (ours, theirs, f"transformer.{theirs}") if name in found]
        if not known:
            raise RuntimeError(f"there is neither {ours} nor {theirs} in what was written")
        path, start, size = found[known[0]]
        with path.open("rb") as file:
            for place in protocol.sampled(size // 4, 32):
                file.seek(start + 4 * place)
                values.append(int.from_bytes(file.read(4), "little"))
    return values


def _places(path: Path) -> dict[str, tuple[Path, int, int]]:
    """Returns the places of a safetensors file's tensors: file, first byte, number of bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    ranges = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (path, 8 + length + begin, end - begin) for name, (begin, end) in ranges.items()}


def _read_through(folder: Path) -> None:
    """Brings a folder's files into the page cache, where they fit."""
    chunk = bytearray(2**24)
    for path in [folder] if folder.is_file() else folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(chunk):
                pass


def flaxmill(*arguments: str) -> Convert:
    """Returns our converter, as its users start it, with these flags."""

    def convert(weights: Path, out: Path) -> Usage:
        flags = (f"--source={weights}", f"--out={out}", *arguments)
        return run([sys.executable, "-P", "-c", MARKED, "MARK", "convert", *flags])

    return convert


def copier(steps: Sequence[str]) -> Convert:
    """Returns what copies a folder's files and does to the copies what the other `steps` say, one after another."""

    def convert(weights: Path, out: Path) -> Usage:
        commands = [_STEPS[step](weights, out) for step in steps]
        return run(*commands)

    return convert


def _copies(weights: Path, out: Path) -> list[str]:
    return [str(out / path.name) for path in sorted(weights.iterdir())]


_STEPS: dict[str, Callable[[Path, Path], list[str]]] = {
    # A reflink would copy nothing.
    "cp": lambda weights, out: ["cp", "-R", "--reflink=never", str(weights), str(out)],
    "sync": lambda weights, out: ["sync", *_copies(weights, out)],
    "sha256sum": lambda weights, out: ["sha256sum", *_copies(weights, out)],
    "openssl": lambda weights, out: ["openssl", "dgst", "-sha256", *_copies(weights, out)],
}


class Copies:
    """A contestant that copies and hashes: what no converter can do without."""

    def __init__(self, name: str) -> None:
        self.steps = name.split(" + ")

    def hello(self) -> dict[str, Any]:
        return {"versions": {}, "threads": 1, "device": "cpu"}

    def ceilings(self) -> dict[str, float]:
        raise RuntimeError("computes nothing")

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        return Conversion(workload, weights, copier(self.steps))


class Transformers:
    """transformers' from_pretrained and save_pretrained, each time in a fork of the process that has imported it."""

    def __init__(self) -> None:
        start = time.monotonic()
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        self.classes = {
            "gpt2": transformers.GPT2LMHeadModel,  # here, because classes are imported when they are first named
            "gpt_oss": transformers.GptOssForCausalLM,
        }
        self.torch, self.transformers = torch, transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.import_s = time.monotonic() - start

    def hello(self) -> dict[str, Any]:
        versions = {
            "torch": self.torch.__version__,
            "transformers": self.transformers.__version__,
        }
        return {"versions": versions, "threads": self.torch.get_num_threads(), "device": "cpu"}

    def ceilings(self) -> dict[str, float]:
        raise RuntimeError("computes nothing")

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        def start() -> "Child":
            return Child.fork(lambda: self.load(workload, weights), before_s=self.import_s)

        if workload.kind == "load":
            return Opening(start)
        return Conversion(
            workload,
            weights,
            lambda source, out: fork(
                lambda: self.load(workload, source).save_pretrained(out), before_s=self.import_s
            ),
        )

    def load(self, workload: Workload, weights: Path) -> Any:
        if isinstance(workload.shape, shapes.Shape):
            options: dict[str, Any] = {"dtype": self.torch.float32}
        else:
            packed = self.transformers.Mxfp4Config(dequantize=True)
            options = {"dtype": self.torch.bfloat16, "quantization_config": packed}
        return self.classes[workload.shape.family].from_pretrained(weights, **options)


def run(
    *commands: Sequence[str],
    env: Mapping[str, str] | None = None,
    stdout: IO[str] | int = subprocess.DEVNULL,
) -> Usage:
    """Runs commands one after another, with `env` beside this process's, and returns what they took together.

    The word MARK in one is replaced by the number of a file to write the monotonic clock's nanoseconds to when what is
    to be counted begins; without it, everything is.

    Raises:
      RuntimeError: one ended with another code than 0.
    """
    usages = []
    for command in commands:
        readable, writable = os.pipe()
        with _closing(readable), tempfile.TemporaryFile() as errors:
            launched_s = time.monotonic()
            with _closing(writable):
                process = subprocess.Popen(
                    [str(writable) if word == "MARK" else word for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=errors,
                    env={**os.environ, **(env or {})},
                    pass_fds=(writable,),
                )
            mark = readable if "MARK" in command else None
            usage, code = _followed(process.pid, launched_s, mark=mark, idle_bytes=0)
            process.returncode = code
            _require(code, Path(command[0]).name, errors)
            usages.append(usage)
    return Usage(
        seconds=sum(usage.seconds for usage in usages),
        command_s=sum(usage.command_s for usage in usages),
        idle_bytes=usages[0].idle_bytes,
        peak_bytes=max((usage.peak_bytes or 0 for usage in usages), default=None),
        disk_bytes=sum(usage.disk_bytes for usage in usages),
    )


def fork(work: Callable[[], object], *, before_s: float) -> Usage:
    """Runs `work` in a fork of this process and returns what it took; `before_s` is what a command had spent before.

    Raises:
      RuntimeError: the fork did not end well.
    """
    with tempfile.TemporaryFile() as errors:
        idle_bytes, launched_s = memory.anonymous(os.getpid()), time.monotonic()
        pid = _forked(work, errors)
        usage, code = _followed(pid, launched_s, mark=None, idle_bytes=idle_bytes)
        _require(code, "the process", errors)
    return dataclasses.replace(usage, command_s=usage.command_s + before_s)


def _forked(work: Callable[[], object], errors: IO[bytes] | None = None) -> int:
    """Returns the id of a new process that does `work` and ends."""
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:  # nothing of this process's own may go on in the fork
        if errors is not None:
            os.dup2(errors.fileno(), 2)
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _followed(
    pid: int, launched_s: float, *, mark: int | None, idle_bytes: int | None
) -> tuple[Usage, int]:
    """Waits for a child's end; returns what it took, and its exit code."""
    sampler = memory.Sampler(pid, mark=mark, idle_bytes=idle_bytes)
    _, status, spent = os.wait4(pid, 0)
    ended_s = time.monotonic()
    sampler.stop()
    usage = Usage(
        seconds=ended_s - (sampler.started_s or launched_s),
        command_s=ended_s - launched_s,
        idle_bytes=sampler.idle_bytes,
        peak_bytes=sampler.peak_bytes,
        disk_bytes=512 * spent.ru_inblock,
    )
    return usage, os.waitstatus_to_exitcode(status)


def _require(code: int, name: str, errors: IO[bytes]) -> None:
    errors.seek(0)
    text = errors.read().decode(errors="replace")
    sys.stderr.write(text)
    sys.stderr.flush()
    if code:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise RuntimeError(f"{name} ended with {code}: {lines[-1][:200] if lines else 'silently'}")


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


class Opening:
    """A task whose every call opens a model in a new process, which has imported what it needs before."""

    def __init__(self, start: Callable[[], "Child"]) -> None:
        self.start = start
        self.parameters = 0

    def call(self) -> Usage:
        with self.start() as child:
            usage = child.open()
            self.parameters = child.parameters
        return usage

    def outputs(self) -> Mapping[str, Any]:
        return {"parameters": [self.parameters]}

    def share(self) -> dict[str, int]:
        """Returns what one process has of memory because of the model, alone and while another has it open too.

        Every page of the model has been read; shared ones count in part (proportional set size).
        """
        with self.start() as one, self.start() as other:
            before = one.proportional()
            one.open()
            one.touch()
            alone = one.proportional() - before
            other.open()
            other.touch()
            return {"alone_bytes": alone, "together_bytes": one.proportional() - before}


class Child:
    """A process that opens a model when it is told to, and holds it until the block ends."""

    def __init__(self, pid: int, asks: int, answers: int, *, launched_s: float) -> None:
        self.pid, self.parameters = pid, 0
        self._launched_s = launched_s
        self._asks, self._answers = os.fdopen(asks, "w"), os.fdopen(answers)

    @classmethod
    def spawn(cls, command: Sequence[str]) -> "Child":
        """Returns the process of a command that runs `obey` on its stdin and stdout."""
        launched_s = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        asks, answers = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
        process.stdin.close()
        process.stdout.close()
        process.returncode = 0  # waited for below
        return cls(process.pid, asks, answers, launched_s=launched_s)

    @classmethod
    def fork(cls, load: Callable[[], Any], *, before_s: float) -> "Child":
        """Returns a fork of this process, which opens a model of PyTorch's by `load`."""
        (asked, asks), (answers, answered) = os.pipe(), os.pipe()

        def work() -> None:
            for theirs in (asks, answers):
                os.close(theirs)

            def opened() -> Sequence[Any]:
                return [parameter.detach().numpy() for parameter in load().parameters()]

            obey(opened, os.fdopen(asked), os.fdopen(answered, "w"))

        pid = _forked(work)
        for theirs in (asked, answered):
            os.close(theirs)
        return cls(pid, asks, answers, launched_s=time.monotonic() - before_s)

    def __enter__(self) -> "Child":
        self._heard()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._asks.close()
        self._answers.close()
        os.waitpid(self.pid, 0)

    def open(self) -> Usage:
        sampler = memory.Sampler(self.pid, idle_bytes=memory.anonymous(self.pid))
        answer = self._ask("open")
        sampler.stop()
        self.parameters = answer["parameters"]
        return Usage(
            seconds=answer["seconds"],
            command_s=time.monotonic() - self._launched_s,
            idle_bytes=sampler.idle_bytes,
            peak_bytes=sampler.peak_bytes,
            disk_bytes=answer["disk_bytes"],
        )

    def touch(self) -> None:
        self._ask("touch")

    def proportional(self) -> int:
        found = memory.proportional(self.pid)
        if found is None:
            raise RuntimeError("this system does not tell what processes share")
        return found

    def _ask(self, do: str) -> dict[str, Any]:
        print(do, file=self._asks, flush=True)
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the process that should open the model has ended")
        return json.loads(line)


def obey(opened: Callable[[], Sequence[Any]], asks: IO[str], answers: IO[str]) -> None:
    """Opens a model and reads all of it, when `asks` says so; `opened` returns its arrays."""

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    arrays: Sequence[Any] = ()
    answer()
    for line in asks:
        if line.strip() == "open":
            start, read = time.perf_counter(), _blocks_read()
            arrays = opened()
            seconds, disk_bytes = time.perf_counter() - start, 512 * (_blocks_read() - read)
            count = sum(array.size for array in arrays)
            answer(seconds=seconds, parameters=count, disk_bytes=disk_bytes)
        else:
            # One byte of each page.
            total = sum(int(a.reshape(-1).view("uint8")[::4096].sum()) for a in arrays)
            answer(total=total)


def _blocks_read() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def opening(folder: Path) -> Opening:
    """Returns the task of opening a model folder of ours."""
    command = process.command(Path(sys.executable), "bench.peers.jobs", "open", str(folder))
    return Opening(lambda: Child.spawn(command))


def _open_ours(folder: str) -> None:
    import jax
    import numpy as np

    import core

    load, answers = core.load, protocol.claim_stdout()
    jax.block_until_ready(jax.device_put(0.0))  # JAX's own beginning is not the model's

    def opened() -> Sequence[Any]:
        _, params, _ = load(folder)
        jax.block_until_ready(params)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]

    obey(opened, sys.stdin, answers)


def main(name: str, *arguments: str) -> None:
    if name == "open":
        _open_ours(*arguments)
    else:
        protocol.serve(Transformers() if name == "transformers" else Copies(name))
