"""What is measured: every workload by name, with what it counts and what it must cost at the least.

Standard library only, because the peers read this file in environments of their own.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bench import shapes
from bench.shapes import GPT2_3M, GPT2_124M, GPT2_XL, NANOGPT_CPU, AnyShape, Shape

Kind = Literal["forward", "prefill", "decode", "train", "open", "load", "convert"]

# Weights below this size live in the last-level cache, where the bandwidth of the memory is no limit.
CACHED_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Phase:
    """Work of `flops` floating-point operations that reads `bytes` of weights and cache, done `times` times over."""

    times: int
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One thing to be timed: `batch` sequences of `length` tokens, and `new_tokens` more of each in decoding.

    forward: logits of every position, without a cache. prefill: the time to the first token. decode: a whole call of
    the generation loop, prompt included, greedy. train: loss, gradients, clipping and an AdamW step. open: from a
    checkpoint on disk (in the page cache) to the first logits, with code that is compiled already. load: opening
    alone, in a process of its own. convert: from a Hugging Face checkpoint to files that one can open, in a process of
    its own, with the `experts` of a GPT-OSS as they are ("keep") or unpacked ("bfloat16").
    """

    name: str
    kind: Kind
    shape: AnyShape
    batch: int = 1
    length: int = 1
    new_tokens: int = 0
    experts: str = "keep"
    rounds: int = 7

    @property
    def gpt2(self) -> Shape:
        """The shape of a workload that computes."""
        assert isinstance(self.shape, Shape)
        return self.shape

    @property
    def unit(self) -> str:
        return {"decode": "tokens/s", "convert": "GB/s"}.get(self.kind, "ms")

    @property
    def higher_is_better(self) -> bool:
        return self.unit != "ms"

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

    def figure(self, seconds: float) -> float:
        """Converts the duration of one call to this workload's unit; gigabytes are those of the checkpoint read."""
        if self.kind == "convert":
            return self.source_bytes / 1e9 / seconds
        return self.batch * self.new_tokens / seconds if self.kind == "decode" else 1e3 * seconds

    @property
    def counts(self) -> str:
        """Says in words what is timed."""
        tokens, size = f"{self.batch} x {self.length} tokens", f"{self.source_bytes / 1e9:.2f} GB"
        return {
            "forward": f"logits of all positions, {tokens}",
            "prefill": f"time to the first token, {tokens}",
            "decode": f"greedy generation, batch {self.batch}, prompt {self.length}, {self.new_tokens} new tokens",
            "train": f"loss, gradients, clipping and AdamW, {tokens}",
            "open": f"from the checkpoint on disk, cached by the system, to the first logits, {tokens}",
            "load": f"opening {size} cached by the system, in a process of its own",
            "convert": f"a checkpoint of {size} in Hugging Face's format, cached by the system, to another on the disk"
            + (", experts unpacked to bfloat16" if self.experts == "bfloat16" else ""),
        }[self.kind]

    def phases(self) -> tuple[Phase, ...]:
        """The least that any implementation in float32 has to do: causal attention, each weight read once a pass."""
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
                middle = self.length + self.new_tokens // 2
                return (prompt, self._step(middle, times=self.new_tokens - 1))
            case "open" | "load" | "convert":
                return ()

    def _pass(self, length: int, *, heads: int) -> Phase:
        shape = self.gpt2
        blocks = shape.matrix_elements - shape.vocab_size * shape.n_embd
        products = 2 * (length * blocks + heads * shape.vocab_size * shape.n_embd)
        # Two products (scores, values) of 2 D operations for each of the T (T + 1) / 2 pairs a causal mask leaves.
        attention = 2 * shape.n_layer * shape.n_embd * length * (length + 1)
        return Phase(1, self.batch * (products + attention), 4 * shape.matrix_elements)

    def _step(self, context: int, *, times: int) -> Phase:
        shape = self.gpt2
        flops = 2 * shape.matrix_elements + 4 * shape.n_layer * shape.n_embd * context
        cache = 2 * shape.n_layer * shape.n_embd * context
        return Phase(times, self.batch * flops, 4 * (shape.matrix_elements + self.batch * cache))

    def floor_s(self, *, flops_per_s: float, bytes_per_s: float) -> float | None:
        """Seconds below which this machine cannot finish one call; None where no such limit was measured."""
        if self.kind == "decode" and 4 * self.gpt2.matrix_elements <= CACHED_BYTES:
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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Workload":
        return cls(**{**values, "shape": shapes.from_dict(values["shape"])})


def _forward(shape: Shape, length: int) -> Workload:
    return Workload(
        name=f"forward-{shape.name}-t{length}", kind="forward", shape=shape, length=length
    )


def _prefill(shape: Shape, length: int) -> Workload:
    return Workload(
        name=f"prefill-{shape.name}-t{length}",
        kind="prefill",
        shape=shape,
        length=length,
        new_tokens=1,
    )


def _decode(shape: Shape, batch: int, *, new_tokens: int = 32) -> Workload:
    return Workload(
        name=f"decode-{shape.name}-b{batch}-n{new_tokens}",
        kind="decode",
        shape=shape,
        batch=batch,
        length=64,
        new_tokens=new_tokens,
    )


def _train(shape: Shape, batch: int, length: int, *, rounds: int = 7) -> Workload:
    return Workload(
        name=f"train-{shape.name}-{batch}x{length}",
        kind="train",
        shape=shape,
        batch=batch,
        length=length,
        rounds=rounds,
    )


def _open(shape: Shape) -> Workload:
    return Workload(name=f"open-{shape.name}", kind="open", shape=shape, length=10)


def _load(shape: Shape) -> Workload:
    return Workload(name=f"load-{shape.name}", kind="load", shape=shape, rounds=3)


def _convert(shape: AnyShape, *, experts: str = "keep") -> Workload:
    suffix = f"-{experts}" if experts != "keep" else ""
    name = f"convert-{shape.name}{suffix}"
    return Workload(name=name, kind="convert", shape=shape, experts=experts, rounds=3)


# Under six minutes on two cores, so that every change can afford it.
CI = (
    _forward(GPT2_3M, 10),
    _forward(GPT2_3M, 128),
    _forward(GPT2_124M, 64),
    _prefill(GPT2_124M, 64),
    _prefill(GPT2_124M, 512),
    _decode(GPT2_3M, 8),
    _decode(GPT2_124M, 1),
    _decode(GPT2_124M, 8),
    _train(NANOGPT_CPU, 12, 64),
    _train(GPT2_3M, 8, 128),
    _open(GPT2_124M),
    _load(GPT2_124M),
    _convert(GPT2_124M),
    _convert(shapes.GPT_OSS_CUT),
)

FULL = (
    _forward(GPT2_3M, 10),
    _forward(GPT2_3M, 128),
    _forward(GPT2_124M, 10),
    _forward(GPT2_124M, 64),
    _forward(GPT2_124M, 512),
    _prefill(GPT2_124M, 64),
    _prefill(GPT2_124M, 512),
    _decode(GPT2_3M, 1, new_tokens=128),
    _decode(GPT2_3M, 8, new_tokens=128),
    _decode(GPT2_124M, 1, new_tokens=128),
    _decode(GPT2_124M, 8, new_tokens=128),
    _train(NANOGPT_CPU, 12, 64),
    _train(GPT2_3M, 8, 128),
    _train(GPT2_124M, 4, 256, rounds=5),
    _open(GPT2_3M),
    _open(GPT2_124M),
    _load(GPT2_124M),
    _convert(GPT2_124M),
    # The large ones, model by model: what is on the disk for one is gone before the next.
    _convert(GPT2_XL),
    _load(GPT2_XL),
    _open(GPT2_XL),
    _convert(shapes.GPT_OSS_CUT),
    _convert(shapes.GPT_OSS_CUT, experts="bfloat16"),
    _convert(shapes.GPT_OSS_20B_8, experts="bfloat16"),
    _convert(shapes.GPT_OSS_20B),
    _convert(shapes.GPT_OSS_20B, experts="bfloat16"),
)

# Converting is no work of a GPU's.
GPU = tuple(w for w in FULL if w.kind not in ("load", "convert"))

SUITES: dict[str, Sequence[Workload]] = {"ci": CI, "full": FULL, "gpu": GPU}
