"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), as the paper tells it.

A pre-norm transformer decoder with learned absolute positions. The modules declare parameters under the names of the
model folder and call pure functions; they hold no state. Everything that varies in the family is in `GPT2Config`.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from core.attention import attend_next
from core.config import GPT2Config
from core.kv_cache import KVCache
from core.layers import ACTIVATIONS, dropout, layer_norm, unembed
from core.models.modules import (
    PLAIN,
    Compute,
    Linear,
    Table,
    last,
    looked_up,
    remat,
    residual,
    rows,
    scanned,
    stream,
)


class GPT2(nn.Module):
    """Tokens in, logits out; with a cache, the next tokens of sequences whose beginnings are in it."""

    config: GPT2Config
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    compute: Compute = PLAIN

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
        only_last: bool = False,
        only_hidden: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        normal = nn.initializers.normal(config.initializer_range)
        wte_VD = Table("embedding", (config.vocab_size, config.n_embd), normal, name="wte")()
        wpe_PD = Table("embedding", (config.n_positions, config.n_embd), normal, name="wpe")()
        embed_key, blocks_key = _split(dropout_key, 2)

        x_BTD = rows(looked_up(wte_VD, cache), tokens_BT).astype(self.dtype)
        x_BTD = x_BTD + rows(looked_up(wpe_PD, cache), positions_BT).astype(self.dtype)
        x_BTD = dropout(x_BTD, config.embd_pdrop, embed_key)
        x_BTD = stream(x_BTD, cache)
        x_BTD, cache = Blocks(config, self.compute, name="blocks")(
            x_BTD, positions_BT, cache, lengths_B, blocks_key
        )
        if only_last:
            x_BTD = last(x_BTD, lengths_B)
        x_BTD = LayerNorm(config, name="ln_f")(x_BTD)
        head_VD = (
            wte_VD
            if config.tie_word_embeddings
            else Table("kernel", (config.vocab_size, config.n_embd), normal, name="lm_head")()
        )
        return x_BTD if only_hidden else unembed(x_BTD, head_VD), cache


class Blocks(nn.Module):
    """The residual stream through every block, "0" to "L-1"."""

    config: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, positions_BT, cache, lengths_B, dropout_key):
        config, attention = self.config, self.compute.attention
        keys = _split(dropout_key, config.n_layer)
        if self.compute.scan_layers and cache is None and not self.is_initializing():
            by_layer = config.scale_attn_by_inverse_layer_idx
            x_BTD, _ = scanned(
                lambda layer: Block(config, layer, attention, parent=None),
                [layer if by_layer else 0 for layer in range(config.n_layer)],
                self.variables["params"],
                x_BTD,
                keys,
                positions_BT,
                None,
                lengths_B,
                compute=self.compute,
            )
            return x_BTD, None
        block_of = remat(Block, self.compute)
        pasts = []
        for layer, key in enumerate(keys):
            past = None if cache is None else cache.layer(layer)
            block = block_of(config, layer, attention, name=str(layer))
            x_BTD, past = block(x_BTD, positions_BT, past, lengths_B, key)
            pasts.append(past)
        return x_BTD, None if cache is None else KVCache.of(pasts)


class Block(nn.Module):
    config: GPT2Config
    layer: int
    attention: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, past, lengths_B, dropout_key):
        config = self.config
        attn_key, resid_key, mlp_key = _split(dropout_key, 3)
        y_BTD, past_of_next = Attention(config, self.layer, self.attention, name="attn")(
            LayerNorm(config, name="ln_1")(x_BTD), positions_BT, past, lengths_B, attn_key
        )
        x_BTD = stream(x_BTD + dropout(residual(y_BTD), config.resid_pdrop, resid_key), past)
        y_BTD = residual(MLP(config, name="mlp")(LayerNorm(config, name="ln_2")(x_BTD)))
        x_BTD = x_BTD + dropout(y_BTD, config.resid_pdrop, mlp_key)
        return stream(x_BTD, past), past_of_next


class Attention(nn.Module):
    """Multi-head causal attention; q, k and v come from one product."""

    config: GPT2Config
    layer: int
    implementation: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, past, lengths_B, dropout_key):
        config = self.config
        D, N, H = config.n_embd, config.n_head, config.head_dim
        qkv_BT3NH = _linear(config, "qkv", (D,), (3, N, H))(x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (qkv_BT3NH[:, :, i] for i in range(3))

        scale = H**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= self.layer + 1
        out_BTNH, past = attend_next(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            past,
            positions_BT=positions_BT,
            scale=scale,
            lengths_B=lengths_B,
            dropout_rate=config.attn_pdrop,
            dropout_key=dropout_key,
            implementation=self.implementation,
        )
        y_BTD = _linear(config, "out", (N, H), (D,), residual=True)(out_BTNH)
        return y_BTD, past


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.config.n_embd, self.config.d_ff
        h_BTF = _linear(self.config, "up", (D,), (F,))(x_BTD)
        h_BTF = ACTIVATIONS[self.config.activation_function](h_BTF)
        return _linear(self.config, "down", (F,), (D,), residual=True)(h_BTF)


def _linear(
    config: GPT2Config,
    name: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    residual: bool = False,
) -> Linear:
    """An affine map as GPT-2 starts it.

    Those that write to the residual stream start smaller by sqrt(2 L) (the paper, section 2.3): the stream sums 2 L.
    """
    std = config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1)
    int8 = config.quantization == "int8"
    return Linear(inputs, outputs, std, config.use_bias, int8, name=name)


class LayerNorm(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x_BTD):
        D = (self.config.n_embd,)
        scale_D = self.param("scale", nn.initializers.ones, D)
        bias_D = self.param("bias", nn.initializers.zeros, D) if self.config.use_bias else None
        return layer_norm(x_BTD, scale_D, bias_D, self.config.layer_norm_epsilon)


def _split(key: jax.Array | None, count: int):
    return [None] * count if key is None else jax.random.split(key, count)
