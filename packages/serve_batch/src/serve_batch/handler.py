"""A JAX model for Beam's RunInference: a compatibility surface, for pipelines that are written around it.

RunInference gives a batch and waits for all of it, so that slots stand free while the longest row of each batch ends:
several times the steps of `transforms.Generate`, which is the surface to prefer. This is the only module that imports
apache_beam.ml, which imports torch if it is installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import core
from serve_batch import host, runners
from serve_batch.records import LongPrompts
from serve_batch.transforms import Row, Serving

with runners.quiet():
    from apache_beam.ml.inference.base import ModelHandler, PredictionResult

Example = str | Mapping[str, Any]

BATCHES_OF_SLOTS = 16
"""The size of a batch, in slots: a batch costs about one longest row more than its share."""


class JaxModelHandler(ModelHandler[Example, PredictionResult, host.EngineHost]):
    """Serves RunInference with a model folder; the inference of a prompt is a record, as `Generate` has it.

        prompts | RunInference(serve_batch.JaxModelHandler("models/gpt2")) | beam.Map(lambda r: r.inference["text"])

    A prompt that cannot be served has an error in its record, and its batch goes on without it.

    Args:
      model: a model folder; workers find it under the same path, and the same model in it.
      sampling: for rows that do not say otherwise.
      slots: rows that decode together.
      precision: one of `core.config.PRECISIONS`; by default what the model is stored in.
      long_prompts: what is done with a prompt that does not fit; one of `records.LONG_PROMPTS`.
      batch_size: rows of a batch, all of one size but the last of a bundle.

    Raises:
      UsageError: arguments that cannot be.
      core.CheckpointError: `model` is no whole model folder.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        sampling: core.Sampling | None = None,
        slots: int = 16,
        precision: str | None = None,
        long_prompts: LongPrompts = "error",
        batch_size: int | None = None,
    ):
        size = batch_size or slots * BATCHES_OF_SLOTS
        super().__init__(min_batch_size=size, max_batch_size=size)
        self._serving = Serving.of(
            model, sampling=sampling, slots=slots, precision=precision, long_prompts=long_prompts
        )

    def load_model(self) -> host.EngineHost:
        return self._serving.engine()

    def run_inference(
        self,
        batch: Sequence[Example],
        model: host.EngineHost,
        inference_args: Mapping[str, Any] | None = None,
    ) -> list[PredictionResult]:
        """Returns a result for each example, in order.

        Anything raised means that the engine itself is broken.
        """
        model = self._serving.engine()  # another, where that one has failed
        rows = [Row.of(example, self._serving, model) for example in batch]
        asked = (
            ((row, sample), request) for row in rows for sample, request in enumerate(row.requests)
        )
        for (row, sample), result in model.complete(asked):
            row.results[sample] = result
        return [
            PredictionResult(example, row.record(self._serving, model), self._serving.revision[:16])
            for example, row in zip(batch, rows, strict=True)
        ]

    def get_num_bytes(self, batch: Sequence[Example]) -> int:
        """Returns roughly the text of a batch; by default Beam would pickle it to know."""
        return sum(len(x if isinstance(x, str) else str(x.get("prompt", ""))) for x in batch)

    def get_metrics_namespace(self) -> str:
        return "serve_batch"
