"""AdamW and its learning rate, equal to what torch computes in nanoGPT's loop.

The learning rate is a function of the trainer's iteration, not of the optimizer's own count, and is passed in: an
update that is skipped still moves the schedule on, as in nanoGPT.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

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


def steps(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer that `config` names, in units of the learning rate: the weights become `params - lr * update`."""
    return muon(config) if config.optimizer == "muon" else adamw(config)


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """The step in units of the learning rate: `params - lr * update` is torch's AdamW."""
    return optax.chain(_adam(config), _decay(config))


def muon(config: TrainConfig) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the blocks' matrices, AdamW for the rest.

    Its steps are scaled to the size of AdamW's (0.2 a number, root mean square; Liu et al. 2025, arXiv:2502.16982), so
    that learning rates and decay are AdamW's. `optax.contrib.muon`, left to itself, takes every leaf of two axes for
    a matrix, embeddings and our biases among them, and none of more, as our heads have; it is told leaf by leaf.
    """

    def is_matrix(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _matrix(path) is not None, params)

    def dimensions(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _matrix(path), params)

    def rescaled(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u * (0.2 * math.sqrt(max(_sides(_matrix(path), u.shape)))), updates
        )

    matrices = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions), optax.stateless(rescaled)
    )
    others = optax.masked(_adam(config), lambda p: jax.tree.map(operator.not_, is_matrix(p)))
    return optax.chain(optax.masked(matrices, is_matrix), others, _decay(config))


def _adam(config: TrainConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)


def _decay(config: TrainConfig) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay, mask=decay_mask)


# Which axes of a kernel are summed over, and which come out; the others number matrices: q, k and v, and experts.
_MATRICES = {
    "attn.qkv": ((0,), (2, 3)),
    "attn.q": ((0,), (1, 2)),
    "attn.k": ((0,), (1, 2)),
    "attn.v": ((0,), (1, 2)),
    "attn.out": ((0, 1), (2,)),
    "mlp.up": ((0,), (1,)),
    "mlp.down": ((0,), (1,)),
    "moe.gate_up": ((1,), (2,)),
    "moe.down": ((1,), (2,)),
}


def _matrix(path: tuple[Any, ...]) -> Any:
    *_, outer, inner, last = (None, None, *(key.key for key in path))
    axes = _MATRICES.get(f"{outer}.{inner}") if last == "kernel" else None
    return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)


def _sides(matrix: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    return (
        math.prod(shape[axis] for axis in matrix.reduction_axis),
        math.prod(shape[axis] for axis in matrix.output_axis),
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
