"""The engine of this process: loaded once, whoever asks, and shared by every thread that a runner brings.

The host knows nothing of Beam. It draws the line between a row that cannot be served, which is a value, and an engine
that has failed, which is an exception and stops the job.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import jax

import core
from serve_batch import plan
from serve_batch.plan import JobError


class EngineHost:
    """A `core.Engine` that threads may share."""

    def __init__(self, model: Path, *, slots: int):
        self._engine = core.Engine(*core.load(model), slots=slots)
        self._lock = threading.Lock()

    def complete(
        self, requests: Sequence[core.Request]
    ) -> list[core.Completion | core.RequestError]:
        """Returns one result a request, in order. Anything raised means that the engine itself is broken."""
        with self._lock:
            return self._engine.complete(requests)


_opening = threading.Lock()
_current: tuple[tuple[Path, int, str], EngineHost] | None = None


def shared(model: Path, *, slots: int, revision: str) -> EngineHost:
    """Returns the process's host for `model`, loading it if it is not the one already there.

    Raises:
      JobError: the model folder is no longer the one that the plan was made for.
    """
    global _current
    with _opening:
        wanted = (model, slots, revision)
        if _current is None or _current[0] != wanted:
            found = plan.model_revision(model)
            if found != revision:
                raise JobError(
                    f"the job was planned for revision {revision[:12]} of the model, "
                    f"{model} holds {found[:12]}; start the job again in another output folder"
                )
            _current = None  # one model's memory at a time
            _current = (wanted, EngineHost(model, slots=slots))
        return _current[1]


def check_code(expected: str) -> None:
    """Makes sure that this process runs the `core` that the job was planned with.

    Raises:
      JobError: it found another one first on its path, or another version is installed here.
    """
    found = plan.code_version("core")
    if found != expected:
        raise JobError(
            f"the job was planned with core {expected}; this worker imports core {found} from "
            f"{Path(core.__file__ or '').parent}; install the same packages for both"
        )


def device() -> str:
    """Returns the kind of device that this process computes on."""
    return jax.devices()[0].device_kind
