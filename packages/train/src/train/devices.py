"""The devices of a run, and what of its state and of its batches lies where on them.

One mesh of the axes data, fsdp, expert and tensor (`core.sharding`). A batch is cut along data and fsdp; a parameter
along fsdp, expert and tensor, by the letters of its axes; what the optimizer keeps of a parameter lies where that does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core import sharding
from core.config import Config
from train import meeting
from train.config import TrainConfig
from train.preflight import TrainError

Device = Any
"""A jax.Device, which jax declares as a variable and type checkers therefore refuse."""


@dataclass(frozen=True)
class Devices:
    """A mesh over all devices of the run, those of other hosts too."""

    mesh: Mesh

    @property
    def first(self) -> Device:
        """One of this host's."""
        return self.mesh.local_devices[0]

    @property
    def count(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        return self.first.platform

    def __str__(self) -> str:
        cuts = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1)
        hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        kind = self.first.device_kind
        return f"{self.count} x {kind}{hosts} ({cuts})" if self.count > 1 else kind

    @property
    def whole(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Of tokens_ABS."""
        return NamedSharding(self.mesh, PartitionSpec(None, sharding.BATCH))

    def shardings(self, config: Config, tree: Any) -> Any:
        """Returns where the leaves of `tree` go: parameters, or a state that holds some, with the moments of them."""
        of_parameter = sharding.place(config, self.mesh).shardings

        def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
            keys = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
            return of_parameter.get(".".join(keys), self.whole)

        return jax.tree_util.tree_map_with_path(place, tree)

    def notes(self, config: Config) -> tuple[str, ...]:
        """What lies whole on every device although a rule would cut it."""
        return sharding.place(config, self.mesh).notes

    def like(self, config: Config, make: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what `make` would, as shapes with their places."""
        shapes = jax.eval_shape(make, *arguments)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self.shardings(config, shapes),
        )

    def make(self, config: Config, make: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what `make` does, each device computing its own part."""
        places = self.shardings(config, jax.eval_shape(make, *arguments))
        return jax.jit(make, out_shardings=places)(*arguments)

    def tokens(
        self, shape: tuple[int, int, int], read: Callable[[np.ndarray], np.ndarray]
    ) -> jax.Array | np.ndarray:
        """Returns tokens_ABS of `shape`, row a * B + b of the step at [a, b].

        `read` is asked for the rows of the step that are on this host's devices, and for no others.
        """
        A, B, S = shape
        rows_AB = np.arange(A * B).reshape(A, B)
        if self.count == 1:
            return read(rows_AB.ravel()).reshape(shape)
        done: dict[tuple[int, ...], np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            rows_Ab = rows_AB[index[:2]]
            rows = tuple(rows_Ab.ravel().tolist())
            if rows not in done:  # devices along other axes hold the same rows
                done[rows] = read(rows_Ab.ravel()).reshape(*rows_Ab.shape, S)
            return done[rows]

        return jax.make_array_from_callback(shape, self.batch, part)

    def gathered(self, tree: Any) -> Any:
        """Returns `tree` as it is where one host has all of it, else as numpy arrays on every host."""
        if jax.process_count() == 1:
            return tree
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)


def join(config: TrainConfig) -> None:
    """Makes this process one of the run's `processes`; before anything asks jax for a device.

    Raises:
      TrainError: the others did not come within dist_timeout_s.
    """
    if config.processes == 1:
        return
    meeting.gather(config)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            initialization_timeout=config.dist_timeout_s,
            heartbeat_timeout_seconds=config.dist_timeout_s,
        )
    except RuntimeError as error:
        raise TrainError(
            f"process {config.process} of {config.processes}: all met at coordinator="
            f"{config.coordinator}, and jax did not: {str(error).splitlines()[0]}"
        ) from error


def is_first_process() -> bool:
    """Whether this process is the one that writes the run's files."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def any_process(here: bool) -> bool:
    """Whether it holds on some process; all have to ask at the same time."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array([here])).any())


def open_devices(config: TrainConfig) -> Devices:
    """Returns the devices that `device` names, laid out as `mesh` says.

    Raises:
      TrainError: a device that is not there, or a batch that they do not divide.
      ConfigError: a mesh that the devices do not make.
    """
    devices = Devices(sharding.mesh(config.mesh, _named(config.device)))
    parts = math.prod(devices.mesh.shape[axis] for axis in sharding.BATCH)
    if config.batch_size % parts:
        raise TrainError(_does_not_divide(config, parts))
    return devices


def _does_not_divide(config: TrainConfig, parts: int) -> str:
    rows = config.sequences_per_step
    way_out = f"mesh with fewer parts, or a multiple of {parts} sequences an update"
    if rows % parts == 0:
        batch = math.lcm(config.batch_size, parts)
        batch = batch if rows % batch == 0 else parts
        way_out = (
            f"batch_size={batch} with gradient_accumulation_steps={rows // batch}, which are the "
            f"same {rows} sequences an update"
        )
    return (
        f"batch_size={config.batch_size} does not divide over data * fsdp = {parts} devices; "
        f"take {way_out}"
    )


def _named(name: str) -> list[Device]:
    """The devices that nanoGPT's `device` key names; auto are those of jax's own choice."""
    platform, _, index = name.partition(":")
    try:
        devices = jax.devices(None if platform == "auto" else platform)
    except RuntimeError:
        devices = []
    if int(index or 0) >= len(devices):
        seen = ", ".join(map(str, jax.devices()))
        raise TrainError(f"device={name}: not there; jax sees {seen}. Use device=auto")
    return [devices[int(index)]] if index else devices
