"""GPT-2 as Hugging Face stores it.

Its Conv1D keeps weights [in, out], which is a Flax kernel, so nothing is ever transposed; the rows only say which axes
the file stores as one. OpenAI's own repositories leave the "transformer." prefix away.
"""

from convert.mapping import Drop, Rule, Table, Tie

HF = Table(
    rules=(
        Rule("transformer.wte.weight", "wte.embedding", "VD -> VD"),
        Rule("transformer.wpe.weight", "wpe.embedding", "PD -> PD"),
        Rule("transformer.h.{L}.ln_1.weight", "blocks.{L}.ln_1.scale", "D -> D"),
        Rule("transformer.h.{L}.ln_1.bias", "blocks.{L}.ln_1.bias", "D -> D"),
        Rule(
            "transformer.h.{L}.attn.c_attn.weight", "blocks.{L}.attn.qkv.kernel", "D(3NH) -> D3NH"
        ),
        Rule("transformer.h.{L}.attn.c_attn.bias", "blocks.{L}.attn.qkv.bias", "(3NH) -> 3NH"),
        Rule("transformer.h.{L}.attn.c_proj.weight", "blocks.{L}.attn.out.kernel", "(NH)D -> NHD"),
        Rule("transformer.h.{L}.attn.c_proj.bias", "blocks.{L}.attn.out.bias", "D -> D"),
        Rule("transformer.h.{L}.ln_2.weight", "blocks.{L}.ln_2.scale", "D -> D"),
        Rule("transformer.h.{L}.ln_2.bias", "blocks.{L}.ln_2.bias", "D -> D"),
        Rule("transformer.h.{L}.mlp.c_fc.weight", "blocks.{L}.mlp.up.kernel", "DF -> DF"),
        Rule("transformer.h.{L}.mlp.c_fc.bias", "blocks.{L}.mlp.up.bias", "F -> F"),
        Rule("transformer.h.{L}.mlp.c_proj.weight", "blocks.{L}.mlp.down.kernel", "FD -> FD"),
        Rule("transformer.h.{L}.mlp.c_proj.bias", "blocks.{L}.mlp.down.bias", "D -> D"),
        Rule("transformer.ln_f.weight", "ln_f.scale", "D -> D"),
        Rule("transformer.ln_f.bias", "ln_f.bias", "D -> D"),
        Rule("lm_head.weight", "lm_head.kernel", "VD -> VD"),
    ),
    drops=(
        Drop("transformer.h.{L}.attn.bias", why="causal mask buffer, not a weight"),
        Drop("transformer.h.{L}.attn.masked_bias", why="mask value buffer, not a weight"),
    ),
    tie=Tie("lm_head.weight", to="transformer.wte.weight"),
    may_lack=("transformer.",),
    may_carry=("module.",),
)
