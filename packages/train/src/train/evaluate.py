"""The loss on held-out batches: the same ones at every evaluation, and never drawn from the training stream.

nanoGPT draws evaluation batches from the generator that also feeds training, so that changing `eval_interval` changes
the data a run sees, and two evaluations differ by their samples as well as by their weights.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from core.losses import loss
from core.models import Model, Params
from train.config import TrainConfig
from train.data import Dataset, bytes_per_token, windows
from train.step import loss_chunk, next_tokens

LN_2 = math.log(2)
Evaluate = Callable[[Params], dict[str, float]]


def evaluator(model: Model, config: TrainConfig, dataset: Dataset, dtype: Any) -> Evaluate:
    """Returns a function from parameters to mean losses without dropout.

    They are over `eval_iters` batches of each split; with `eval_mode` "full" the validation loss is over every window
    of its split once. "val_bits_per_byte" is that loss for a byte of text instead of a token, by which models of
    different vocabularies can be compared; without a tokenizer in the data folder it is left out.
    """
    length = bytes_per_token(dataset, "val")

    @jax.jit
    def loss_of(params: Params, tokens_BS: jax.Array) -> jax.Array:
        batch, chunk = next_tokens(tokens_BS), loss_chunk(config, model)
        return loss(params, model, batch, dtype=dtype, auxiliary=False, chunk=chunk)

    def mean_loss(params: Params, batches: Iterator[np.ndarray]) -> float:
        losses = [loss_of(params, batch_BS) for batch_BS in batches]
        return float(np.mean(jax.device_get(losses), dtype=np.float64))

    def whole_loss(params: Params) -> float:
        """A mean of batches, of which the last may have fewer rows than the others."""
        total, rows = 0.0, 0
        for batch_BS in _every_window(config, dataset):
            total += float(loss_of(params, batch_BS)) * len(batch_BS)
            rows += len(batch_BS)
        return total / rows

    def evaluate(params: Params) -> dict[str, float]:
        if config.eval_mode == "full":
            val_loss = whole_loss(params)
        else:
            val_loss = mean_loss(params, _samples(config, dataset, "eval_val"))
        train_loss = mean_loss(params, _samples(config, dataset, "eval_train"))
        found = {"val_loss": val_loss, "train_eval_loss": train_loss}
        return found if length is None else found | {"val_bits_per_byte": val_loss / LN_2 / length}

    return evaluate


def _samples(config: TrainConfig, dataset: Dataset, stream: str) -> Iterator[np.ndarray]:
    rows, length = config.batch_size, config.block_size + 1
    for step in range(config.eval_iters):
        yield dataset.batch(stream, seed=config.seed, step=step, rows=rows, length=length)


def _every_window(config: TrainConfig, dataset: Dataset) -> Iterator[np.ndarray]:
    rows, length = config.batch_size, config.block_size + 1
    starts = np.arange(windows(len(dataset.tokens["val"]), length)) * config.block_size
    for first in range(0, len(starts), rows):
        yield dataset.read("val", starts[first : first + rows], length)
