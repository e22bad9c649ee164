"""GPT-2 and its variants (Radford et al. 2019; nanoGPT, Mistral's and Cerebras' differ in a flag each)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from core.config import base
from core.config.base import Config
from core.errors import ConfigError

ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "quick_gelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """The GPT-2 family and its published variants; names and defaults are Hugging Face's.

    `use_bias=False` leaves the biases out of every linear layer and layer norm (nanoGPT's `bias=False`).
    `scale_attn_by_inverse_layer_idx` divides layer i's scores by i + 1 (Mistral's GPT-2s).
    `reorder_and_upcast_attn` asks for scores and softmax in float32, which `core` does always: it is kept for export.
    `quantization="int8"` stores the kernels of the blocks in int8 with a scale for each output channel.
    """

    family: ClassVar[str] = "gpt2"

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    use_bias: bool = True
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    quantization: str | None = None

    def _contradictions(self) -> Iterator[str]:
        sizes = list(base.positive(self, _SIZES))
        if sizes:
            yield from sizes
            return
        if self.n_inner is not None and self.n_inner < 1:
            yield f"n_inner={self.n_inner} must be at least 1, or null for 4 * n_embd"
        if self.d_ff > 4 * base.MAX_SIZE:
            yield f"n_inner={self.n_inner} is more than {4 * base.MAX_SIZE:,}"
        if self.n_embd % self.n_head:
            yield f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads"
        if self.activation_function not in ACTIVATIONS:
            yield (
                f"activation_function={self.activation_function!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        if self.layer_norm_epsilon <= 0:
            yield f"layer_norm_epsilon={self.layer_norm_epsilon} must be positive"
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} is not a probability below 1"
        yield from base.foreign_tokens(self)
        if self.quantization not in (None, "int8"):
            yield f"quantization={self.quantization!r} is not implemented; int8 is"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_ff(self) -> int:
        """The width of the hidden layer of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def context_length(self) -> int:
        return self.n_positions

    @property
    def axes(self) -> dict[str, int]:
        return {
            "V": self.vocab_size,
            "P": self.n_positions,
            "L": self.n_layer,
            "D": self.n_embd,
            "N": self.n_head,
            "H": self.head_dim,
            "F": self.d_ff,
        }

    @property
    def dense(self) -> "GPT2Config":
        """The same model with its kernels in floating point."""
        return dataclasses.replace(self, quantization=None)

    def tensors(self) -> dict[str, str]:
        """Every parameter's name and axes; the values of an int8 kernel have its output axes first.

        >>> GPT2Config(n_layer=1).tensors()["blocks.0.attn.qkv.kernel"]
        'D3NH'
        >>> GPT2Config(n_layer=1, quantization="int8").tensors()["blocks.0.attn.qkv.kernel.values"]
        '3NHD'
        """
        block = {
            "ln_1.scale": "D",
            "ln_1.bias": "D",
            "attn.qkv.kernel": "D3NH",
            "attn.qkv.bias": "3NH",
            "attn.out.kernel": "NHD",
            "attn.out.bias": "D",
            "ln_2.scale": "D",
            "ln_2.bias": "D",
            "mlp.up.kernel": "DF",
            "mlp.up.bias": "F",
            "mlp.down.kernel": "FD",
            "mlp.down.bias": "D",
        }
        if self.quantization == "int8":
            block = _in_int8(block)
        tensors = {"wte.embedding": "VD", "wpe.embedding": "PD"}
        for layer in range(self.n_layer):
            tensors |= {f"blocks.{layer}.{name}": axes for name, axes in block.items()}
        tensors |= {"ln_f.scale": "D", "ln_f.bias": "D"}
        if not self.tie_word_embeddings:
            tensors["lm_head.kernel"] = "VD"
        if not self.use_bias:
            tensors = {name: axes for name, axes in tensors.items() if not name.endswith(".bias")}
        return tensors

    @property
    def parameter_count(self) -> int:
        """How many numbers the model holds, however they are stored; a scale is no parameter."""
        return self.count(self.dense.tensors().values())

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads a Hugging Face config.json of model type "gpt2"; see `Config.from_hf`."""
        if config.get("model_type") != "gpt2":
            raise ConfigError(
                f"config.json has model_type {config.get('model_type')!r}; 'gpt2' is what can be read"
            )
        known = {field.name for field in dataclasses.fields(cls)} - _OURS
        wrong: list[str] = []
        settings = base.hf_settings(config, known, aliases=_ALIASES, unsupported={}, wrong=wrong)
        if wrong:
            raise ConfigError("config.json cannot be converted: " + "; ".join(wrong))
        settings = base.without_foreign_tokens(settings, cls.vocab_size)
        return cls(**base.from_json(cls, settings))

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json with which transformers opens this model."""
        settings = {k: v for k, v in base.to_json(self).items() if k not in _OURS}
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | settings


_OURS = {"use_bias", "quantization"}  # fields that no config.json has
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _in_int8(block: dict[str, str]) -> dict[str, str]:
    """Returns the tensors of a block with each kernel as its values and its scales, one for each output."""
    stored: dict[str, str] = {}
    for name, axes in block.items():
        if name.endswith(".kernel"):
            outputs = block[name.removesuffix("kernel") + "bias"]
            inputs = axes.removesuffix(outputs)
            stored |= {f"{name}.values": outputs + inputs, f"{name}.scales": outputs}
        else:
            stored[name] = axes
    return stored


def _published(n_layer: int, n_head: int, n_embd: int) -> GPT2Config:
    return GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, bos_token_id=50256, eos_token_id=50256
    )


PRESETS: dict[str, GPT2Config] = {
    "gpt2": _published(12, 12, 768),
    "gpt2-medium": _published(24, 16, 1024),
    "gpt2-large": _published(36, 20, 1280),
    "gpt2-xl": _published(48, 25, 1600),
    "distilgpt2": _published(6, 12, 768),
}
"""The sizes that are known by name."""
