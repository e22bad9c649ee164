"""GPT-OSS (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925), as its code tells it.

A pre-norm transformer decoder with rotary positions, grouped queries, attention sinks, a sliding window in every other
layer, and a mixture of experts in place of the MLP. Experts may be packed (`config.quantization`), and are then never
unpacked but one at a time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core import moe, rotary
from core.attention import attend_next
from core.config import GptOssConfig
from core.kv_cache import KVCache
from core.layers import rms_norm, unembed
from core.models.modules import (
    PLAIN,
    SOWN,
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
from core.quant import MXFP4


class GptOss(nn.Module):
    """Tokens in, logits out; with a cache, the next tokens of sequences whose beginnings are in it."""

    config: GptOssConfig
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
        size = (config.vocab_size, config.hidden_size)
        wte_VD = Table("embedding", size, normal, name="wte")()
        x_BTD = rows(looked_up(wte_VD, cache), tokens_BT).astype(self.dtype)
        x_BTD = stream(x_BTD, cache)
        x_BTD, cache = Blocks(config, self.compute, name="blocks")(
            x_BTD, positions_BT, cache, lengths_B, dropout_key
        )
        if only_last:
            x_BTD = last(x_BTD, lengths_B)
        x_BTD = RMSNorm(config, name="norm_f")(x_BTD)
        tied = config.tie_word_embeddings
        head_VD = wte_VD if tied else Table("kernel", size, normal, name="lm_head")()
        return x_BTD if only_hidden else unembed(x_BTD, head_VD), cache


class Blocks(nn.Module):
    """The residual stream through every block, "0" to "L-1"; the angles of the positions are the same in all."""

    config: GptOssConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, positions_BT, cache, lengths_B, dropout_key):
        config, attention = self.config, self.compute.attention
        turns = rotary.tables(config, positions_BT)
        L = config.num_hidden_layers
        keys = [None] * L if dropout_key is None else jax.random.split(dropout_key, L)
        if self.compute.scan_layers and cache is None and not self.is_initializing():
            x_BTD, sown = scanned(
                lambda window: Block(config, window, attention, parent=None),
                config.windows,
                self.variables["params"],
                x_BTD,
                keys,
                positions_BT,
                turns,
                None,
                lengths_B,
                compute=self.compute,
            )
            for layer, found in enumerate(sown):
                self.put_variable(SOWN, str(layer), found)
            return x_BTD, None
        block_of = remat(Block, self.compute)
        pasts = []
        for layer, (window, key) in enumerate(zip(config.windows, keys, strict=True)):
            past = None if cache is None else cache.layer(layer)
            block = block_of(config, window, attention, name=str(layer))
            x_BTD, past = block(x_BTD, positions_BT, turns, past, lengths_B, key)
            pasts.append(past)
        return x_BTD, None if cache is None else KVCache.of(pasts)


class Block(nn.Module):
    config: GptOssConfig
    window: int | None
    attention: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, turns, past, lengths_B, dropout_key):
        attention = Attention(self.config, self.window, self.attention, name="attn")
        y_BTD = RMSNorm(self.config, name="norm_1")(x_BTD)
        y_BTD, cached = attention(y_BTD, positions_BT, turns, past, lengths_B, dropout_key)
        x_BTD = stream(x_BTD + residual(y_BTD), past)
        y_BTD = RMSNorm(self.config, name="norm_2")(x_BTD)
        y_BTD = residual(MoE(self.config, name="moe")(y_BTD, lengths_B))
        return stream(x_BTD + y_BTD, past), cached


class Attention(nn.Module):
    """Grouped-query attention with rotated queries and keys and a learned sink a head."""

    config: GptOssConfig
    window: int | None
    implementation: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, turns, past, lengths_B, dropout_key):
        config = self.config
        D, N, K, H = (config.axes[axis] for axis in "DNKH")
        std = config.initializer_range
        q_BTNH = rotary.rotate(Linear((D,), (N, H), std, name="q")(x_BTD), *turns)
        k_BTKH = rotary.rotate(Linear((D,), (K, H), std, name="k")(x_BTD), *turns)
        v_BTKH = Linear((D,), (K, H), std, name="v")(x_BTD)
        out_BTNH, cached = attend_next(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            past,
            positions_BT=positions_BT,
            scale=H**-0.5,
            lengths_B=lengths_B,
            window=self.window,
            sinks_N=self.param("sinks", nn.initializers.normal(std), (N,)),
            dropout_rate=config.attention_dropout,
            dropout_key=dropout_key,
            implementation=self.implementation,
        )
        return Linear((N, H), (D,), std, name="out")(out_BTNH), cached


class MoE(nn.Module):
    """A router, and of E experts the few that it chooses for each token.

    What the router says is sown as the intermediate "router_logits", [B T, E]: training balances it. With `lengths_B`,
    so many of each row's T are tokens; the rest is padding, which chooses nobody and gets zeros.
    """

    config: GptOssConfig

    @nn.compact
    def __call__(self, x_BTD, lengths_B=None):
        config = self.config
        D, F, E = (config.axes[axis] for axis in "DFE")
        x_RD = x_BTD.reshape(-1, D)
        router = Kernel((D, E), (E,), config.initializer_range, name="router")()
        logits_RE = moe.router_logits(x_RD, *router)
        self.sow("intermediates", "router_logits", logits_RE)
        weights_RC, chosen_RC = moe.route(logits_RE, config.num_experts_per_tok)
        if lengths_B is not None:
            is_token_BT = jnp.arange(x_BTD.shape[1])[None] < lengths_B[:, None]
            chosen_RC = jnp.where(is_token_BT.reshape(-1, 1), chosen_RC, -1)
        packed, std = config.quantization is not None, config.initializer_range
        experts = moe.Experts(
            *Kernel((E, D, F, 2), (E, F, 2), std, packed, name="gate_up")(),
            *Kernel((E, F, D), (E, D), std, packed, name="down")(),
        )
        y_RD = moe.mix(
            x_RD,
            weights_RC,
            chosen_RC,
            experts,
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
        )
        return y_RD.reshape(x_BTD.shape).astype(x_BTD.dtype)


class Kernel(nn.Module):
    """The kernel and bias of experts or of a router; packed, the kernel is an MXFP4 of the same numbers."""

    shape: tuple[int, ...]
    bias: tuple[int, ...]
    std: float
    packed: bool = False

    @nn.compact
    def __call__(self) -> tuple[Any, jax.Array]:
        kernel: Any = self.param("kernel", self._packed if self.packed else self._dense)
        bias = self.param("bias", nn.initializers.zeros, self.bias)
        return (MXFP4(kernel["blocks"], kernel["scales"]) if self.packed else kernel), bias

    def _dense(self, key: jax.Array) -> jax.Array:
        return nn.initializers.normal(self.std)(key, self.shape)

    def _packed(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random codes, whose standard deviation is 3, under one scale that brings it near `std`."""
        E, inputs, *outputs = self.shape
        blocks = jax.random.bits(key, (E, *outputs, inputs // 32, 16), jnp.uint8)
        exponent = 127 + round(math.log2(self.std / 3))
        return {"blocks": blocks, "scales": jnp.full(blocks.shape[:-1], exponent, jnp.uint8)}


class RMSNorm(nn.Module):
    config: GptOssConfig

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = self.param("scale", nn.initializers.ones, (self.config.hidden_size,))
        return rms_norm(x_BTD, scale_D, self.config.rms_norm_eps)
