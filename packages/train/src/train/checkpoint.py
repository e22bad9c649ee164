"""Training state on disk. The only module that knows Orbax: v1's API still moves between minor versions.

A checkpoint appears whole or not at all (Orbax writes a temporary folder and renames it) and is written in the
background, all but the first, which is waited for. Kept are the last few, the best by validation loss, and every K-th.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from train.preflight import NONE_YET, TrainError, iterations
from train.step import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint knows beside the arrays; its iteration is the number of updates made."""

    model: dict[str, Any]
    best_val_loss: float
    best_iteration: int | None = None
    wandb_id: str | None = None
    choices: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The keys that decide what a state consists of."""


class Checkpoints:
    """The folder out_dir/checkpoints; leaving its context waits for the save under way.

    `best` is the iteration whose checkpoint is kept for its validation loss: the loop says which, since a checkpoint
    may be written before its iteration is evaluated, where a run stops there and goes on later.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_every: int = 0):
        policies: Any = ocp.training.preservation_policies
        self.best: int | None = None
        kept = [policies.LatestN(keep_last), _Best(self)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self.folder = folder.absolute()
        self._orbax = ocp.training.Checkpointer(
            str(self.folder), preservation_policy=policies.AnyPreservationPolicy(kept)
        )
        self._none_yet = self.folder / NONE_YET
        if self.latest() is None:
            self._none_yet.touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    def path(self, iteration: int) -> Path:
        return self.folder / str(iteration)

    def iterations(self) -> list[int]:
        return iterations(self.folder)

    def latest(self) -> int | None:
        return max(self.iterations(), default=None)

    def save(self, iteration: int, state: State, progress: Progress) -> None:
        """Starts writing a checkpoint; one of this iteration that is already there is kept as it is."""
        if iteration in {checkpoint.step for checkpoint in self._orbax.checkpoints}:
            return
        response = self._orbax.save_async(
            iteration,
            _present(state),
            force=True,  # the loop decides when, not a save policy
            custom_metadata=dataclasses.asdict(progress),
        )
        if response is not None and self._none_yet.exists():
            response.result()
            self._none_yet.unlink(missing_ok=True)

    def progress(self, iteration: int) -> Progress:
        try:
            with _silence():
                metadata: Any = self._orbax.metadata(iteration).custom_metadata
            return Progress(**metadata)
        except Exception as error:  # whatever a damaged folder makes Orbax stumble over
            raise self._unreadable(iteration, error) from error

    def restore(self, iteration: int, like: State) -> State:
        """Returns the state of `iteration` in the shapes and the places of `like`; it may be donated.

        Raises:
          TrainError: the checkpoint is damaged, or holds another state than `like`.
        """
        try:
            with _silence():
                return owned(State(**self._orbax.load(iteration, _present(like))))
        except Exception as error:
            raise self._unreadable(iteration, error) from error

    def _unreadable(self, iteration: int, error: Exception) -> TrainError:
        before = [i for i in self.iterations() if i < iteration]
        way_out = f"continue from {before[-1]}" if before else "begin anew with overwrite=True"
        return TrainError(
            f"{self.path(iteration)}: not a checkpoint of this run that can be read "
            f"({type(error).__name__}: {str(error)[:200]}); remove it to {way_out}"
        )


@dataclasses.dataclass
class _Best:
    """Orbax's protocol of what is kept: the checkpoint that `checkpoints` says is the best."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.checkpoints.best for checkpoint in checkpoints]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What Orbax logs about a damaged file, tracebacks too, is in the exception that it raises."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _present(state: State) -> dict[str, Any]:
    """The parts of a state that there are."""
    return {name: part for name, part in state._asdict().items() if part is not None}


def owned(tree: Any) -> Any:
    """A copy in memory of our own. Arrays that Orbax restores, or that map a file, cannot be donated (jax#18617)."""
    return jax.tree.map(lambda x: x.copy(), tree)
