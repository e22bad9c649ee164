"""Models behind one small interface, so that trainer and engine need not know the family or the module library.

model = build(config)
params = model.init(jax.random.key(0))
logits_BTV = model.apply(params, tokens_BT)
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from core import checkpoint, sharding
from core.config import Config
from core.kv_cache import KVCache
from core.layers import unembed
from core.models.gpt2 import GPT2
from core.models.gpt_oss import GptOss
from core.models.modules import PLAIN as PLAIN
from core.models.modules import Compute as Compute
from core.tokenizer import Tokenizer

Params = dict[str, Any]
"""A nested dict of arrays; a leaf's path, joined by dots, is its name in the model folder."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A configuration that can be initialised and applied; hashable, so it may be a static argument of jit.

    `compute` says how a whole sequence goes through (`apply`), not what comes out.
    """

    config: Config
    compute: Compute = PLAIN

    def init(self, key: jax.Array) -> Params:
        """Returns fresh float32 parameters: N(0, initializer_range), biases zero; packed kernels are packed."""
        tokens_BT = jnp.zeros((1, 1), jnp.int32)
        return _init(self._module(jnp.float32), key, tokens_BT)["params"]

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        dtype: Any = jnp.float32,
    ) -> jax.Array:
        """Returns logits_BTV in float32: position t's are for the token after it.

        Args:
          params: the parameters, of any float dtype.
          tokens_BT: ids; T at most `config.context_length`. One outside the vocabulary makes its sequence NaN.
          dropout_key: turns dropout on, at the configuration's rates.
          dtype: of the activations and of the products.

        Raises:
          ValueError: T is longer than the context.
        """
        return self.apply_and_route(params, tokens_BT, dropout_key=dropout_key, dtype=dtype)[0]

    def apply_and_route(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        dtype: Any = jnp.float32,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns what `apply` does, and the router's logits of every layer, [B T, E] in float32, if it has routers."""
        x_BTD, routers = self.hidden_and_route(
            params, tokens_BT, dropout_key=dropout_key, dtype=dtype
        )
        return unembed(x_BTD, self.head(params)), routers

    def head(self, params: Params) -> jax.Array:
        """Returns head_VD: the rows that hidden states are multiplied by."""
        tied = self.config.tie_word_embeddings
        return params["wte"]["embedding"] if tied else params["lm_head"]["kernel"]

    def hidden_and_route(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        dtype: Any = jnp.float32,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns what `apply_and_route` does with x_BTD in place of the logits: `unembed(x_BTD, head)` are they."""
        B, T = tokens_BT.shape
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context_length}")
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        module = self._module(dtype)
        result: Any = module.apply(
            {"params": params},
            tokens_BT,
            positions_BT,
            None,
            dropout_key,
            only_hidden=True,
            mutable="intermediates",
        )
        (x_BTD, _), sown = result
        blocks = sown.get("intermediates", {}).get("blocks", {})
        routers = (blocks[str(layer)]["moe"]["router_logits"][0] for layer in range(len(blocks)))
        return x_BTD, tuple(routers)

    def extend(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache,
        *,
        lengths_B: jax.Array | None = None,
        only_last: bool = False,
        only_hidden: bool = False,
        dtype: Any = jnp.float32,
    ) -> tuple[jax.Array, KVCache]:
        """Returns logits_BTV of `tokens_BT` placed at `positions_BT`, and the cache with them in it.

        A row's positions run on by one from where it stands, which is 0 or the position after its last token: a ring is
        read as if all before were in it. All are below the length that the cache was made for.

        Args:
          params: the parameters.
          tokens_BT: the next ids of each row.
          positions_BT: where they go.
          cache: what came before.
          lengths_B: how many of the T are the row's tokens, 0 to T; what follows is padding: its logits mean nothing,
            and the next tokens take its positions. None is T.
          only_last: gives the logits after each row's last token only; the result has T = 1. A prompt's logits are V
            numbers a token.
          only_hidden: gives x_BTD in place of the logits, which are `unembed(x_BTD, head)`.
          dtype: of the activations and of the products.
        """
        module = self._module(dtype)
        return cast(
            tuple[jax.Array, KVCache],
            module.apply(
                {"params": params},
                tokens_BT,
                positions_BT,
                cache,
                None,
                lengths_B,
                only_last,
                only_hidden,
            ),
        )

    def _module(self, dtype: Any) -> nn.Module:
        return _MODULES[self.config.family](self.config, jnp.dtype(dtype), self.compute)


_MODULES: dict[str, Any] = {"gpt2": GPT2, "gpt_oss": GptOss}


@functools.partial(jax.jit, static_argnums=0)
def _init(module: nn.Module, key: jax.Array, tokens_BT: jax.Array) -> Any:
    return module.init(key, tokens_BT, tokens_BT)


def load(
    path: str | Path, dtype: Any = None, *, mesh: Mesh | str | None = None
) -> tuple[Model, Params, Tokenizer | None]:
    """Opens a model folder: the model, its parameters (cast to `dtype` if given) and its tokenizer if it has one.

    Without a cast the parameters are the mapped file itself: opening takes milliseconds and no memory. With a mesh, as
    "tensor=8" (`core.sharding`), each device gets its part. The model's configuration has the ids that end a text from
    generation_config.json too.

    Raises:
      CheckpointError: `path` is no whole model folder.
      TokenizerError: its tokenizer cannot be read.
      ConfigError: the devices do not make the mesh.
    """
    folder = checkpoint.open(path)
    model = build(folder.config_with_stop_ids())
    mesh = sharding.mesh(mesh) if isinstance(mesh, str) else mesh
    shardings = None if mesh is None else sharding.place(folder.config, mesh).shardings
    return model, folder.params(dtype, shardings=shardings), Tokenizer.find(folder.path)


def build(config: Config) -> Model:
    """Returns the model that `config` describes."""
    return Model(config)
