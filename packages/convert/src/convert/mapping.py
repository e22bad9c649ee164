"""Which tensor of a checkpoint becomes which parameter: tables of rows, and the plan that a table makes of a source.

A row is data, so its inverse is the exporter. Every source tensor is consumed exactly once, every parameter is filled
exactly once, and every mismatch is reported together before a byte is written.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.sources import SourceTensor
from core import axes, checkpoint
from core.config import Config

FLOATS = ("float32", "bfloat16", "float16")
"""The types that weights may have, in a source and in a model folder."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source` holds parameter `target`, its axes as the left side of `layout` stores them; {L} stands for a layer.

    Several targets, each with its layout, lie one after the other along the first axis of `source`.
    """

    source: str
    target: str | tuple[str, ...]
    layout: str | tuple[str, ...]

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Every target with its layout."""
        if isinstance(self.target, str) and isinstance(self.layout, str):
            return ((self.target, self.layout),)
        return tuple(zip(self.target, self.layout, strict=True))


@dataclasses.dataclass(frozen=True)
class Drop:
    """A tensor that is no parameter, and why."""

    source: str
    why: str


@dataclasses.dataclass(frozen=True)
class Tie:
    """A head that, where it is stored although the config ties it, either repeats `to` byte for byte or is its own."""

    source: str
    to: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A family in somebody's format, named as its exporter writes it.

    A file may leave away what a name begins with if that is in `may_lack`, and put in front what is in `may_carry`.
    """

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()
    tie: Tie | None = None
    may_lack: tuple[str, ...] = ()
    may_carry: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Move:
    """One parameter's way: `source` is the table's full name of it, `found` the name it has in the file at hand.

    `rows` are those of the source's first axis that hold it, where others share the tensor.
    """

    target: str
    source: str
    layout: str
    rows: tuple[int, int] | None = None
    found: str = ""


@dataclasses.dataclass(frozen=True)
class Match:
    """A source that fits: the model, its moves in the order of the model's tensors, and what is dropped and why."""

    config: Config
    moves: tuple[Move, ...]
    dropped: Mapping[str, str]


def moves(table: Table, config: Config) -> list[Move]:
    """Returns how the table stores each of the model's tensors, in the order of `config.tensors()`."""
    rows = {
        move.target: move
        for rule in table.rules
        for layer in _layers(rule.source, config)
        for move in _moves(rule, layer, config)
    }
    return [rows[name] for name in config.tensors()]


def match(table: Table, config: Any, tensors: Mapping[str, SourceTensor]) -> Match:
    """Finds every parameter of `config` among `tensors`, whose names may lack or carry the table's prefixes.

    Raises:
      ConvertError: with every tensor that is unknown, missing, there twice, or of the wrong shape or type.
    """
    drops = {name: drop.why for drop in table.drops for name in _per_layer(drop.source, config)}
    stored, problems = _full_names(table, config, tensors)
    if table.tie is not None:
        config, repeated = _settle_head(table.tie, config, stored)
        drops |= repeated
    wanted: dict[str, list[Move]] = {}
    for move in moves(table, config):
        wanted.setdefault(move.source, []).append(move)
    missing = [name for name in wanted if name not in stored]
    for name, tensor in stored.items():
        if name in wanted:
            problems += _misfits(tensor, wanted[name], config)
        elif name not in drops:
            near = _nearest(name, missing) if len(problems) < ConvertError.SHOWN else ""
            problems.append(f"{tensor.name} is not of this model{near}")
    problems += [
        f"{move.target} is missing, looked for {name}" for name in missing for move in wanted[name]
    ]
    if problems:
        raise ConvertError(
            f"{len(problems)} mismatches with the config ({sizes(config)})", problems
        )
    return Match(
        config,
        tuple(
            dataclasses.replace(move, found=stored[move.source].name)
            for move in moves(table, config)
        ),
        {tensor.name: drops[name] for name, tensor in stored.items() if name in drops},
    )


def sizes(config: Config) -> str:
    """Returns the numbers that decide the shapes of a model, as its config names them."""
    return ", ".join(
        f"{name}={value}"
        for name, value in config.to_dict().items()
        if type(value) is int and not name.endswith("token_id")
    )


def _layers(template: str, config: Config) -> list[str]:
    return [str(layer) for layer in range(config.axes["L"])] if "{L}" in template else [""]


def _per_layer(template: str, config: Config) -> list[str]:
    return [template.replace("{L}", layer) for layer in _layers(template, config)]


def _moves(rule: Rule, layer: str, config: Config) -> Iterator[Move]:
    begin = 0
    for target, layout in rule.parts:
        end = begin + _stored_shape(layout, config)[0]
        yield Move(
            target.replace("{L}", layer),
            rule.source.replace("{L}", layer),
            layout,
            (begin, end) if len(rule.parts) > 1 else None,
        )
        begin = end


def _stored_shape(layout: str, config: Config) -> tuple[int, ...]:
    return axes.shape(layout.partition(" -> ")[0], config.axes)


def _full_names(
    table: Table, config: Config, tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], list[str]]:
    """Returns the tensors by the table's names, unknown ones by their own, and those that are there twice."""
    known = {
        name for row in (*table.rules, *table.drops) for name in _per_layer(row.source, config)
    }
    stored: dict[str, SourceTensor] = {}
    problems = []
    for name, tensor in tensors.items():
        full = _full_name(table, known, name)
        if full in stored:
            problems.append(f"{stored[full].name} and {name} are the same tensor twice")
        stored[full] = tensor
    return stored, problems


def _full_name(table: Table, known: set[str], name: str) -> str:
    bare = name
    for prefix in table.may_carry:
        bare = bare.removeprefix(prefix)
    spellings = (bare, *(prefix + bare for prefix in table.may_lack))
    return next((spelling for spelling in spellings if spelling in known), name)


def _settle_head(
    tie: Tie, config: Any, stored: Mapping[str, SourceTensor]
) -> tuple[Any, dict[str, str]]:
    """Returns the config with the head that the file really has, and the drop of a head that only repeats."""
    if tie.source not in stored or not config.tie_word_embeddings:
        return config, {}
    if tie.to in stored and _same_bytes(stored[tie.source], stored[tie.to]):
        return config, {tie.source: f"repeats {stored[tie.to].name}: the head is tied"}
    return dataclasses.replace(config, tie_word_embeddings=False), {}


def _same_bytes(a: SourceTensor, b: SourceTensor, chunk: int = 1 << 24) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape) or 0 in a.shape or not a.shape:
        return False
    a_array, b_array = a.read(), b.read()
    rows = max(1, chunk // a_array[:1].nbytes)

    def same(part: slice) -> bool:
        a_bytes, b_bytes = (x[part].reshape(-1).view(np.uint8) for x in (a_array, b_array))
        return np.array_equal(a_bytes, b_bytes)

    return all(same(slice(i, i + rows)) for i in range(0, len(a_array), rows))


def _misfits(tensor: SourceTensor, held: list[Move], config: Config) -> Iterator[str]:
    shapes = [_stored_shape(move.layout, config) for move in held]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if tensor.shape != expected:
        yield f"{tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}"
    quantised = checkpoint.quantised_dtype(config, held[0].target)
    types = FLOATS if quantised is None else (quantised,)
    if tensor.dtype not in types:
        yield f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(types)}"


def _nearest(name: str, missing: list[str]) -> str:
    close = difflib.get_close_matches(name, missing, n=1)
    return f" (nearest of the missing: {close[0]})" if close else ""
