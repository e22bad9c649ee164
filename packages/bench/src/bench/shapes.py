"""The sizes of the models that are measured, and what their Hugging Face checkpoints hold.

Standard library only, because the peers read this file in environments of their own.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

ITEM_BYTES = {"F32": 4, "BF16": 2, "U8": 1}
# A weight's and a number of the cache's bytes at each precision; beside int8 weights the cache is bfloat16.
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
CACHE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Names, in the order of the file, with safetensors' word for the type and the shape."""


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
    family: str = "gpt2"

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

    def hf_files(self) -> dict[str, Tensors]:
        """Returns what each safetensors file holds: one, as OpenAI published it, causal masks included."""
        width = self.n_embd
        tensors: Tensors = {
            "wte.weight": ("F32", (self.vocab_size, width)),
            "wpe.weight": ("F32", (self.n_positions, width)),
        }
        for i in range(self.n_layer):
            tensors[f"h.{i}.attn.bias"] = ("F32", (1, 1, self.n_positions, self.n_positions))
            for norm in ("ln_1", "ln_2"):
                tensors |= _pair(f"h.{i}.{norm}", (width,), (width,))
            for name, rows, columns in (
                ("attn.c_attn", width, 3 * width),
                ("attn.c_proj", width, width),
                ("mlp.c_fc", width, 4 * width),
                ("mlp.c_proj", 4 * width, width),
            ):
                tensors |= _pair(f"h.{i}.{name}", (rows, columns), (columns,))
        return {"model.safetensors": {**tensors, **_pair("ln_f", (width,), (width,))}}

    @property
    def probes(self) -> dict[str, str]:
        """A few of our names with Hugging Face's, of tensors that every conversion keeps as they are."""
        last = self.n_layer - 1
        return {
            "wte.embedding": "wte.weight",
            "wpe.embedding": "wpe.weight",
            f"blocks.{last}.mlp.down.kernel": f"h.{last}.mlp.c_proj.weight",
            "ln_f.scale": "ln_f.weight",
        }

    @property
    def matrix_elements(self) -> int:
        """Weights that every token is multiplied with: the blocks' matrices and the tied head."""
        return 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd

    @property
    def head_elements(self) -> int:
        return self.vocab_size * self.n_embd

    def weight_bytes(self, rows: int, precision: str) -> float:
        """Returns what a pass of so many rows reads of the weights."""
        return WEIGHT_BYTES[precision] * self.matrix_elements

    @property
    def row_elements(self) -> int:
        """Weights that one row is multiplied with."""
        return self.matrix_elements

    @property
    def attention_width(self) -> int:
        """Numbers of all layers that a query has, and that are multiplied with each position's key and value."""
        return self.n_layer * self.n_embd

    @property
    def cache_elements(self) -> int:
        """Numbers that the cache holds of one position."""
        return 2 * self.n_layer * self.n_embd


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssShape:
    """The sizes of a GPT-OSS with its experts in MXFP4; the defaults are what both published sizes have in common."""

    name: str
    n_layer: int
    n_experts: int
    vocab_size: int = 201088
    width: int = 2880
    n_head: int = 64
    n_kv_head: int = 8
    head_dim: int = 64
    n_positions: int = 131072
    experts_per_token: int = 4
    family: str = "gpt_oss"

    def hf_config(self) -> dict[str, Any]:
        """Returns the config.json as published, without special tokens."""
        return {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "experts_per_token": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": self.width,
            "layer_types": (["sliding_attention", "full_attention"] * self.n_layer)[: self.n_layer],
            "max_position_embeddings": self.n_positions,
            "num_attention_heads": self.n_head,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.n_layer,
            "num_key_value_heads": self.n_kv_head,
            "num_local_experts": self.n_experts,
            "output_router_logits": False,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    def hf_files(self) -> dict[str, Tensors]:
        """Returns what each of the three files holds; they count from 0 as the published ones do, embeddings last."""
        table = ("BF16", (self.vocab_size, self.width))
        cut = (self.n_layer + 1) // 2
        contents: list[Tensors] = [
            _joined(self._block(i) for i in range(cut)),
            _joined(self._block(i) for i in range(cut, self.n_layer)),
            {
                "model.embed_tokens.weight": table,
                "model.norm.weight": ("BF16", (self.width,)),
                "lm_head.weight": table,
            },
        ]
        return {f"model-{i:05d}-of-00002.safetensors": held for i, held in enumerate(contents)}

    def _block(self, i: int) -> Tensors:
        width, experts, at = self.width, self.n_experts, f"model.layers.{i}"
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        tensors: Tensors = {
            f"{at}.input_layernorm.weight": ("BF16", (width,)),
            f"{at}.post_attention_layernorm.weight": ("BF16", (width,)),
            f"{at}.self_attn.sinks": ("BF16", (self.n_head,)),
            f"{at}.mlp.experts.gate_up_proj_bias": ("BF16", (experts, 2 * width)),
            f"{at}.mlp.experts.down_proj_bias": ("BF16", (experts, width)),
        }
        for name, rows, columns in (
            ("self_attn.q_proj", q, width),
            ("self_attn.k_proj", kv, width),
            ("self_attn.v_proj", kv, width),
            ("self_attn.o_proj", width, q),
            ("mlp.router", experts, width),
        ):
            tensors |= _pair(f"{at}.{name}", (rows, columns), (rows,), "BF16")
        for name, rows in (("gate_up_proj", 2 * width), ("down_proj", width)):
            packed = f"{at}.mlp.experts.{name}"
            tensors[f"{packed}_blocks"] = ("U8", (experts, rows, width // 32, 16))
            tensors[f"{packed}_scales"] = ("U8", (experts, rows, width // 32))
        return tensors

    @property
    def probes(self) -> dict[str, str]:
        """A few of our names with Hugging Face's, of tensors that every conversion keeps as they are."""
        last = self.n_layer - 1
        return {
            "wte.embedding": "model.embed_tokens.weight",
            "lm_head.kernel": "lm_head.weight",
            "norm_f.scale": "model.norm.weight",
            f"blocks.{last}.moe.gate_up.bias": f"model.layers.{last}.mlp.experts.gate_up_proj_bias",
        }

    @property
    def unpacking_bytes(self) -> int:
        """What the experts' kernels take more in bfloat16 than in MXFP4: 32 numbers in 64 bytes, or in 17."""
        return 3 * self.n_layer * self.n_experts * self.width**2 // 32 * (64 - 17)

    @property
    def _shared_elements(self) -> int:
        """Weights of the blocks that every row is multiplied with: attention and the router."""
        heads = 2 * (self.n_head + self.n_kv_head) * self.head_dim
        return self.n_layer * self.width * (heads + self.n_experts)

    @property
    def head_elements(self) -> int:
        return self.vocab_size * self.width

    @property
    def row_elements(self) -> int:
        """Weights that one row is multiplied with."""
        experts = 3 * self.n_layer * self.experts_per_token * self.width**2
        return self._shared_elements + experts + self.head_elements

    def weight_bytes(self, rows: int, precision: str) -> float:
        """Returns what a pass of so many rows reads of the weights: experts are MXFP4, the rest is bfloat16."""
        chosen = min(self.n_experts, self.experts_per_token * rows)
        experts = 3 * self.n_layer * chosen * self.width**2
        return 2 * (self._shared_elements + self.head_elements) + 17 / 32 * experts

    @property
    def attention_width(self) -> int:
        """Numbers of all layers that a query has, and that are multiplied with each position's key and value."""
        return self.n_layer * self.n_head * self.head_dim

    @property
    def cache_elements(self) -> int:
        """Numbers that the cache holds of one position."""
        return 2 * self.n_layer * self.n_kv_head * self.head_dim


AnyShape = Shape | GptOssShape


def nbytes(shape: AnyShape) -> int:
    """Returns the size of a checkpoint's tensors."""
    return sum(
        ITEM_BYTES[dtype] * math.prod(sizes)
        for tensors in shape.hf_files().values()
        for dtype, sizes in tensors.values()
    )


def slug(shape: AnyShape) -> str:
    """Returns a name for a folder with this shape's weights: no other shape's, even if that is called the same."""
    return f"{shape.name}-{zlib.crc32(repr(shape).encode()):08x}"


def from_dict(values: Mapping[str, Any]) -> AnyShape:
    return {"gpt2": Shape, "gpt_oss": GptOssShape}[values["family"]](**values)


def _pair(name: str, weight: tuple[int, ...], bias: tuple[int, ...], dtype: str = "F32") -> Tensors:
    return {f"{name}.weight": (dtype, weight), f"{name}.bias": (dtype, bias)}


def _joined(parts: Any) -> Tensors:
    return {name: held for part in parts for name, held in part.items()}


GPT2_124M = Shape(
    name="124M", n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257
)
GPT2_XL = Shape(name="XL", n_layer=48, n_head=25, n_embd=1600, n_positions=1024, vocab_size=50257)
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

GPT_OSS_20B = GptOssShape(name="20B", n_layer=24, n_experts=32)
GPT_OSS_20B_8 = GptOssShape(name="20B-8layers", n_layer=8, n_experts=32)
# The same blocks, so small that what is around the products weighs as much as they do.
GPT_OSS_TINY = GptOssShape(
    name="gpt-oss-tiny",
    n_layer=4,
    n_experts=8,
    vocab_size=4096,
    width=256,
    n_head=8,
    n_kv_head=2,
    head_dim=32,
    n_positions=4096,
)
# What of the 20B fits into a short run: two of its layers, a quarter of the experts, a twentieth of the vocabulary.
GPT_OSS_CUT = GptOssShape(name="20B-cut", n_layer=2, n_experts=8, vocab_size=10240)
