"""Training and fine-tuning: `train.run(train.TrainConfig(...))`, or `python -m train --config=FILE`.

Names load on first use, so importing `train` (as every file in configs/ does) never starts jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config import TrainConfig as TrainConfig
    from train.loop import Result as Result
    from train.loop import run as run
    from train.origin import TrainError as TrainError

_HOMES = {
    "TrainConfig": "train.config",
    "Result": "train.loop",
    "TrainError": "train.origin",
    "run": "train.loop",
}

__all__ = ["Result", "TrainConfig", "TrainError", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'train' has no attribute {name!r}")
