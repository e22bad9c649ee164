"""CTranslate2: the same weights through its own converter, and its own generation loop.

Runs in the peers' environment: imports nothing of flaxmill but the protocol and the workloads.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ctranslate2  # pyright: ignore[reportMissingImports]

from bench.peers import jobs, protocol
from bench.workloads import Workload

TYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"}


class CTranslate2:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def hello(self) -> dict[str, Any]:
        return {
            "versions": {"ctranslate2": ctranslate2.__version__},
            "threads": self.threads,
            "device": "cpu",
        }

    def ceilings(self) -> dict[str, float]:
        raise RuntimeError("has no products of its own to measure")

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        if workload.kind == "import":
            return jobs.Command([sys.executable, "-P", "-c", "import ctranslate2"])
        known = ctranslate2.get_supported_compute_types("cpu")
        if TYPES[workload.precision] not in known:
            raise protocol.Unable(f"has no {workload.precision} on this CPU, only {sorted(known)}")
        return Generate(workload, _converted(workload, weights), self.threads)


def _converted(workload: Workload, weights: Path) -> Path:
    """Returns CTranslate2's folder of a checkpoint, made when it is first needed.

    It takes token's names, of which our models have none: they are called by their numbers.
    """
    type_ = TYPES[workload.precision]
    folder = weights.with_name(f"ctranslate2-{type_}")
    if folder.exists():
        return folder
    import transformers  # pyright: ignore[reportMissingImports]
    from ctranslate2.converters import transformers as converters  # pyright: ignore[reportMissingImports]

    model = transformers.GPT2LMHeadModel.from_pretrained(weights)
    spec = converters.GPT2Loader().get_model_spec(model)
    spec.register_vocabulary([str(i) for i in range(workload.shape.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.validate()
    spec.optimize(quantization=type_)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    spec.save(str(partial))
    return partial.rename(folder)


class Generate:
    def __init__(self, workload: Workload, folder: Path, threads: int) -> None:
        self.new_tokens = workload.new_tokens
        self.prompts = [[str(token) for token in row] for row in workload.tokens()]
        self.generator = ctranslate2.Generator(
            str(folder),
            device="cpu",
            compute_type=TYPES[workload.precision],
            inter_threads=1,
            intra_threads=threads,
        )

    def call(self) -> None:
        self.results = self.generator.generate_batch(
            self.prompts,
            max_length=self.new_tokens,
            min_length=self.new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )

    def outputs(self) -> Mapping[str, Any]:
        return {"tokens": [[int(t) for t in result.sequences[0]] for result in self.results]}


def main(threads: str) -> None:
    protocol.serve(CTranslate2(int(threads)))
