"""The loss on held-out batches: the same ones at every evaluation, and never drawn from the training stream.

nanoGPT draws evaluation batches from the generator that also feeds training, so that changing `eval_interval` changes
the data a run sees, and two evaluations differ by their samples as well as by their weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from core.losses import loss
from core.models import Model, Params
from train.config import TrainConfig
from train.data import Dataset
from train.step import next_tokens

Evaluate = Callable[[Params], dict[str, float]]


def evaluator(model: Model, config: TrainConfig, dataset: Dataset, dtype: Any) -> Evaluate:
    """Returns a function from parameters to mean losses over `eval_iters` batches of each split, without dropout."""

    @jax.jit
    def loss_of(params: Params, tokens_BS: jax.Array) -> jax.Array:
        return loss(params, model, next_tokens(tokens_BS), dtype=dtype, auxiliary=False)

    def mean_loss(params: Params, stream: str) -> float:
        losses = [
            loss_of(
                params,
                dataset.batch(
                    stream,
                    seed=config.seed,
                    step=step,
                    rows=config.batch_size,
                    length=config.block_size + 1,
                ),
            )
            for step in range(config.eval_iters)
        ]
        return float(np.mean(jax.device_get(losses), dtype=np.float64))

    def evaluate(params: Params) -> dict[str, float]:
        return {
            "val_loss": mean_loss(params, "eval_val"),
            "train_eval_loss": mean_loss(params, "eval_train"),
        }

    return evaluate
