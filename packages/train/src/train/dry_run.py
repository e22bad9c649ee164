"""What a run would be and take: shapes only, nothing is computed and nothing written."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core import config as config_lib
from core.config import Config
from core.models import build
from train import compute, metrics, program, step
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.devices import Devices
from train.origin import cropped, model_config
from train.preflight import Plan


def report(config: TrainConfig, plan: Plan, devices: Devices) -> str:
    """Returns the lines that `dry_run=True` prints; compiles one update, for the compiler knows what it takes."""
    shape = _shape(config, plan)
    model = compute.fitted(build(shape), config, devices)
    dtype = compute.product_dtype(config, devices.platform)
    key = jax.eval_shape(jax.random.key, 0)
    state = devices.like(shape, lambda k: step.initial_state(model.init(k), config), key)
    windows = config.gradient_accumulation_steps, config.batch_size, config.block_size + 1
    update: Any = program.update(model=model, config=config, dtype=dtype, platform=devices.platform)
    lowered = update.lower(
        state,
        jax.ShapeDtypeStruct(windows, np.int32, sharding=devices.batch),
        jax.ShapeDtypeStruct((), np.float32),
        key if config.dropout else None,
    )
    flops = metrics.flops_per_token(shape, config.block_size) * config.tokens_per_step
    lines = {
        "model": _model(config, plan, model),
        "parts": _parts(state.params),
        "device": f"{devices}; {compute.described(model, dtype)}",
        "data": _data(config, plan),
        "update": (
            f"{config.gradient_accumulation_steps} x {config.batch_size} sequences of "
            f"{config.block_size} = {config.tokens_per_step:,} tokens, {flops:.3g} operations"
        ),
        "state": f"{_nbytes(state.params)} of parameters, {_nbytes(state)} with the optimizer's",
        "memory": _memory(lowered.compile()),
        "time": _time(config, devices, flops),
    }
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def _shape(config: TrainConfig, plan: Plan) -> Config:
    if plan.resumes:
        with Checkpoints(Path(config.out_dir) / "checkpoints") as checkpoints:
            latest = checkpoints.latest()
            assert latest is not None  # preflight has seen it
            return config_lib.from_dict(checkpoints.progress(latest).model)
    if plan.folder is not None:
        return cropped(plan.folder.config, config)
    return model_config(config, plan.dataset)


def _model(config: TrainConfig, plan: Plan, model: Any) -> str:
    begins = "its last checkpoint" if plan.resumes else config.init_from
    axes = model.config.axes
    return (
        f"{model.config.family}, {axes['L']} layers, {axes['N']} heads, {axes['D']} wide, vocabulary "
        f"{axes['V']:,}: {model.config.parameter_count:,} parameters; begins from {begins}"
    )


def _parts(params: Any) -> str:
    """The parameters by the first word of their names; a block's are given for all blocks together."""
    counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _data(config: TrainConfig, plan: Plan) -> str:
    train, val = (len(plan.dataset.tokens[split]) for split in ("train", "val"))
    seen = (config.max_iters + 1) * config.tokens_per_step
    return (
        f"{plan.dataset.path}: {train:,} training and {val:,} validation tokens; "
        f"{config.max_iters + 1:,} updates see {seen:,}, {seen / train:.2f} epochs"
    )


def _memory(compiled: Any) -> str:
    """Arguments are the state and the batch; the new state takes the place of the old."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return "unknown on this backend"
    arguments, temporary = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    return (
        f"{_gigabytes(arguments)} of arguments + {_gigabytes(temporary)} of temporaries = "
        f"{_gigabytes(arguments + temporary)} on the device, as compiled"
    )


def _time(config: TrainConfig, devices: Devices, flops: float) -> str:
    peak = metrics.peak_flops(devices.first.device_kind)
    if peak is None:
        return "unknown: no peak is known for this device"
    hours = flops / (0.4 * peak * devices.count) * (config.max_iters + 1) / 3600
    return f"{hours:,.1f} hours, if 40 % of the device's {peak:.3g} operations a second are reached"


def _nbytes(tree: Any) -> str:
    return _gigabytes(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
