"""flaxmill, through the doors that its users take: `core.load`, `model.apply`, `Engine.complete`, `train.step`."""

import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
import core
from bench import machine
from bench.peers import jobs, protocol
from bench.workloads import Workload
from train import step
from train.config import TrainConfig


class Flaxmill:
    def hello(self) -> dict[str, Any]:
        names = ("flaxmill-core", "jax", "flax")
        return {
            "versions": {name: importlib.metadata.version(name) for name in names},
            "threads": machine.threads(),  # XLA takes every core that the process may use
            "device": jax.default_backend(),
        }

    def ceilings(self) -> dict[str, float]:
        a, b = jax.random.normal(jax.random.key(0), (2, 2048, 2048))
        # A matrix-vector product reads each number once; 256 MiB are beyond any cache.
        matrix, vector = jnp.ones((2**14, 2**12)), jnp.ones(2**12)
        multiply = jax.jit(jnp.matmul)
        return {
            "gemm_flops_per_s": 2 * 2048**3 / _fastest(lambda: multiply(a, b)),
            "read_bytes_per_s": matrix.nbytes / _fastest(lambda: multiply(matrix, vector)),
        }

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        jax.clear_caches()  # so that the first call compiles
        if workload.kind == "convert":
            flags = (f"--experts={workload.experts}",) if workload.shape.family == "gpt_oss" else ()
            return jobs.Conversion(workload, weights, jobs.flaxmill(*flags))
        folder = _converted(weights)
        if workload.kind == "load":
            return jobs.opening(folder)
        task = {
            "forward": Forward,
            "prefill": Generate,
            "decode": Generate,
            "train": Train,
            "open": Open,
        }[workload.kind]
        return task(workload, folder)


def _converted(weights: Path) -> Path:
    """Returns our folder of a checkpoint, beside it, made when it is first needed."""
    folder = weights.with_name("flaxmill")
    if not folder.exists():
        convert.convert(weights, out=folder, quiet=True)
    return folder


def _fastest(compute) -> float:
    def call() -> None:
        jax.block_until_ready(compute())

    return min(protocol.seconds(call) for _ in range(8))


class Forward:
    def __init__(self, workload: Workload, folder: Path) -> None:
        model, self.params, _ = core.load(folder)
        self.apply = jax.jit(model.apply)
        self.tokens_BT = jnp.asarray(workload.tokens(), jnp.int32)

    def call(self) -> None:
        self.logits_BTV = jax.block_until_ready(self.apply(self.params, self.tokens_BT))

    def outputs(self) -> Mapping[str, Any]:
        return {"logits": _sampled(self.logits_BTV)}


class Generate:
    """A whole call of the engine, from token ids on the host to token ids on the host."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        model, params, _ = core.load(folder)
        self.engine = core.Engine(model, params, slots=workload.batch)
        sampling = core.Sampling(temperature=0, max_new_tokens=workload.new_tokens, ignore_eos=True)
        self.requests = [core.Request(row, sampling) for row in workload.tokens()]

    def call(self) -> None:
        self.results = self.engine.complete(self.requests)

    def outputs(self) -> Mapping[str, Any]:
        for result in self.results:
            if isinstance(result, core.RequestError):
                raise result
        return {"tokens": [list(r.tokens) for r in self.results if isinstance(r, core.Completion)]}


class Train:
    def __init__(self, workload: Workload, folder: Path) -> None:
        model, params, _ = core.load(folder)
        config = TrainConfig(
            batch_size=workload.batch,
            block_size=workload.length,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
        )
        update = functools.partial(step.update, model=model, config=config, dtype=jnp.float32)
        self.update = jax.jit(update, donate_argnames="state")
        self.learning_rate = np.float32(config.learning_rate)
        self.tokens_ABS = jnp.asarray([workload.tokens()], jnp.int32)
        # Copies, because the update gives its state away and mapped files must not be given away.
        self.state = step.initial_state(jax.tree.map(jnp.array, params), config)
        self.losses: list[float] = []

    def call(self) -> None:
        self.state, numbers = self.update(self.state, self.tokens_ABS, self.learning_rate, None)
        jax.block_until_ready(self.state)
        self.losses.append(float(numbers["train_loss"]))

    def outputs(self) -> Mapping[str, Any]:
        while len(self.losses) < 4:
            self.call()
        return {"losses": self.losses[:4]}


class Open:
    """Loading and one pass: mapped files are read when they are first used, so loading alone would say little."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.folder = folder
        self.apply = jax.jit(core.load(folder)[0].apply)
        self.tokens_BT = jnp.asarray(workload.tokens(), jnp.int32)

    def call(self) -> None:
        _, params, _ = core.load(self.folder)
        self.logits_BTV = jax.block_until_ready(self.apply(params, self.tokens_BT))

    def outputs(self) -> Mapping[str, Any]:
        return {"logits": _sampled(self.logits_BTV)}


def _sampled(logits_BTV: jax.Array) -> list[float]:
    _, length, vocab = logits_BTV.shape
    times, ids = protocol.sampled(length, 8), protocol.sampled(vocab, 256)
    return np.asarray(logits_BTV)[:, times][..., ids].ravel().tolist()


def main() -> None:
    protocol.serve(Flaxmill())
