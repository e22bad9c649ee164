"""How a run computes: the dtype of its products, its attention, what it keeps for the backward pass; decided once."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from core.config import Config, GPT2Config
from core.models import Compute, Model
from train.config import TrainConfig
from train.devices import Devices
from train.preflight import TrainError


def product_dtype(config: TrainConfig, platform: str) -> Any:
    """The dtype of the products; auto as nanoGPT, which computes in float32 on a CPU."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype("float32" if platform == "cpu" else "bfloat16")


def fitted(model: Model, config: TrainConfig, devices: Devices) -> Model:
    """Returns `model` as this run computes it."""
    attention = attention_for(config, model.config, devices.platform, devices.count)
    return dataclasses.replace(model, compute=Compute(config.remat, attention, config.scan_layers))


def described(model: Model, dtype: Any) -> str:
    attention, remat, scan_layers = model.compute
    kept = "" if remat == "none" else f", remat {remat}"
    scanned = ", layers in a scan" if scan_layers else ""
    return f"products in {jnp.dtype(dtype).name}, attention {attention}{kept}{scanned}"


def attention_for(config: TrainConfig, shape: Config, platform: str, devices: int = 1) -> str:
    """Returns the implementation that `attention` asks for: with "auto" the one without a score matrix that can be had.

    Raises:
      TrainError: the one that was asked for cannot compute this model here.
    """
    fused = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
    asked = fused if config.attention == "auto" else config.attention
    obstacle = _obstacle(asked, config, shape, platform, devices)
    if not obstacle:
        return asked
    if config.attention == "auto":
        return "xla"
    raise TrainError(f"attention={asked}: {obstacle}; use attention=auto")


def _obstacle(asked: str, config: TrainConfig, shape: Config, platform: str, devices: int) -> str:
    """Says what keeps an implementation from this run; "" if nothing does."""
    if asked == "xla":
        return ""
    where = {"cudnn": "gpu", "splash": "tpu"}[asked]
    head = shape.axes["H"]
    if platform != where:
        return f"needs a {where}, this is a {platform}"
    if not isinstance(shape, GPT2Config):
        return f"knows no sinks, which {shape.family} has"
    if config.dropout:
        return f"cannot drop attention weights, and dropout={config.dropout}"
    if asked == "cudnn" and product_dtype(config, platform).itemsize > 2:
        return "computes in half precision, not in float32"
    if asked == "cudnn" and (head % 8 or head > 128):
        return f"heads of {head}; a multiple of 8, at most 128, is what it takes"
    if asked == "splash" and devices > 1:
        return f"runs on one device, not on {devices}"
    return ""
