"""GPT-2 as transformers' Flax classes stored it, up to their removal in version 5 (modeling_flax_gpt2.py).

FlaxConv1D keeps its kernels [out, in], as torch's Linear does, and transposes them when it computes; so these are the
rows of tables/gpt2.py turned around. FlaxGPT2Model leaves "transformer." away. An untied head is nn.Dense: [in, out].
"""

from collections.abc import Collection, Mapping
from typing import Any

from convert.mapping import Rule, Table

TABLE = Table(
    rules=(
        Rule("transformer.wte.embedding", "wte.embedding", "VD -> VD"),
        Rule("transformer.wpe.embedding", "wpe.embedding", "PD -> PD"),
        Rule("transformer.h.{L}.ln_1.scale", "blocks.{L}.ln_1.scale", "D -> D"),
        Rule("transformer.h.{L}.ln_1.bias", "blocks.{L}.ln_1.bias", "D -> D"),
        Rule(
            "transformer.h.{L}.attn.c_attn.kernel", "blocks.{L}.attn.qkv.kernel", "(3NH)D -> D3NH"
        ),
        Rule("transformer.h.{L}.attn.c_attn.bias", "blocks.{L}.attn.qkv.bias", "(3NH) -> 3NH"),
        Rule("transformer.h.{L}.attn.c_proj.kernel", "blocks.{L}.attn.out.kernel", "D(NH) -> NHD"),
        Rule("transformer.h.{L}.attn.c_proj.bias", "blocks.{L}.attn.out.bias", "D -> D"),
        Rule("transformer.h.{L}.ln_2.scale", "blocks.{L}.ln_2.scale", "D -> D"),
        Rule("transformer.h.{L}.ln_2.bias", "blocks.{L}.ln_2.bias", "D -> D"),
        Rule("transformer.h.{L}.mlp.c_fc.kernel", "blocks.{L}.mlp.up.kernel", "FD -> DF"),
        Rule("transformer.h.{L}.mlp.c_fc.bias", "blocks.{L}.mlp.up.bias", "F -> F"),
        Rule("transformer.h.{L}.mlp.c_proj.kernel", "blocks.{L}.mlp.down.kernel", "DF -> FD"),
        Rule("transformer.h.{L}.mlp.c_proj.bias", "blocks.{L}.mlp.down.bias", "D -> D"),
        Rule("transformer.ln_f.scale", "ln_f.scale", "D -> D"),
        Rule("transformer.ln_f.bias", "ln_f.bias", "D -> D"),
        Rule("lm_head.kernel", "lm_head.kernel", "DV -> VD"),
    ),
    may_lack=("transformer.",),
)


def recognizes(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Tells whether a GPT-2's tensors are named as Flax names them: Hugging Face's config says the same for both."""
    return config.get("model_type") == "gpt2" and any(
        name in names for name in ("transformer.wte.embedding", "wte.embedding")
    )
