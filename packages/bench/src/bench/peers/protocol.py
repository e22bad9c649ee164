"""The contestants' side of the conversation: one JSON object a line, in on stdin, out on stdout.

    {"do": "hello"}                                  -> {"versions": {...}, "threads": 2, "device": "cpu"}
    {"do": "ceilings"}                               -> {"gemm_float32_flops_per_s": ..., "read_bytes_per_s": ...}
    {"do": "prepare", "workload": {}, "weights": ""} -> {"first_call_s": ...}
    {"do": "outputs"}                                -> {"tokens": [[...]]}, {"logits": [...]} or {"losses": [...]}
    {"do": "run", "repeats": 5, "warm": true}        -> {"seconds": [...], "usages": [...]}
    {"do": "share"}                                  -> {"alone_bytes": ..., "together_bytes": ...}
    {"do": "judge", "rows": [[[...], [...]]]}        -> {"shortfalls": [...]}

"outputs" may hold "facts" too: numbers by name that are reported and not compared. To "judge" is to tell how far the
tokens that someone continued prompts by (prompt and continuation in each row) lie below the likeliest ones.

A request that fails is answered by {"error": "..."} and the worker lives on, one that cannot be done in this
environment by {"unable": "..."}; the end of stdin ends it. The clock is here, so that it is the same for everyone.
Standard library only: this runs in every contestant's environment.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from bench.workloads import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What work in a process of its own took.

    `seconds` are those of the work, `command_s` of the whole process, with the interpreter's start and the imports.
    The memory is anonymous (what is not a file's): `idle_bytes` when the clock started, `peak_bytes` at the most
    until it stopped; None where the system does not tell. `disk_bytes` came from the disk and not from the cache.
    `parts_s` are seconds of parts of the work by name, where it has some that are told apart.
    """

    seconds: float
    command_s: float
    idle_bytes: int | None
    peak_bytes: int | None
    disk_bytes: int
    parts_s: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def memory_bytes(self) -> int | None:
        """What the work added at its peak to what the idle process had."""
        if self.peak_bytes is None or self.idle_bytes is None:
            return None
        return self.peak_bytes - self.idle_bytes


class Unable(Exception):
    """What a contestant has not got here; the text says what."""


class Task(Protocol):
    """A workload made ready in one contestant."""

    def call(self) -> object:
        """Does the work once, and returns when it is really done: on a device, after synchronising.

        A call that returns a `Usage` has timed its work itself, in a process of its own.
        """
        ...

    def outputs(self) -> Mapping[str, Any]:
        """Returns what was computed, for comparison with the others. Called once, after the first `call`."""
        ...


class Contestant(Protocol):
    def hello(self) -> Mapping[str, Any]: ...

    def ceilings(self) -> Mapping[str, float]:
        """Returns the highest rates that this tool reaches on this machine, of those that it can measure.

        "gemm_float32_flops_per_s", and so on for the other precisions, is a large matrix product's; "read_bytes_per_s"
        that of reading memory with all threads, "read_1_thread_bytes_per_s" with one.
        """
        ...

    def prepare(self, workload: Workload, weights: Path) -> Task:
        """Loads the Hugging Face folder `weights` and whatever the workload needs, dropping the previous task."""
        ...


def serve(contestant: Contestant) -> None:
    """Answers requests until stdin ends."""
    answers = claim_stdout()
    session = _Session(contestant)
    for line in sys.stdin:
        try:
            answer = session.answer(json.loads(line))
        except Unable as error:
            answer = {"unable": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def claim_stdout() -> IO[str]:
    """Returns the real stdout and sends everything that libraries print, from C too, to stderr."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


class _Session:
    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.task: Task | None = None

    def answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        match request["do"]:
            case "hello":
                return self.contestant.hello()
            case "ceilings":
                return self.contestant.ceilings()
            case "prepare":
                return self._prepare(
                    Workload.from_dict(request["workload"]), Path(request["weights"])
                )
            case "outputs":
                return self._ready().outputs()
            case "run":
                return self._run(request["repeats"], warm=request["warm"])
            case "share":
                return self._share()
            case "judge":
                return {"shortfalls": self._able("judge")(request["rows"])}
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _ready(self) -> Task:
        if self.task is None:
            raise RuntimeError("nothing is prepared")
        return self.task

    def _prepare(self, workload: Workload, weights: Path) -> Mapping[str, float]:
        self.task = None  # the previous model's memory goes before the next one's comes
        gc.collect()
        self.task = self.contestant.prepare(workload, weights)
        return {"first_call_s": _timed(self.task.call)[0]}

    def _share(self) -> Mapping[str, int]:
        return self._able("share")()

    def _able(self, name: str) -> Callable[..., Any]:
        """Returns a method that not every task has."""
        method = getattr(self._ready(), name, None)
        if method is None:
            raise RuntimeError(f"this workload cannot {name}")
        return method

    def _run(self, repeats: int, *, warm: bool) -> Mapping[str, Any]:
        call = self._ready().call
        gc.collect()
        gc.disable()
        try:
            if warm:  # the others' turns have emptied the caches and put the threads to sleep
                call()
            calls = [_timed(call) for _ in range(repeats)]
        finally:
            gc.enable()
        usages = [dataclasses.asdict(usage) for _, usage in calls if usage is not None]
        return {"seconds": [s for s, _ in calls], "usages": usages}


def _timed(call: Callable[[], object]) -> tuple[float, Usage | None]:
    """Returns how long one `call` takes, by its own account where it has one."""
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    return (result.seconds, result) if isinstance(result, Usage) else (elapsed, None)


def seconds(call: Callable[[], object]) -> float:
    """Returns how long one `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def sampled(length: int, count: int) -> list[int]:
    """Returns up to `count` indices spread evenly over range(length), the last one included.

    >>> sampled(100, 4)
    [0, 33, 66, 99]
    """
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]
