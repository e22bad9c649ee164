"""Runs workloads: starts the contestants, checks that they agree, and lets them take turns.

Only one contestant computes at a time; the order of the turns is reversed every round, so that none always follows
the same one. What goes wrong in a contestant becomes a row with its reason; the others go on.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bench import comparison, machine, weights
from bench.peers.contestants import Contestant
from bench.peers.process import Worker, WorkerError
from bench.workloads import Shape, Workload

Status = Literal["measured", "wrong", "failed", "not run"]

TURN_S = 0.3  # long enough that the clock and the first cold call weigh nothing
MAX_REPEATS = 100
TIMEOUT_S = 300.0
PATIENCE_S = 60.0  # for the turns of one workload; beyond it, no more rounds than LEAST_ROUNDS
LEAST_ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant on one workload. `turns` holds the seconds of every call, a list for each turn.

    "wrong" disagrees with the reference, "failed" broke, "not run" has no environment; `reason` says more. `neighbours`
    is the share of all cores that others used meanwhile: on a busy machine threads that wait for each other starve.
    """

    workload: Workload
    contestant: str
    status: Status
    reason: str = ""
    first_call_s: float | None = None
    difference: float | None = None
    neighbours: float | None = None
    turns: tuple[tuple[float, ...], ...] = ()

    @property
    def samples(self) -> list[float]:
        """Seconds of a call, one figure for each turn."""
        return [statistics.median(turn) for turn in self.turns]


class Field:
    """The contestants and their processes: started when first needed, and again after a loss."""

    def __init__(
        self,
        contestants: Sequence[Contestant],
        *,
        env: Mapping[str, str],
        scratch: Path,
        logs: Path,
        timeout_s: float = TIMEOUT_S,
        turn_s: float = TURN_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.contestants, self.turn_s, self.patience_s = contestants, turn_s, patience_s
        self.hellos: dict[str, dict[str, Any]] = {}
        self._env, self._scratch, self._logs, self._timeout_s = env, scratch, logs, timeout_s
        self._workers: dict[str, Worker] = {}
        self._weights: dict[Shape, Path] = {}

    def __enter__(self) -> "Field":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def ask(self, contestant: Contestant, do: str, **arguments: Any) -> dict[str, Any]:
        """Passes a request on to the contestant's process.

        Raises:
          WorkerError: with the reason; a lost process is started anew by the next request.
        """
        try:
            return self._worker(contestant).ask(do, timeout_s=self._timeout_s, **arguments)
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
            worker = Worker(contestant.command, env=self._env, cwd=cwd, log=log)
            self._workers[contestant.name] = worker
            self.hellos[contestant.name] = worker.ask("hello", timeout_s=self._timeout_s)
        return self._workers[contestant.name]

    def weights(self, shape: Shape) -> Path:
        """Returns the folder with this shape's weights, written on first use."""
        if shape not in self._weights:
            self._weights[shape] = weights.write(self._scratch / "weights" / shape.name, shape)
        return self._weights[shape]


def ceilings(field: Field) -> dict[str, dict[str, float]]:
    """Returns the rates that each contestant reaches on this machine, without those that cannot say."""
    rates: dict[str, dict[str, float]] = {}
    for contestant in field.contestants:
        if contestant.absent:
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
    return [c for c in field.contestants if workload.kind in c.kinds]


def steps(field: Field, workload: Workload) -> int:
    """Returns how many steps `measure` takes at the most: a preparation and the turns of each contestant."""
    return sum(not c.absent for c in entrants(field, workload)) * (1 + workload.rounds)


class _Disagreement(Exception):
    """A contestant computed something else than the reference; the text says what."""


class _Race:
    """One workload: preparation, agreement, turns. Rows are replaced as the contestants get on."""

    def __init__(self, field: Field, workload: Workload, advance: Callable[[str], None]) -> None:
        self.field, self.workload, self.advance = field, workload, advance
        self.repeats: dict[Contestant, int] = {}  # of those still running
        self.rows = {
            c.name: Row(workload=workload, contestant=c.name, status="not run", reason=c.absent)
            for c in entrants(field, workload)
        }

    def run(self) -> list[Row]:
        reference: dict[str, Any] | None = None
        for contestant in entrants(self.field, self.workload):
            if contestant.absent:
                continue
            self.advance(contestant.name)
            with self._reported(contestant):
                outputs = self._prepare(contestant)
                reference = reference or outputs
                self._check(contestant, reference, outputs)
                self.repeats[contestant] = self._repeats(contestant)
        neighbours, deadline = machine.Neighbours(), time.monotonic() + self.field.patience_s
        for turn in range(self.workload.rounds):
            if turn >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            order = list(self.repeats)
            for contestant in order if turn % 2 == 0 else order[::-1]:
                self.advance(contestant.name)
                with self._reported(contestant):
                    self._turn(contestant)
        for contestant in self.repeats:
            self._set(contestant, neighbours=neighbours.share())
        return list(self.rows.values())

    @contextlib.contextmanager
    def _reported(self, contestant: Contestant) -> Iterator[None]:
        """Turns what goes wrong into the contestant's row, and takes it out of the race."""
        try:
            yield
        except (WorkerError, _Disagreement) as error:
            status = "failed" if isinstance(error, WorkerError) else "wrong"
            self._set(contestant, status=status, reason=str(error), turns=())
            self.repeats.pop(contestant, None)

    def _prepare(self, contestant: Contestant) -> dict[str, Any]:
        answer = self.field.ask(
            contestant,
            "prepare",
            workload=self.workload.to_dict(),
            weights=str(self.field.weights(self.workload.shape)),
        )
        self._set(contestant, first_call_s=answer["first_call_s"])
        return self.field.ask(contestant, "outputs")

    def _check(
        self, contestant: Contestant, reference: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        found = comparison.agreement(reference, outputs)
        if found.complaint:
            raise _Disagreement(found.complaint)
        self._set(contestant, difference=found.difference)

    def _repeats(self, contestant: Contestant) -> int:
        (once_s,) = self.field.ask(contestant, "run", repeats=1, warm=False)["seconds"]
        return min(MAX_REPEATS, math.ceil(self.field.turn_s / once_s))

    def _turn(self, contestant: Contestant) -> None:
        repeats = self.repeats[contestant]
        # A cold start matters to short calls only; where one call fills the turn, a second one would double the time.
        turn = self.field.ask(contestant, "run", repeats=repeats, warm=repeats > 1)["seconds"]
        row = self.rows[contestant.name]
        self._set(contestant, status="measured", turns=(*row.turns, tuple(turn)))

    def _set(self, contestant: Contestant, **changes: Any) -> None:
        self.rows[contestant.name] = dataclasses.replace(self.rows[contestant.name], **changes)
