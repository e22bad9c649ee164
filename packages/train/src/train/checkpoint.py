"""Training state on disk. The only module that knows Orbax: v1's API still moves between minor versions.

A checkpoint appears whole or not at all (Orbax writes a temporary folder and renames it), is written in the background,
and only the last two and the best by validation loss are kept.
"""

import dataclasses
from pathlib import Path
from typing import Any, Self

import jax
from orbax.checkpoint import v1 as ocp

from train.step import State

Device = Any
"""A jax.Device, which jax declares as a variable and type checkers therefore refuse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint knows beside the arrays; its iteration is the number of updates made."""

    model: dict[str, Any]
    best_val_loss: float


class Checkpoints:
    """The folder out_dir/checkpoints; leaving its context waits for the save under way."""

    def __init__(self, folder: Path):
        policies: Any = ocp.training.preservation_policies
        self.folder = folder.absolute()
        self._orbax = ocp.training.Checkpointer(
            str(self.folder),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(2),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics["val_loss"],
                        reverse=True,  # ascending by default, and the last n are kept
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    def path(self, iteration: int) -> Path:
        return self.folder / str(iteration)

    def iterations(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def latest(self) -> int | None:
        return max(self.iterations(), default=None)

    def save(
        self, iteration: int, state: State, progress: Progress, *, val_loss: float | None
    ) -> None:
        """Starts writing a checkpoint; one of this iteration that is already there is kept as it is."""
        if iteration in self.iterations():
            return
        self._orbax.save_async(
            iteration,
            state._asdict(),
            force=True,  # the loop decides when, not a save policy
            metrics=None if val_loss is None else {"val_loss": val_loss},
            custom_metadata=dataclasses.asdict(progress),
        )

    def progress(self, iteration: int) -> Progress:
        metadata: Any = self._orbax.metadata(iteration).custom_metadata
        return Progress(**metadata)

    def restore(self, iteration: int, like: State, device: Device) -> State:
        """Returns the state of `iteration` on `device`, in the shapes of `like`; it may be donated."""
        place = jax.sharding.SingleDeviceSharding(device)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like
        )
        return owned(State(**self._orbax.load(iteration, abstract._asdict())))


def owned(tree: Any) -> Any:
    """A copy in memory of our own. Arrays that Orbax restores, or that map a file, cannot be donated (jax#18617)."""
    return jax.tree.map(lambda x: x.copy(), tree)
