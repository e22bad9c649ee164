"""Runs workloads: starts the contestants, checks that they agree, and lets them take turns.

Only one contestant computes at a time; the order of the turns is reversed every round, so that none always follows
the same one. What goes wrong in a contestant becomes a row with its reason; the others go on.
"""

import contextlib
import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bench import comparison, machine, shapes, weights
from bench.peers.contestants import OURS, Contestant, settings_for
from bench.peers.process import Worker, WorkerError
from bench.peers.protocol import Usage
from bench.shapes import AnyShape
from bench.workloads import OWN_PROCESS, Kind, Workload

Status = Literal["measured", "wrong", "failed", "not run"]

COMPUTES: frozenset[Kind] = frozenset({"forward", "prefill", "decode", "serve", "batch", "train"})
JUDGED_ROWS = 8  # of those whose tokens are not the reference's

TURN_S = 0.3  # long enough that the clock and the first cold call weigh nothing
MAX_REPEATS = 100
TIMEOUT_S = 300.0
PATIENCE_S = 12.0  # for the turns of one workload; beyond it, no more rounds than LEAST_ROUNDS
LEAST_ROUNDS = 3
# Whoever computes for longer takes no turns, for which the others would wait; compilers do when a machine is busy.
FIRST_CALL_S = 120.0  # beside what reading a checkpoint may take
CALL_S = 60.0
CHANCES = 2  # after so many first calls that took too long, a contestant is not asked for more of the kind
SLOWEST_BYTES_PER_S = 60e6  # of whoever reads and writes a checkpoint; below it, it hangs
SPARE_BYTES = 10**9  # of the disk, left to others
GIANT_SPARE_BYTES = 3 * 10**9  # of the memory, beside the model's pages


@dataclasses.dataclass(frozen=True)
class Shared:
    """The memory that a process has because of a model: alone, and its part while another has the same model open."""

    alone_bytes: int
    together_bytes: int

    @property
    def share(self) -> float:
        """A half, where the two share one copy; 1 where each has its own."""
        return self.together_bytes / self.alone_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant on one workload. `turns` holds the seconds of every call, a list for each turn.

    "wrong" disagrees with the reference, "failed" broke, "not run" has no environment; `reason` says more. `neighbours`
    is the share of all cores that others used meanwhile: on a busy machine threads that wait for each other starve.
    Work that has a process of its own has `usages` too, one for each call of the turns. `facts` are numbers by name
    that are told beside the figure. `is_kept_out`: it was not asked, for what it or this machine lacked at the time.
    """

    workload: Workload
    contestant: str
    status: Status
    reason: str = ""
    first_call_s: float | None = None
    difference: float | None = None
    neighbours: float | None = None
    turns: tuple[tuple[float, ...], ...] = ()
    usages: tuple[Usage, ...] = ()
    shared: Shared | None = None
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    is_kept_out: bool = False

    @property
    def memory_bytes(self) -> int | None:
        """The most that any call added to the anonymous memory of its process; None where it was not measured."""
        found = [usage.memory_bytes for usage in self.usages]
        known = [count for count in found if count is not None]
        return max(known, default=None)

    @property
    def samples(self) -> list[float]:
        """Seconds of a call, one figure for each turn."""
        return [statistics.median(turn) for turn in self.turns]


class Field:
    """The contestants and their processes: started when first needed, and again after a loss.

    Checkpoints are made in `kept`, where they stay for the next run, or else in `scratch`.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        *,
        env: Mapping[str, str],
        scratch: Path,
        logs: Path,
        kept: Path | None = None,
        timeout_s: float = TIMEOUT_S,
        turn_s: float = TURN_S,
        patience_s: float = PATIENCE_S,
        first_call_s: float = FIRST_CALL_S,
        call_s: float = CALL_S,
    ) -> None:
        self.contestants, self.turn_s, self.patience_s = contestants, turn_s, patience_s
        self.first_call_s, self.call_s = first_call_s, call_s
        self.hellos: dict[str, dict[str, Any]] = {}
        self.late: dict[
            tuple[str, Kind], list[str]
        ] = {}  # workloads whose first call took too long
        self._env, self._scratch, self._logs, self._timeout_s = env, scratch, logs, timeout_s
        self._workers: dict[str, Worker] = {}
        self._settings: dict[str, Mapping[str, str]] = {}
        self._weights, self._keeps = kept or scratch / "weights", kept is not None

    def __enter__(self) -> "Field":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def ask(
        self,
        contestant: Contestant,
        do: str,
        *,
        more_s: float = 0.0,
        within_s: float | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Passes a request on to the contestant's process, which has `more_s` beyond the time for any request.

        Or it has `within_s` alone, where that is given.

        Raises:
          WorkerError: with the reason; a lost process is started anew by the next request.
        """
        try:
            worker = self._worker(contestant)
            timeout_s = self._timeout_s + more_s if within_s is None else within_s
            return worker.ask(do, timeout_s=timeout_s, **arguments)
        except WorkerError as error:
            if error.lost:
                self._workers.pop(contestant.name, None)
            raise

    def _worker(self, contestant: Contestant) -> Worker:
        if contestant.name not in self._workers:
            slug = contestant.name.replace(" ", "-")
            cwd = self._scratch / slug
            cwd.mkdir(exist_ok=True)
            log = self._logs / f"{slug}.log"
            env = {**self._env, **self._settings.get(contestant.name, {})}
            worker = Worker(contestant.command, env=env, cwd=cwd, log=log)
            self._workers[contestant.name] = worker
            self.hellos[contestant.name] = worker.ask("hello", timeout_s=self._timeout_s)
        return self._workers[contestant.name]

    def settle(self, contestant: Contestant, kind: Kind) -> None:
        """Has the contestant's next answers come from a process with the settings that this kind of work has."""
        settings = settings_for(kind, self._env)
        if settings != self._settings.get(contestant.name, {}):
            self._settings[contestant.name] = settings
            if worker := self._workers.pop(contestant.name, None):
                worker.close()

    def weights(self, shape: AnyShape) -> Path:
        """Returns the folder with this shape's weights, written on first use."""
        folder = self._folder(shape) / "huggingface"
        return folder if folder.exists() else weights.write(folder, shape)

    def _folder(self, shape: AnyShape) -> Path:
        return self._weights / shapes.slug(shape)

    def release(self, shape: AnyShape) -> None:
        """Removes what the workloads of this shape have left on the disk, but for a checkpoint that is kept."""
        folder = self._folder(shape)
        if not self._keeps:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            for path in folder.iterdir():
                if path.name != "huggingface":
                    shutil.rmtree(path, ignore_errors=True)

    def obstacle(self, workload: Workload) -> str:
        """Says what of the disk a workload lacks; "" if there is enough."""
        place = self._folder(workload.shape)
        written = {"convert": workload.output_bytes}.get(workload.kind, workload.source_bytes)
        needed = SPARE_BYTES
        if not (place / "huggingface").exists():
            needed += workload.source_bytes
        if workload.kind == "convert" or not (place / "flaxmill").exists():
            needed += written
        if workload.kind in COMPUTES | {"giant"} and not (place / "gguf").exists():
            needed += workload.source_bytes
        self._weights.mkdir(parents=True, exist_ok=True)
        free = min(shutil.disk_usage(path).free for path in (self._weights, self._scratch))
        if free < needed:
            return f"needs {needed / 1e9:.1f} GB of the disk, {free / 1e9:.1f} GB free"
        if workload.kind == "giant":
            return _short_of_memory(workload.source_bytes + GIANT_SPARE_BYTES)
        if workload.kind in COMPUTES:  # all have it in memory until the last turn
            copies = sum(not c.obstacle(workload) for c in entrants(self, workload))
            each = workload.shape.weight_bytes(10**6, workload.precision)
            # In training: gradients and two moments.
            return _short_of_memory(copies * each * (4 if workload.kind == "train" else 1))
        return ""


def _short_of_memory(needed: float) -> str:
    free = machine.free_memory_bytes()
    if free >= needed:
        return ""
    return f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB free"


def ceilings(field: Field) -> dict[str, dict[str, float]]:
    """Returns the rates that each contestant reaches on this machine, without those that cannot say."""
    rates: dict[str, dict[str, float]] = {}
    for contestant in field.contestants:
        if contestant.absent or not contestant.tells_ceilings:
            continue
        with contextlib.suppress(WorkerError):
            rates[contestant.name] = field.ask(contestant, "ceilings")
    return rates


def measure(field: Field, workload: Workload, advance: Callable[[str], None]) -> list[Row]:
    """Returns a row for each contestant that takes part; the first one that computes is the others' reference.

    `advance` is told the name of who computes, before each of the `steps(field, workload)` steps.
    """
    return _Race(field, workload, advance).run()


def entrants(field: Field, workload: Workload) -> list[Contestant]:
    return [
        c for c in field.contestants if workload.kind in c.kinds and c.name not in workload.without
    ]


def steps(field: Field, workload: Workload) -> int:
    """Returns how many steps `measure` takes at the most: a preparation and the turns of each contestant."""
    running = sum(not c.obstacle(workload) for c in entrants(field, workload))
    return running * (1 + workload.rounds)


class _Disagreement(Exception):
    """A contestant computed something else than the reference; the text says what."""


class _TooSlow(Exception):
    """A contestant takes longer than the others can wait for; the text says by what."""


def unmeasured(field: Field, workload: Workload, reason: str) -> list[Row]:
    """Returns the rows of a workload that nobody is asked for."""
    return [
        Row(workload=workload, contestant=c.name, status="not run", reason=reason)
        for c in entrants(field, workload)
    ]


class _Race:
    """One workload: preparation, agreement, turns. Rows are replaced as the contestants get on."""

    def __init__(self, field: Field, workload: Workload, advance: Callable[[str], None]) -> None:
        self.field, self.workload, self.advance = field, workload, advance
        self.repeats: dict[
            Contestant, int | None
        ] = {}  # of those still running; None: not known yet
        disk = field.obstacle(workload)
        obstacles = {c: c.obstacle(workload) or disk for c in entrants(field, workload)}
        reasons = {c: obstacle or self._lateness(c) for c, obstacle in obstacles.items()}
        self.running = [c for c, reason in reasons.items() if not reason]
        self.rows = {
            c.name: Row(
                workload=workload,
                contestant=c.name,
                status="not run",
                reason=reason,
                is_kept_out=bool(obstacles[c]),
            )
            for c, reason in reasons.items()
        }
        self.judge: Contestant | None = None
        self.more_s = 0.0
        if workload.kind not in COMPUTES:  # some read and write a checkpoint a few times over
            self.more_s = 4 * workload.output_bytes / SLOWEST_BYTES_PER_S

    def _lateness(self, contestant: Contestant) -> str:
        known = self.field.late.get((contestant.name, self.workload.kind), [])
        if contestant.name == OURS or len(known) < CHANCES:
            return ""
        return f"its first calls of {' and '.join(known)} took too long"

    def run(self) -> list[Row]:
        reference: dict[str, Any] | None = None
        for contestant in self.running:
            self.advance(contestant.name)
            with self._reported(contestant):
                outputs = self._prepare(contestant)
                reference = reference or outputs
                self.judge = self.judge or contestant
                self._check(contestant, reference, outputs)
                self.repeats[contestant] = 1 if self.workload.kind in OWN_PROCESS else None
        neighbours, deadline = machine.Neighbours(), time.monotonic() + self.field.patience_s
        for turn in range(self.workload.rounds):
            if turn >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            order = list(self.repeats)
            for contestant in order if turn % 2 == 0 else order[::-1]:
                self.advance(contestant.name)
                with self._reported(contestant):
                    self._turn(contestant)
        for contestant in list(self.repeats):
            self._set(contestant, neighbours=neighbours.share())
            if self.workload.kind == "load":
                with self._reported(contestant):
                    self._set(contestant, shared=Shared(**self._ask(contestant, "share")))
        return list(self.rows.values())

    @contextlib.contextmanager
    def _reported(self, contestant: Contestant) -> Iterator[None]:
        """Turns what goes wrong into the contestant's row, and takes it out of the race."""
        try:
            yield
        except (WorkerError, _Disagreement, _TooSlow) as error:
            status: Status = "failed"
            if isinstance(error, _Disagreement):
                status = "wrong"
            elif isinstance(error, _TooSlow):
                status = "failed" if contestant.name == OURS else "not run"
            elif error.unable:
                status = "not run"
            self._set(contestant, status=status, reason=str(error), turns=(), usages=())
            self.repeats.pop(contestant, None)

    def _ask(self, contestant: Contestant, do: str, **arguments: Any) -> dict[str, Any]:
        return self.field.ask(contestant, do, more_s=self.more_s, **arguments)

    def _ask_within(
        self, contestant: Contestant, within_s: float, what: str, do: str, **arguments: Any
    ) -> dict[str, Any]:
        """Asks for work that others wait for; what has a process of its own may take as long as any request."""
        if self.workload.kind not in COMPUTES:
            return self._ask(contestant, do, **arguments)
        try:
            return self.field.ask(contestant, do, within_s=within_s, **arguments)
        except WorkerError as error:
            if not error.late:
                raise
            raise _TooSlow(f"took more than {within_s:.3g} s {what}") from error

    def _prepare(self, contestant: Contestant) -> dict[str, Any]:
        workload, weights = self.workload, self.field.weights(self.workload.shape)
        self.field.settle(contestant, workload.kind)
        within_s = self.field.first_call_s + workload.source_bytes / SLOWEST_BYTES_PER_S
        try:
            answer = self._ask_within(
                contestant,
                within_s,
                "to load, to compile and for a first call",
                "prepare",
                workload=workload.to_dict(),
                weights=str(weights),
            )
        except _TooSlow:
            self.field.late.setdefault((contestant.name, workload.kind), []).append(workload.name)
            raise
        self._set(contestant, first_call_s=answer["first_call_s"])
        outputs = self._ask(contestant, "outputs")
        self._set(contestant, facts=outputs.pop("facts", {}))
        return outputs

    def _check(
        self, contestant: Contestant, reference: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        found = comparison.agreement(reference, outputs, self.workload.precision)
        is_rounded = self.workload.precision != "float32"
        if (found.complaint or is_rounded) and "tokens" in reference and "tokens" in outputs:
            found = self._judged(contestant, reference["tokens"], outputs["tokens"]) or found
        if found.complaint:
            raise _Disagreement(found.complaint)
        self._set(contestant, difference=found.difference)

    def _judged(
        self, contestant: Contestant, known: list[list[int]], found: list[list[int]]
    ) -> comparison.Agreement | None:
        """Lets the first contestant look at tokens that differ, or were rounded; None where it cannot judge them."""
        if self.judge is None or [len(row) for row in known] != [len(row) for row in found]:
            return None
        differing = [i for i, row in enumerate(found) if row != known[i]]
        prompts, chosen = self.workload.prompts(), differing or range(len(found))
        rows = [[prompts[i], found[i]] for i in chosen[:JUDGED_ROWS]]
        try:
            answer = self._ask(self.judge, "judge", rows=rows)
        except WorkerError:
            return None
        facts = {**self.rows[contestant.name].facts, "rows_that_differ": len(differing)}
        self._set(contestant, facts=facts)
        return comparison.judged(answer["shortfalls"], self.workload.precision)

    def _turn(self, contestant: Contestant) -> None:
        """Lets it compute for a turn's length, or once; the first turn finds out how many calls that takes."""
        repeats = self.repeats[contestant]
        if repeats is None:
            answer = self._ask_within(
                contestant, self.field.call_s, "a call", "run", repeats=1, warm=False
            )
            (once_s,) = answer["seconds"]
            repeats = min(MAX_REPEATS, math.ceil(self.field.turn_s / once_s))
            self.repeats[contestant] = repeats
            if repeats == 1:
                self._record(contestant, answer)
                return
        # A cold start matters to short calls only; where one call fills the turn, a second one would double the time.
        self._record(contestant, self._ask(contestant, "run", repeats=repeats, warm=repeats > 1))

    def _record(self, contestant: Contestant, answer: Mapping[str, Any]) -> None:
        row = self.rows[contestant.name]
        self._set(
            contestant,
            status="measured",
            turns=(*row.turns, tuple(answer["seconds"])),
            usages=(*row.usages, *(Usage(**usage) for usage in answer["usages"])),
        )

    def _set(self, contestant: Contestant, **changes: Any) -> None:
        self.rows[contestant.name] = dataclasses.replace(self.rows[contestant.name], **changes)
