"""What a finished or interrupted run left behind, read back for comparison."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import origin, preflight
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.devices import open_devices
from train.metrics import read_rows
from train.step import State


def last_state(out_dir: Path) -> State:
    """The state of the last checkpoint, as a resumed run would begin from it."""
    values = json.loads((out_dir / "config.json").read_text())
    config = TrainConfig.from_dict({**values, "mesh": "data=-1", "processes": 1, "process": 0})
    plan = preflight.check(dataclasses.replace(config, init_from="resume"))
    with Checkpoints(out_dir / "checkpoints") as checkpoints:
        return origin.begin(
            config, plan, checkpoints, key=jax.random.key(0), devices=open_devices(config)
        ).state


def last_arrays(out_dir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint by its path: parameters, both moments and the count."""
    leaves = jax.tree.leaves_with_path(last_state(out_dir))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def different_arrays(one: Path, other: Path) -> list[str]:
    """The paths of the arrays that are not bitwise the same in two runs' last checkpoints."""
    left, right = last_arrays(one), last_arrays(other)
    assert left.keys() == right.keys()
    return [name for name in left if left[name].tobytes() != right[name].tobytes()]


def timeless_rows(out_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    times = {"tokens_per_s", "mfu", "goodput"}
    rows = read_rows(out_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]
