"""What is measured: every workload by name, with what it counts and what it must cost at the least.

Standard library only, because the peers read this file in environments of their own.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Kind = Literal["forward", "prefill", "decode", "train", "open"]

# Weights below this size live in the last-level cache, where the bandwidth of the memory is no limit.
CACHED_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a GPT-2. `activation` is Hugging Face's name for it."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    activation: str = "gelu_new"

    def hf_config(self) -> dict[str, Any]:
        """Returns the config.json of this model, without dropout and without special tokens."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "n_positions": self.n_positions,
            "vocab_size": self.vocab_size,
            "activation_function": self.activation,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @property
    def matrix_elements(self) -> int:
        """Weights that every token is multiplied with: the blocks' matrices and the tied head."""
        return 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd


GPT2_124M = Shape(
    name="124M", n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257
)
GPT2_3M = Shape(name="3.4M", n_layer=4, n_head=4, n_embd=256, n_positions=512, vocab_size=512)
# The model of nanoGPT's recipe for a CPU (train_shakespeare_char on a laptop), with biases, as Hugging Face has them.
NANOGPT_CPU = Shape(
    name="0.8M",
    n_layer=4,
    n_head=4,
    n_embd=128,
    n_positions=64,
    vocab_size=65,
    activation="gelu",
)


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
    checkpoint on disk (in the page cache) to the first logits, with code that is compiled already.
    """

    name: str
    kind: Kind
    shape: Shape
    batch: int = 1
    length: int = 1
    new_tokens: int = 0
    rounds: int = 7

    @property
    def unit(self) -> str:
        return "tokens/s" if self.kind == "decode" else "ms"

    @property
    def higher_is_better(self) -> bool:
        return self.kind == "decode"

    def figure(self, seconds: float) -> float:
        """Converts the duration of one call to this workload's unit."""
        return self.batch * self.new_tokens / seconds if self.kind == "decode" else 1e3 * seconds

    @property
    def counts(self) -> str:
        """Says in words what is timed."""
        tokens = f"{self.batch} x {self.length} tokens"
        return {
            "forward": f"logits of all positions, {tokens}",
            "prefill": f"time to the first token, {tokens}",
            "decode": f"greedy generation, batch {self.batch}, prompt {self.length}, {self.new_tokens} new tokens",
            "train": f"loss, gradients, clipping and AdamW, {tokens}",
            "open": f"from the checkpoint on disk, cached by the system, to the first logits, {tokens}",
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
            case "open":
                return ()

    def _pass(self, length: int, *, heads: int) -> Phase:
        shape = self.shape
        blocks = shape.matrix_elements - shape.vocab_size * shape.n_embd
        products = 2 * (length * blocks + heads * shape.vocab_size * shape.n_embd)
        # Two products (scores, values) of 2 D operations for each of the T (T + 1) / 2 pairs a causal mask leaves.
        attention = 2 * shape.n_layer * shape.n_embd * length * (length + 1)
        return Phase(1, self.batch * (products + attention), 4 * shape.matrix_elements)

    def _step(self, context: int, *, times: int) -> Phase:
        shape = self.shape
        flops = 2 * shape.matrix_elements + 4 * shape.n_layer * shape.n_embd * context
        cache = 2 * shape.n_layer * shape.n_embd * context
        return Phase(times, self.batch * flops, 4 * (shape.matrix_elements + self.batch * cache))

    def floor_s(self, *, flops_per_s: float, bytes_per_s: float) -> float | None:
        """Seconds below which this machine cannot finish one call; None where no such limit was measured."""
        if self.kind == "decode" and 4 * self.shape.matrix_elements <= CACHED_BYTES:
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
        return cls(**{**values, "shape": Shape(**values["shape"])})


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
)

SUITES: dict[str, Sequence[Workload]] = {"ci": CI, "full": FULL, "gpu": FULL}
