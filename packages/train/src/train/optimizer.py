"""AdamW and its learning rate, equal to what torch computes in nanoGPT's loop.

The learning rate is a function of the trainer's iteration, not of the optimizer's own count, and is passed in: an
update that is skipped still moves the schedule on, as in nanoGPT.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import TrainConfig

DECAYED = ("kernel", "embedding")


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Linear warm-up, then down to `min_lr` at `lr_decay_iters`, and `min_lr` from there on.

    Down on a cosine (nanoGPT's), on a line, or ("wsd") level and on a line over the last `cooldown_iters`.
    """
    if not config.decay_lr:
        return config.learning_rate
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if iteration > config.lr_decay_iters:
        return config.min_lr
    is_wsd = config.lr_schedule == "wsd"
    start = config.lr_decay_iters - config.cooldown_iters if is_wsd else config.warmup_iters
    done = max(0.0, (iteration - start) / (config.lr_decay_iters - start))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1.0 - done
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def decay_mask(params: Any) -> Any:
    """True for the weights that decay: kernels and embeddings, by name.

    Not by rank as in nanoGPT: our qkv bias has two axes, and stacked layers give every bias one more.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """The step in units of the learning rate: `params - lr * update` is torch's AdamW."""
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def clip(grads: Any, limit: float) -> tuple[Any, jax.Array]:
    """Gradients of global norm at most `limit` (0: as they are), and the norm they had.

    torch divides by norm + 1e-6 (clip_grad_norm_), optax.clip_by_global_norm by the norm alone.
    """
    norm = optax.tree.norm(grads)
    if limit == 0:
        return grads, norm
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads), norm
