"""ONNX Runtime, on the graph that PyTorch's own exporter makes of transformers' model: a forward pass of one shape.

Runs in the peers' environment: imports nothing of flaxmill but the protocol and the workloads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from bench.peers import protocol
from bench.workloads import Workload


class OnnxRuntime:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def hello(self) -> dict[str, Any]:
        versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
        return {"versions": versions, "threads": self.threads, "device": "cpu"}

    def ceilings(self) -> dict[str, float]:
        raise RuntimeError("has no products of its own to measure")

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        return Forward(workload, exported(workload, weights), self.threads)


def exported(workload: Workload, weights: Path) -> Path:
    """Returns the graph of a checkpoint for sequences of the workload's length, made when it is first needed."""
    folder = weights.with_name("onnx")
    file = folder / f"{workload.batch}x{workload.length}.onnx"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        model = transformers.GPT2LMHeadModel.from_pretrained(weights, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.onnx.export(
                Logits(model),
                (torch.tensor(workload.tokens()),),
                file,
                input_names=["tokens"],
                output_names=["logits"],
                dynamo=True,
            )
    return file


class Logits(torch.nn.Module):
    """The model without a cache, of which only the logits come out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Any) -> Any:
        return self.model(tokens_BT, use_cache=False).logits


class Forward:
    def __init__(self, workload: Workload, graph: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(graph, options, providers=providers)
        self.given = {"tokens": np.array(workload.tokens(), np.int64)}

    def call(self) -> None:
        (self.logits_BTV,) = self.session.run(None, self.given)

    def outputs(self) -> Mapping[str, Any]:
        _, length, vocab = self.logits_BTV.shape
        times, ids = protocol.sampled(length, 8), protocol.sampled(vocab, 256)
        return {"logits": self.logits_BTV[:, times][..., ids].ravel().tolist()}


def main(threads: str) -> None:
    protocol.serve(OnnxRuntime(int(threads)))
