"""Which tensor of a checkpoint becomes which parameter: tables of rows, and the plan that a table makes of a source.

A row is data, so its inverse is the exporter. Every source tensor is consumed exactly once, every parameter is filled
exactly once, and every mismatch is reported together before a byte is written.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping

import numpy as np

from convert.errors import ConvertError
from convert.sources import SourceTensor
from core import axes
from core.config import GPT2Config

FLOATS = ("float32", "bfloat16", "float16")
"""The types that weights may have, in a source and in a model folder."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source` holds parameter `target`, its axes as the left side of `layout` stores them; {L} stands for a layer."""

    source: str
    target: str
    layout: str


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
    """A family in somebody's format, named as its exporter writes it; a file may leave `prefix` away."""

    prefix: str
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]
    tie: Tie


@dataclasses.dataclass(frozen=True)
class Move:
    """One parameter's way: `source` is the table's full name of it, `found` the name it has in the file at hand."""

    target: str
    source: str
    layout: str
    found: str = ""


@dataclasses.dataclass(frozen=True)
class Match:
    """A source that fits: the model, its moves in the order of the model's tensors, and what is dropped and why."""

    config: GPT2Config
    moves: tuple[Move, ...]
    dropped: Mapping[str, str]


def moves(table: Table, config: GPT2Config) -> list[Move]:
    """Returns how the table stores each of the model's tensors, in the order of `config.tensors()`."""
    rows = {
        target: Move(target, source, rule.layout)
        for rule in table.rules
        for source, target in zip(
            _per_layer(rule.source, config), _per_layer(rule.target, config), strict=True
        )
    }
    return [rows[name] for name in config.tensors()]


def match(table: Table, config: GPT2Config, tensors: Mapping[str, SourceTensor]) -> Match:
    """Finds every parameter of `config` among `tensors`, whose names may lack the table's prefix.

    Raises:
      ConvertError: with every tensor that is unknown, missing, there twice, or of the wrong shape or type.
    """
    drops = {name: drop.why for drop in table.drops for name in _per_layer(drop.source, config)}
    stored, problems = _full_names(table, config, tensors)
    config, repeated = _settle_head(table.tie, config, stored)
    drops |= repeated
    wanted = {move.source: move for move in moves(table, config)}
    missing = [name for name in wanted if name not in stored]
    for name, tensor in stored.items():
        if name in wanted:
            problems += _misfits(tensor, wanted[name], config)
        elif name not in drops:
            problems.append(f"{tensor.name} is not of this model{_nearest(name, missing)}")
    problems += [f"{wanted[name].target} is missing, looked for {name}" for name in missing]
    if problems:
        raise ConvertError(
            f"{len(problems)} mismatches with config.json ({_sizes(config)})", problems
        )
    return Match(
        config,
        tuple(dataclasses.replace(move, found=stored[name].name) for name, move in wanted.items()),
        {tensor.name: drops[name] for name, tensor in stored.items() if name in drops},
    )


def _per_layer(template: str, config: GPT2Config) -> list[str]:
    if "{L}" not in template:
        return [template]
    return [template.replace("{L}", str(layer)) for layer in range(config.n_layer)]


def _full_names(
    table: Table, config: GPT2Config, tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], list[str]]:
    """Returns the tensors by the table's names, unknown ones by their own, and those that are there twice."""
    known = {
        name for row in (*table.rules, *table.drops) for name in _per_layer(row.source, config)
    }
    stored: dict[str, SourceTensor] = {}
    problems = []
    for name, tensor in tensors.items():
        full = table.prefix + name if table.prefix + name in known else name
        if full in stored:
            problems.append(f"{stored[full].name} and {name} are the same tensor twice")
        stored[full] = tensor
    return stored, problems


def _settle_head(
    tie: Tie, config: GPT2Config, stored: Mapping[str, SourceTensor]
) -> tuple[GPT2Config, dict[str, str]]:
    """Returns the config with the head that the file really has, and the drop of a head that only repeats."""
    if tie.source not in stored or not config.tie_word_embeddings:
        return config, {}
    if tie.to in stored and _same_bytes(stored[tie.source], stored[tie.to]):
        return config, {tie.source: f"repeats {stored[tie.to].name}: the head is tied"}
    return dataclasses.replace(config, tie_word_embeddings=False), {}


def _same_bytes(a: SourceTensor, b: SourceTensor, chunk: int = 1 << 24) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a_bytes, b_bytes = (tensor.read().reshape(-1).view(np.uint8) for tensor in (a, b))
    return all(
        np.array_equal(a_bytes[i : i + chunk], b_bytes[i : i + chunk])
        for i in range(0, a_bytes.size, chunk)
    )


def _misfits(tensor: SourceTensor, move: Move, config: GPT2Config) -> Iterator[str]:
    expected = axes.shape(move.layout.partition(" -> ")[0], config.axes)
    if tensor.shape != expected:
        yield f"{tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}"
    if tensor.dtype not in FLOATS:
        yield f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}"


def _nearest(name: str, missing: list[str]) -> str:
    close = difflib.get_close_matches(name, missing, n=1)
    return f" (nearest of the missing: {close[0]})" if close else ""


def _sizes(config: GPT2Config) -> str:
    shown = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
    return ", ".join(f"{name}={getattr(config, name)}" for name in shown)
