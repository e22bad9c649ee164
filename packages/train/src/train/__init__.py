"""Training and fine-tuning: `train.run(train.TrainConfig(...))`, or `python -m train --config=FILE`.

Names load on first use, so importing `train` (as every file in configs/ does) never starts jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config import TrainConfig as TrainConfig
    from train.loop import Result as Result
    from train.loop import run as run
    from train.preflight import TrainError as TrainError

_MODULE_OF = {
    "TrainConfig": "config",
    "Result": "loop",
    "TrainError": "preflight",
    "run": "loop",
}

__all__ = ["Result", "TrainConfig", "TrainError", "run"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"train.{_MODULE_OF[name]}"), name)
