"""flaxmill, through the doors that its users take: `core.load`, `model.apply`, `Engine.complete`, `train.step`.

python -m bench.peers.ours doors                      the contestant; `static` serves requests of equal lengths only,
                                                      `engine` serves what a job has without the job
python -m bench.peers.ours first FOLDER TOKENS        a process that tells how long its first forward pass takes
python -m bench.peers.ours giant FOLDER WORKLOAD      a process that opens a large model, reads a prompt, goes on
"""

import functools
import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
import core
import core.engine
import serve_batch
from bench import machine, shapes
from bench.peers import jobs, process, protocol
from bench.workloads import Precision, Workload
from core import native
from serve_batch import host, plan
from train import program, step
from train.config import TrainConfig

PACKAGES = ("core", "convert", "serve_batch", "train")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Flaxmill:
    """`is_even`: requests of equal lengths take the place of those of heavy-tailed ones. `is_engine`: without jobs."""

    def __init__(self, *, is_even: bool = False, is_engine: bool = False) -> None:
        self.is_even, self.is_engine = is_even, is_engine

    def hello(self) -> dict[str, Any]:
        # With a digest of the sources: a version alone does not change with a kernel.
        ours = {f"flaxmill-{name}": plan.code_version(name) for name in PACKAGES}
        others = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        return {
            "versions": {**ours, **others, "native kernels": native.name()},
            "threads": machine.threads(),  # XLA takes every core that the process may use
            "device": jax.default_backend(),
        }

    def ceilings(self) -> dict[str, float]:
        a, b = jax.random.normal(jax.random.key(0), (2, 2048, 2048))
        whole = (100 * a).astype(jnp.int8), (100 * b).astype(jnp.int8)
        # A matrix-vector product reads each number once; 512 MiB are what a model has, and beyond any cache.
        matrix, vector = jnp.ones((2**14, 2**13)), jnp.ones(2**13)

        def rate(a: jax.Array, b: jax.Array, wide: Any) -> float:
            # Both are contracted on their last axis: XLA's fastest form of narrow types.
            product = jax.jit(
                lambda a, b: jax.lax.dot_general(
                    a, b, (((1,), (1,)), ((), ())), preferred_element_type=wide
                )
            )
            return 2 * 2048**3 / _fastest(lambda: product(a, b))

        read = jax.jit(jnp.matmul)
        return {
            "gemm_float32_flops_per_s": rate(a, b, jnp.float32),
            "gemm_bfloat16_flops_per_s": rate(
                a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), jnp.float32
            ),
            "gemm_int8_flops_per_s": rate(*whole, jnp.int32),
            "read_bytes_per_s": matrix.nbytes / _fastest(lambda: read(matrix, vector)),
        }

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        jax.clear_caches()  # so that the first call compiles
        match workload.kind:
            case "convert":
                is_gpt2 = isinstance(workload.shape, shapes.Shape)
                flags = () if is_gpt2 else (f"--experts={workload.experts}",)
                return jobs.Conversion(workload, weights, jobs.flaxmill(*flags))
            case "import":
                code = "import core; core.load; core.Engine"
                return jobs.Command([sys.executable, "-P", "-c", code])
        folder = _converted(weights)
        match workload.kind:
            case "forward":
                return Forward(workload, folder)
            case "prefill" | "decode":
                return Generate(workload, folder)
            case "serve":
                return Serve(workload, folder, is_even=self.is_even)
            case "batch":
                return Alone(workload, folder) if self.is_engine else Job(workload, folder)
            case "train":
                return Train(workload, folder)
            case "open":
                return Open(workload, folder)
            case "load":
                return jobs.opening(folder)
            case "start":
                return _start(workload, folder)
            case "compile":
                arguments = ("first", str(folder), json.dumps(workload.tokens()))
                start = process.command(Path(sys.executable), "bench.peers.ours", *arguments)
                return jobs.Command(start, env=_cache() if workload.is_cached else {})
            case "giant":
                arguments = ("giant", str(folder), json.dumps(workload.to_dict()))
                start = process.command(Path(sys.executable), "bench.peers.ours", *arguments)
                return jobs.Command(start, reads=folder)


def _converted(weights: Path) -> Path:
    """Returns our folder of a checkpoint, beside it, made when it is first needed."""
    folder = weights.with_name("flaxmill")
    if not folder.exists():
        convert.convert(weights, out=folder, quiet=True)
    return folder


def _engine(folder: Path, precision: Precision, *, slots: int, length: int) -> core.Engine:
    """The one place where an engine is made; a slot holds `length` positions."""
    model, params, _ = core.load(folder)
    return core.Engine(model, params, slots=slots, length=length, precision=precision)


def _sampling(new_tokens: int) -> core.Sampling:
    return core.Sampling(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)


def _cache() -> dict[str, str]:
    """Returns the environment of a process that keeps what it compiles, however little, in this worker's folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(Path.cwd() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _start(workload: Workload, folder: Path) -> jobs.Command:
    (tokens,) = workload.tokens()
    flags = (
        f"--model={folder}",
        f"--prompt_tokens={','.join(map(str, tokens))}",
        f"--max_new_tokens={workload.new_tokens}",
        "--temperature=0",
        "--json",
    )
    return jobs.Command(
        [sys.executable, "-P", "-m", "core.generate", *flags],
        # What `core.compiled` sets where nothing is said: the user's own cache is left alone.
        env={**_cache(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"},
        outputs=lambda told: {"tokens": [told["tokens"]]},
        judge=lambda rows: _shortfalls(folder, rows),
    )


def _fastest(compute) -> float:
    def call() -> None:
        jax.block_until_ready(compute())

    return min(protocol.seconds(call) for _ in range(8))


class Forward:
    def __init__(self, workload: Workload, folder: Path) -> None:
        dtype = DTYPES[workload.precision]
        model, self.params, _ = core.load(folder, dtype)
        self.apply = jax.jit(functools.partial(model.apply, dtype=dtype))
        self.tokens_BT = jnp.asarray(workload.tokens(), jnp.int32)

    def call(self) -> None:
        self.logits_BTV = jax.block_until_ready(self.apply(self.params, self.tokens_BT))

    def outputs(self) -> Mapping[str, Any]:
        return {"logits": _sampled(self.logits_BTV)}


class Generate:
    """A whole call of the engine, from token ids on the host to token ids on the host."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.folder = folder
        self.requests = self.ask(workload)
        length = workload.longest
        self.engine = _engine(folder, workload.precision, slots=workload.batch, length=length)

    def ask(self, workload: Workload) -> list[core.Request]:
        sampling = _sampling(workload.new_tokens)
        return [core.Request(row, sampling) for row in workload.tokens()]

    def call(self) -> None:
        self.results = self.engine.complete(self.requests)

    def outputs(self) -> Mapping[str, Any]:
        for result in self.results:
            if isinstance(result, core.RequestError):
                raise result
        return {"tokens": [list(r.tokens) for r in self.results if isinstance(r, core.Completion)]}

    def judge(self, rows: list[list[list[int]]]) -> list[float]:
        return _shortfalls(self.folder, rows)


class Serve(Generate):
    """More requests than slots, each with its own length."""

    def __init__(self, workload: Workload, folder: Path, *, is_even: bool) -> None:
        self.is_even = is_even
        super().__init__(workload, folder)

    def ask(self, workload: Workload) -> list[core.Request]:
        served = workload.served(is_even=self.is_even)
        return [core.Request(prompt, _sampling(new)) for prompt, new in served]

    def outputs(self) -> Mapping[str, Any]:
        rows = super().outputs()["tokens"]
        told = _served(rows, self.engine.counters, self.engine.slots)  # of one call
        return told if self.is_even else {**told, "tokens": rows}


def _served(rows: list[list[int]], did: core.engine.Counters, slots: int) -> dict[str, Any]:
    # A request's first token is drawn when it comes into its slot, before the next step.
    used = (did.tokens - len(rows)) / (did.steps * slots)
    return {"counts": [sum(map(len, rows))], "facts": {"slot_utilisation": used}}


class Alone(Serve):
    """What the engine of a job does without it: all requests at hand, a list of tokens for each in the end."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        super().__init__(workload, folder, is_even=False)
        self.engine = core.Engine(*core.load(folder), slots=workload.batch)


class Job:
    """A batch job from its file of prompts to its manifest, in this process; its model stays open between calls."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.folder, self.slots = folder, workload.batch
        self.input, self.output = Path.cwd() / "prompts.jsonl", Path.cwd() / "completions"
        with self.input.open("w") as file:
            for prompt, new in workload.served():
                print(json.dumps({"token_ids": prompt, "max_new_tokens": new}), file=file)

    def call(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        manifest = serve_batch.run(
            model=self.folder,
            input=self.input,
            output=self.output,
            sampling=core.Sampling(temperature=0, ignore_eos=True),
            slots=self.slots,
        )
        if manifest["errors"]:
            raise RuntimeError(f"rows that were not served: {manifest['errors_by_code']}")

    def outputs(self) -> Mapping[str, Any]:
        rows = [
            json.loads(line)["token_ids"]
            for part in sorted(self.output.glob("part-*.jsonl"))
            for line in part.read_text().splitlines()
        ]
        did = host.counters()  # of one call
        assert did is not None
        return {**_served(rows, did, self.slots), "tokens": rows}

    def judge(self, rows: list[list[list[int]]]) -> list[float]:
        return _shortfalls(self.folder, rows)


def _shortfalls(folder: Path, rows: list[list[list[int]]]) -> list[float]:
    """Returns how far each row's continuation lies below the likeliest tokens, in float32, at the most.

    In standard deviations of the logits; a row is a prompt and what somebody continued it by.
    """
    model, params, _ = core.load(folder)
    apply = jax.jit(model.apply)
    found = []
    for prompt, new in rows:
        tokens_1T = jnp.asarray([[*prompt, *new[:-1]]], jnp.int32)
        logits_NV = np.asarray(apply(params, tokens_1T))[0, len(prompt) - 1 :]
        taken_N = logits_NV[np.arange(len(new)), new]
        found.append(float(np.max((logits_NV.max(-1) - taken_N) / logits_NV.std(-1))))
    return found


class Train:
    def __init__(self, workload: Workload, folder: Path) -> None:
        model, params, _ = core.load(folder)
        config = TrainConfig(
            batch_size=workload.batch,
            block_size=workload.length,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
        )
        dtype = jnp.dtype(workload.precision)  # of the products; parameters are float32
        platform = jax.default_backend()
        self.update = program.update(model=model, config=config, dtype=dtype, platform=platform)
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


def _first(folder: str, tokens: str) -> None:
    """Tells the seconds from opened weights to the first logits."""
    answers = protocol.claim_stdout()
    model, params, _ = core.load(folder)
    tokens_BT = jnp.asarray(json.loads(tokens), jnp.int32)
    jax.block_until_ready(params)
    seconds = protocol.seconds(
        lambda: jax.block_until_ready(jax.jit(model.apply)(params, tokens_BT))
    )
    print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def _giant(folder: str, workload: str) -> None:
    """Tells the seconds of opening, of a prompt, and of going on after it, the compilation left out."""
    answers = protocol.claim_stdout()
    work = Workload.from_dict(json.loads(workload))
    (prompt,) = work.tokens()
    start = time.perf_counter()
    engine = _engine(Path(folder), work.precision, slots=1, length=work.longest)
    parts_s = {"open": time.perf_counter() - start}

    def complete(tokens: list[int], new_tokens: int) -> float:
        start = time.perf_counter()
        (result,) = engine.complete([core.Request(tokens, _sampling(new_tokens))])
        if isinstance(result, core.RequestError):
            raise result
        return time.perf_counter() - start

    # Three prompts, of which none begins like another.
    complete(prompt[1:] + prompt[:1], 2)
    parts_s["prompt"] = complete(prompt[2:] + prompt[:2], 1)
    decode_s = complete(prompt, 1 + work.new_tokens) - parts_s["prompt"]
    told = {"seconds": decode_s, "parts_s": parts_s, "counts": [work.new_tokens]}
    print(json.dumps(told), file=answers, flush=True)


def main(mode: str = "doors", *arguments: str) -> None:
    match mode:
        case "first":
            _first(*arguments)
        case "giant":
            _giant(*arguments)
        case _:
            protocol.serve(Flaxmill(is_even=mode == "static", is_engine=mode == "engine"))
