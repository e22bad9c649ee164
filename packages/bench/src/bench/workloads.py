"""What is measured: every workload by name, with what it counts and what it must cost at the least.

Standard library only, because the peers read this file in environments of their own.
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from bench import shapes
from bench.shapes import GPT2_3M, GPT2_124M, GPT2_XL, NANOGPT_CPU, AnyShape, Shape

Kind = Literal[
    "forward",
    "prefill",
    "decode",
    "serve",
    "batch",
    "train",
    "open",
    "start",
    "compile",
    "import",
    "load",
    "convert",
    "giant",
]
Precision = Literal["float32", "bfloat16", "int8"]

# Work that is a process of its own each time: there is nothing to warm up.
OWN_PROCESS: frozenset[Kind] = frozenset({"start", "compile", "import", "load", "convert", "giant"})

# Weights below this size live in the last-level cache, where the bandwidth of the memory is no limit.
CACHED_BYTES = 64 * 2**20

# Who may be left out of a workload.
TORCH_COMPILE, GENERATE, COMPILED = "torch.compile", "HF generate", "HF compiled"
LLAMA, CTRANSLATE, ONNX = "llama.cpp", "CTranslate2", "ONNX Runtime"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Work of `flops` floating-point operations that reads `bytes` of weights and cache, done `times` times over."""

    times: int
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One thing to be timed: `batch` sequences of `length` tokens, and `new_tokens` more of each in decoding.

    forward: logits of every position, without a cache. prefill: the time to the first token. decode: a whole call
    of the generation loop, prompt included, greedy. serve: `requests` requests of heavy-tailed lengths, whose mean
    is `length` and `new_tokens`, through `batch` slots. batch: the same as a job of `serve_batch`, from a file of
    prompts to files of completions. train: loss, gradients, clipping and an AdamW step. open: from a checkpoint on
    disk (in the page cache) to the first logits, with code that is compiled already. start: a command that
    continues a prompt, from its start to its end. compile: the first call of a forward pass in a new process, with
    what an earlier one has left of its compilation (`is_cached`) or nothing. import: a process that only imports.
    load: opening alone, in a process of its own. convert: from a Hugging Face checkpoint to files that one can
    open, in a process of its own, with the `experts` of a GPT-OSS as they are ("keep") or unpacked ("bfloat16").
    giant: a model that fits into memory once only is opened, given a prompt and continued, in a process of its own.

    `without` names contestants that are left out to save time, which a suite may do.
    """

    name: str
    kind: Kind
    shape: AnyShape
    precision: Precision = "float32"
    batch: int = 1
    length: int = 1
    new_tokens: int = 0
    requests: int = 0
    is_cached: bool = True
    experts: str = "keep"
    rounds: int = 7
    without: tuple[str, ...] = ()

    @property
    def gpt2(self) -> Shape:
        """The shape of a workload that only a GPT-2 has."""
        assert isinstance(self.shape, Shape)
        return self.shape

    @property
    def unit(self) -> str:
        rates = {
            "decode": "tokens/s",
            "serve": "tokens/s",
            "batch": "tokens/s",
            "giant": "tokens/s",
            "convert": "GB/s",
        }
        return rates.get(self.kind, "s" if self.kind in ("start", "compile", "import") else "ms")

    @property
    def higher_is_better(self) -> bool:
        return self.unit.endswith("/s")

    @property
    def source_bytes(self) -> int:
        """The size of the checkpoint that everyone is given."""
        return shapes.nbytes(self.shape)

    @property
    def output_bytes(self) -> int:
        """The most that a contestant has on the disk beside the checkpoint."""
        if self.experts == "bfloat16" and isinstance(self.shape, shapes.GptOssShape):
            return self.source_bytes + self.shape.unpacking_bytes
        return self.source_bytes

    @property
    def total_tokens(self) -> int:
        """The new tokens of a call."""
        return (self.requests or self.batch) * self.new_tokens

    def figure(self, seconds: float) -> float:
        """Converts the duration of one call to this workload's unit; gigabytes are those of the checkpoint read."""
        match self.unit:
            case "GB/s":
                return self.source_bytes / 1e9 / seconds
            case "tokens/s":
                return self.total_tokens / seconds
            case "s":
                return seconds
        return 1e3 * seconds

    @property
    def counts(self) -> str:
        """Says in words what is timed."""
        tokens, size = f"{self.batch} x {self.length} tokens", f"{self.source_bytes / 1e9:.2f} GB"
        cache = "what an earlier one compiled is cached" if self.is_cached else "nothing is cached"
        words = {
            "forward": f"logits of all positions, {tokens}",
            "prefill": f"time to the first token, {tokens}",
            "decode": f"greedy generation, batch {self.batch}, prompt {self.length}, {self.new_tokens} new tokens",
            "serve": f"{self.requests} requests of heavy-tailed lengths through {self.batch} slots, "
            f"prompt {self.length} and {self.new_tokens} new tokens in the mean",
            "batch": f"a job of serve_batch, from a file of {self.requests} prompts of heavy-tailed lengths to their "
            f"completions, {self.batch} slots, prompt {self.length} and {self.new_tokens} new tokens in the mean",
            "train": f"loss, gradients, clipping and AdamW, {tokens}",
            "open": f"from the checkpoint on disk, cached by the system, to the first logits, {tokens}",
            "start": f"a command that continues {self.length} tokens by {self.new_tokens}, compiled before",
            "compile": f"the first forward pass of a process, {tokens}; {cache}",
            "import": "a process that imports what generation needs, and ends",
            "load": f"opening {size} cached by the system, in a process of its own",
            "convert": f"a checkpoint of {size} in Hugging Face's format, cached by the system, to another on the disk"
            + (", experts unpacked to bfloat16" if self.experts == "bfloat16" else ""),
            "giant": f"a model of {size}, prompt {self.length}, {self.new_tokens} new tokens one by one",
        }[self.kind]
        return words if self.precision == "float32" else f"{words}, {self.precision}"

    def phases(self) -> tuple[Phase, ...]:
        """The least that any implementation has to do: causal attention, each weight read once a pass."""
        match self.kind:
            case "forward":
                return (self._pass(self.length, heads=self.length),)
            case "prefill":
                return (self._pass(self.length, heads=1),)
            case "train":
                one = self._pass(self.length, heads=self.length)
                return (Phase(1, 3 * one.flops, 3 * one.bytes),)
            case "decode":
                prompt = self._pass(self.length, heads=1)
                return (prompt, self._step(times=self.new_tokens - 1))
            case "giant":
                return (self._step(times=self.new_tokens),)  # the prompt is not in its time
            case _:
                return ()

    def _pass(self, length: int, *, heads: int) -> Phase:
        shape = self.shape
        blocks = shape.row_elements - shape.head_elements
        products = 2 * (length * blocks + heads * shape.head_elements)
        # Two products (scores, values) of 2 D operations for each of the T (T + 1) / 2 pairs a causal mask leaves.
        attention = 2 * shape.attention_width * length * (length + 1)
        weights = shape.weight_bytes(self.batch * length, self.precision)
        return Phase(1, self.batch * (products + attention), weights)

    def _step(self, *, times: int) -> Phase:
        """One more token a row, half-way through the generation."""
        shape, context = self.shape, self.length + self.new_tokens // 2
        flops = 2 * shape.row_elements + 4 * shape.attention_width * context
        cache = shapes.CACHE_BYTES[self.precision] * shape.cache_elements * context
        weights = shape.weight_bytes(self.batch, self.precision)
        return Phase(times, self.batch * flops, weights + self.batch * cache)

    def floor_s(self, *, flops_per_s: float, bytes_per_s: float) -> float | None:
        """Seconds below which this machine cannot finish one call; None where no such limit was measured."""
        weights = self.shape.weight_bytes(self.batch, self.precision)
        if self.kind == "decode" and weights <= CACHED_BYTES:
            return None  # bound by the bandwidth of the cache, which is not among the ceilings
        total = 0.0
        for phase in self.phases():
            memory = phase.bytes / bytes_per_s if phase.bytes > CACHED_BYTES else 0.0
            total += phase.times * max(phase.flops / flops_per_s, memory)
        return total or None

    def tokens(self) -> list[list[int]]:
        """The input: the same in every process, `length` tokens a row, one more where a next token is the target."""
        draw = random.Random(self.name)
        length = self.length + (self.kind == "train")
        return [
            [draw.randrange(self.shape.vocab_size) for _ in range(length)]
            for _ in range(self.batch)
        ]

    @property
    def longest(self) -> int:
        """The most positions that a row has, of prompt and continuation."""
        rows = self.served() if self.requests else [([0] * self.length, self.new_tokens)]
        return max(len(prompt) + new for prompt, new in rows)

    def prompts(self) -> list[list[int]]:
        """What each row or request begins with."""
        return [prompt for prompt, _ in self.served()] if self.requests else self.tokens()

    def served(self, *, is_even: bool = False) -> list[tuple[list[int], int]]:
        """The requests of "serve" and "batch": each one's prompt, and how many tokens it is to be continued by.

        Lengths are log-normal, cut at four times the mean, and add up to what they would with the mean in all of them,
        which they have with `is_even`.
        """
        draw = random.Random(self.name)
        counts: list[tuple[int, int]] = [(self.length, self.new_tokens)] * self.requests
        if not is_even:
            prompts, news = (self._tailed(draw, mean) for mean in (self.length, self.new_tokens))
            counts = list(zip(prompts, news, strict=True))
        vocab = self.shape.vocab_size
        return [([draw.randrange(vocab) for _ in range(length)], new) for length, new in counts]

    def _tailed(self, draw: random.Random, mean: int) -> list[int]:
        raw = [min(draw.lognormvariate(0, 1), 6.0) for _ in range(self.requests)]
        scale = mean * self.requests / sum(raw)
        counts = [min(4 * mean, max(1, round(scale * x))) for x in raw]
        for i in self._round_robin():
            missing = mean * self.requests - sum(counts)
            if not missing:
                return counts
            step = max(-4, min(4, missing))
            counts[i] = min(4 * mean, max(1, counts[i] + step))
        raise AssertionError("unreachable")

    def _round_robin(self) -> Iterator[int]:
        while True:
            yield from range(self.requests)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Workload":
        made = {"shape": shapes.from_dict(values["shape"]), "without": tuple(values["without"])}
        return cls(**{**values, **made})


def _suffix(precision: Precision) -> str:
    return {"float32": "", "bfloat16": "-bf16", "int8": "-int8"}[precision]


def _forward(
    shape: Shape,
    length: int,
    precision: Precision = "float32",
    *,
    rounds: int = 7,
    without: tuple[str, ...] = (),
) -> Workload:
    return Workload(
        name=f"forward-{shape.name}-t{length}{_suffix(precision)}",
        kind="forward",
        shape=shape,
        precision=precision,
        length=length,
        rounds=rounds,
        without=without,
    )


def _prefill(
    shape: Shape, length: int, precision: Precision = "float32", *, without: tuple[str, ...] = ()
) -> Workload:
    return Workload(
        name=f"prefill-{shape.name}-t{length}{_suffix(precision)}",
        kind="prefill",
        shape=shape,
        precision=precision,
        length=length,
        new_tokens=1,
        without=without,
    )


def _decode(
    shape: AnyShape,
    batch: int,
    precision: Precision = "float32",
    *,
    new_tokens: int = 64,
    rounds: int = 7,
    without: tuple[str, ...] = (),
) -> Workload:
    return Workload(
        name=f"decode-{shape.name}-b{batch}-n{new_tokens}{_suffix(precision)}",
        kind="decode",
        shape=shape,
        precision=precision,
        batch=batch,
        length=64,
        new_tokens=new_tokens,
        rounds=rounds,
        without=without,
    )


def _serve(
    shape: Shape,
    slots: int,
    requests: int,
    *,
    rounds: int = 5,
    without: tuple[str, ...] = (),
) -> Workload:
    return Workload(
        name=f"serve-{shape.name}-s{slots}-r{requests}",
        kind="serve",
        shape=shape,
        batch=slots,
        length=32,
        new_tokens=64,
        requests=requests,
        rounds=rounds,
        without=without,
    )


def _batch(shape: Shape, slots: int, requests: int, *, rounds: int = 5) -> Workload:
    served = _serve(shape, slots, requests, rounds=rounds)
    name = served.name.replace("serve", "batch")
    return dataclasses.replace(served, name=name, kind="batch")


def _train(
    shape: Shape,
    batch: int,
    length: int,
    precision: Precision = "float32",
    *,
    rounds: int = 7,
    without: tuple[str, ...] = (),
) -> Workload:
    return Workload(
        name=f"train-{shape.name}-{batch}x{length}{_suffix(precision)}",
        kind="train",
        shape=shape,
        precision=precision,
        batch=batch,
        length=length,
        rounds=rounds,
        without=without,
    )


def _open(shape: Shape) -> Workload:
    return Workload(name=f"open-{shape.name}", kind="open", shape=shape, length=10)


def _start(shape: Shape, *, rounds: int = 5, without: tuple[str, ...] = ()) -> Workload:
    return Workload(
        name=f"start-{shape.name}",
        kind="start",
        shape=shape,
        length=10,
        new_tokens=20,
        rounds=rounds,
        without=without,
    )


def _compile(shape: Shape, *, is_cached: bool) -> Workload:
    return Workload(
        name=f"compile-{shape.name}-{'cached' if is_cached else 'cold'}",
        kind="compile",
        shape=shape,
        length=64,
        is_cached=is_cached,
        rounds=3,
    )


def _load(shape: Shape) -> Workload:
    return Workload(name=f"load-{shape.name}", kind="load", shape=shape, rounds=3)


def _convert(shape: AnyShape, *, experts: str = "keep") -> Workload:
    suffix = f"-{experts}" if experts != "keep" else ""
    name = f"convert-{shape.name}{suffix}"
    return Workload(name=name, kind="convert", shape=shape, experts=experts, rounds=3)


def _giant(shape: shapes.GptOssShape) -> Workload:
    # Experts are MXFP4 whatever the precision, which is what the rest is computed in.
    return Workload(
        name=f"giant-{shape.name}",
        kind="giant",
        shape=shape,
        precision="bfloat16",
        length=128,
        new_tokens=16,
        rounds=3,
    )


_IMPORT = Workload(name="import", kind="import", shape=GPT2_3M, rounds=5)

# Under six minutes on two cores, so that every change can afford it.
CI = (
    _forward(GPT2_3M, 128, without=(TORCH_COMPILE, ONNX)),
    _decode(GPT2_3M, 8, new_tokens=32, without=(COMPILED, CTRANSLATE)),
    # 64 requests a slot: with 16, a tenth of the time is the last requests' alone.
    _serve(GPT2_3M, 8, 512, rounds=3, without=(GENERATE, LLAMA)),
    _batch(GPT2_3M, 8, 128, rounds=3),
    _train(NANOGPT_CPU, 12, 64, without=(TORCH_COMPILE,)),
    _prefill(GPT2_124M, 512, without=(LLAMA, CTRANSLATE)),
    _decode(GPT2_124M, 1, new_tokens=32, without=(COMPILED, CTRANSLATE)),
    _decode(GPT2_124M, 8, new_tokens=32, rounds=5, without=(COMPILED, CTRANSLATE)),
    _decode(GPT2_124M, 32, new_tokens=32, rounds=3, without=(COMPILED, CTRANSLATE)),
    _decode(GPT2_124M, 8, "bfloat16", new_tokens=32, rounds=5, without=(COMPILED,)),
    _decode(GPT2_124M, 8, "int8", new_tokens=32, rounds=5, without=(GENERATE, COMPILED)),
    _start(GPT2_124M, rounds=3, without=(GENERATE,)),
    _open(GPT2_124M),
    _load(GPT2_124M),
    _convert(GPT2_124M),
)

_PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
_FLOATS: tuple[Precision, ...] = ("float32", "bfloat16")


def _sweep(shape: Shape) -> Iterator[Workload]:
    """Decoding by batch and precision; what compiling saves a call is nothing in a large batch."""
    for batch in (1, 8, 32, 64):
        for precision in _PRECISIONS:
            left_out = (COMPILED,) if batch > 8 else ()
            yield _decode(shape, batch, precision, without=left_out)


# About 45 minutes on two quiet cores without XL and the 20B, 90 with them.
FULL = (
    _IMPORT,
    *(_forward(GPT2_3M, length, p) for length in (10, 64, 128) for p in _FLOATS),
    *_sweep(GPT2_3M),
    _serve(GPT2_3M, 8, 512, rounds=3),
    _batch(GPT2_3M, 8, 1024, rounds=3),
    # Together, because they run in processes of their own.
    *(_train(NANOGPT_CPU, 12, 64, p) for p in _FLOATS),
    _train(GPT2_3M, 8, 128),
    *(_train(GPT2_124M, 4, 256, p) for p in _FLOATS),
    _open(GPT2_3M),
    *(_forward(GPT2_124M, length, p) for length in (10, 64, 512, 1024) for p in _FLOATS),
    *(_prefill(GPT2_124M, length, p) for length in (10, 64, 512, 1024) for p in _FLOATS),
    *_sweep(GPT2_124M),
    # Batches that wait for their longest row would take ten minutes.
    _serve(GPT2_124M, 8, 64, rounds=3, without=(GENERATE,)),
    _batch(GPT2_124M, 8, 64, rounds=3),
    _start(GPT2_124M),
    _compile(GPT2_124M, is_cached=False),
    _compile(GPT2_124M, is_cached=True),
    _open(GPT2_124M),
    _load(GPT2_124M),
    _convert(GPT2_124M),
    *(_decode(shapes.GPT_OSS_TINY, batch) for batch in (1, 8)),
    # The large ones, model by model: what is on the disk for one is gone before the next.
    _convert(GPT2_XL),
    _load(GPT2_XL),
    _open(GPT2_XL),
    # Not everyone at once: each has the weights in its memory.
    *(
        _forward(GPT2_XL, length, p, rounds=3, without=(ONNX,))
        for length in (64, 512)
        for p in _FLOATS
    ),
    *(
        _decode(GPT2_XL, batch, p, new_tokens=32, rounds=3, without=(COMPILED, CTRANSLATE))
        for batch in (1, 8)
        for p in _PRECISIONS
    ),
    _convert(shapes.GPT_OSS_CUT),
    _convert(shapes.GPT_OSS_CUT, experts="bfloat16"),
    _convert(shapes.GPT_OSS_20B_8, experts="bfloat16"),
    _giant(shapes.GPT_OSS_20B),
    _convert(shapes.GPT_OSS_20B),
    _convert(shapes.GPT_OSS_20B, experts="bfloat16"),
)

# Starting and converting is no work of a GPU's, which has the time and the memory for everyone else.
GPU = tuple(dataclasses.replace(w, without=()) for w in FULL if w.kind not in OWN_PROCESS)

SUITES: dict[str, Sequence[Workload]] = {"ci": CI, "full": FULL, "gpu": GPU}
