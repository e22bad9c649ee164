"""`step.update` as it is compiled: its state given away, and with what makes it fast where it runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from core.models import Model
from train import pages, step
from train.config import TrainConfig

# Without looking where the old moments are last read, XLA copies all of them before it writes the new ones.
_CPU = {"xla_cpu_copy_insertion_use_region_analysis": True}


def update(
    *, model: Model, config: TrainConfig, dtype: Any, platform: str, **places: Any
) -> Callable[..., tuple[step.State, dict[str, jax.Array]]]:
    """Returns `step.update` of (state, tokens_ABS, learning_rate, dropout_key), compiled when first called.

    On a CPU the process keeps the memory that updates take (`pages.keep`). `places` are jax.jit's: the shardings of
    what comes out.
    """
    if platform == "cpu":
        pages.keep()
    return jax.jit(
        functools.partial(step.update, model=model, config=config, dtype=dtype),
        donate_argnums=0,
        compiler_options=_CPU if platform == "cpu" else None,
        **places,
    )
