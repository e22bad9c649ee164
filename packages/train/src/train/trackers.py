"""The same rows for TensorBoard and Weights & Biases, each imported only where it was asked for."""

import importlib
import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Self

import jax

from train.config import TrainConfig
from train.metrics import Row


class Trackers:
    """Those that `config` asks for; leaving the context ends their runs.

    Without credentials for Weights & Biases, or where its server cannot be reached, its run is kept offline in
    out_dir/wandb, for `wandb sync`. `run_id` is that run's: given back on resuming, it goes on instead of a new one.
    """

    def __init__(self, config: TrainConfig, *, run_id: str | None, resume_at: int | None):
        self.run_id = run_id
        self._board: Any = None
        self._wandb: Any = None
        if jax.process_index():
            return  # one writer is enough
        if config.tensorboard:
            writer = importlib.import_module("tensorboardX").SummaryWriter
            folder = str(Path(config.out_dir) / "tensorboard")
            self._board = writer(folder, purge_step=resume_at, write_to_disk=True)
        if config.wandb_log:
            self.run_id = run_id or secrets.token_hex(4)
            self._wandb = _start_wandb(config, self.run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, row: Row) -> None:
        numbers = {name: x for name, x in row.items() if isinstance(x, int | float)}
        if self._board is not None:
            for name in numbers.keys() - {"iter"}:
                self._board.add_scalar(name, numbers[name], row["iter"])
        if self._wandb is not None:
            # No step of its own: after a resume it would refuse the rows that are written again.
            self._wandb.log(numbers)


def _start_wandb(config: TrainConfig, run_id: str) -> Any:
    wandb: Any = importlib.import_module("wandb")
    settings = {
        "project": config.wandb_project,
        "name": config.wandb_run_name,
        "id": run_id,
        "resume": "allow",
        "dir": config.out_dir,
        "config": config.to_dict(),
        "settings": wandb.Settings(silent=not sys.stderr.isatty()),
    }
    mode = os.environ.get("WANDB_MODE") or (None if _has_wandb_key() else "offline")
    try:
        run = wandb.init(mode=mode, **settings)
    except wandb.errors.CommError:
        run = wandb.init(mode="offline", **settings)
    run.define_metric("*", step_metric="iter")
    return run


def _has_wandb_key() -> bool:
    """Without one, wandb asks for it on the terminal, in the middle of a script."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
