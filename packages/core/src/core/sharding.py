"""Where parameters live on several devices: rules by axis letter, the same for every family.

    mesh = sharding.mesh("expert=4,tensor=2")
    folder = checkpoint.open("models/gpt-oss-20b")
    placement = sharding.place(folder.config, mesh)
    params = folder.params(shardings=placement.shardings)
    with jax.set_mesh(mesh):
        model.apply(params, ...)

The mesh has to be set where a mixture of experts runs: there each device works for its own experts (`core.moe`).
Everything else XLA partitions from where the parameters are. `core.load` does all this, and an engine sets the mesh of
its parameters itself.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from core.config import Config
from core.errors import ConfigError

AXES = ("data", "fsdp", "expert", "tensor")
"""The axes that a mesh may have; along "data" every device has the same parameters."""

EXPERT = "expert"

RULES: Mapping[str, str] = {
    "E": EXPERT,
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "R": "tensor",  # F in blocks
    "V": "tensor",
    "D": "fsdp",
    "Q": "fsdp",  # D in blocks
}
"""The mesh axis along which a parameter's axis is cut, by letter; see `core.axes`."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A sharding for every parameter by name, and `notes`: what stays whole although a rule would cut it, and why."""

    shardings: Mapping[str, NamedSharding]
    notes: tuple[str, ...]


def mesh(sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over `devices` (all there are): "fsdp=2,tensor=4"; one size may be -1, which is what is left.

    Raises:
      ConfigError: an axis that is none of AXES, a size that is no positive number, or sizes that are not the devices'.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = _parsed(sizes) if isinstance(sizes, str) else dict(sizes)
    if unknown := sorted(set(given) - set(AXES)):
        raise ConfigError(f"mesh axis {unknown[0]!r} is unknown; expected {', '.join(AXES)}")
    said = ",".join(f"{name}={size}" for name, size in given.items())
    if any(size < 1 and size != -1 for size in given.values()) or [*given.values()].count(-1) > 1:
        raise ConfigError(f"mesh {said}: sizes are positive, and one may be -1 (what is left)")
    known = math.prod(size for size in given.values() if size != -1)
    left = len(devices) // known
    shape = {name: left if given.get(name) == -1 else given.get(name, 1) for name in AXES}
    if math.prod(shape.values()) != len(devices):
        raise ConfigError(
            f"mesh {said} does not make the {len(devices)} devices; give one axis the size -1 for what is left"
        )
    return jax.make_mesh(
        tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def place(config: Config, mesh: Mesh | AbstractMesh, rules: Mapping[str, str] = RULES) -> Placement:
    """Returns where each parameter of `config` goes.

    An axis whose length the mesh axis does not divide stays whole, as do those without a rule. Of two axes of one
    parameter with the same rule the first is cut.
    """
    shardings: dict[str, NamedSharding] = {}
    whole: dict[str, list[str]] = {}
    for name, word in config.tensors().items():
        spec: list[str | None] = []
        for letter in word:
            axis = rules.get(letter)
            size = mesh.shape.get(axis, 1) if axis is not None else 1
            if size == 1 or axis in spec:
                spec.append(None)
            elif config.axes[letter] % size:
                spec.append(None)
                reason = f"{letter}={config.axes[letter]} does not divide by {axis}={size}"
                whole.setdefault(reason, []).append(name)
            else:
                spec.append(axis)
        shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
    return Placement(shardings, tuple(_notes(whole)))


BATCH = ("data", "fsdp")
"""The mesh axes along which a batch is cut."""


def cut_batch(x: jax.Array) -> jax.Array:
    """Returns `x` cut along its first axis where a mesh is set (`jax.set_mesh`) whose BATCH axes divide it.

    Left to itself, XLA cuts activations as it cuts parameters, and then gathers and cuts again between any two.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(sizes.get(axis, 1) for axis in BATCH)
    if devices == 1 or x.shape[0] % devices:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH))


def whole_rows(table: jax.Array) -> jax.Array:
    """Returns `table` with each row whole on its device, where a mesh is set: what rows are taken from for a batch.

    Parts of rows of a batch that is cut would have to be brought to other devices each.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return table
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
    return jax.lax.with_sharding_constraint(table, spec)


def mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh of several devices on which parameters lie; None if they are on one."""
    for x in jax.tree.leaves(params):
        placed = getattr(x, "sharding", None)
        if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh):
            return placed.mesh if placed.mesh.size > 1 else None
    return None


def rows(mesh: Mesh, x: jax.ShapeDtypeStruct, *, heads: bool) -> NamedSharding:
    """Returns where an array of a row a slot goes: rows over "data", a cache's heads [R, K, S, H] over "tensor"."""

    def cut(size: int, axis: str) -> str | None:
        return axis if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None

    spec = [cut(x.shape[0], "data")] + ([cut(x.shape[1], "tensor")] if heads else [])
    return NamedSharding(mesh, PartitionSpec(*spec))


def _parsed(sizes: str) -> dict[str, int]:
    parsed = {}
    for part in filter(None, sizes.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if not size.removeprefix("-").isdecimal() or name in parsed:
            raise ConfigError(f"mesh {sizes!r}: expected AXIS=SIZE,..., each axis once")
        parsed[name] = int(size)
    return parsed


def _notes(whole: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for reason, names in whole.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{reason}: {names[0]}{more} not cut there"
