"""`python -m train --config=configs/FILE.py [--config.KEY=VALUE ...]`: flags to a TrainConfig, and one call."""

import json
import sys

from ml_collections import config_flags

from core.config import ConfigError
from train import cli
from train.config import TrainConfig

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; any key of it can be set with --config.KEY=VALUE."
)


def main(argv: list[str]) -> int:
    del argv
    config = _read_config()
    from core.checkpoint import CheckpointError
    from core.tokenizer import TokenizerError
    from train.data import DataError
    from train.loop import run
    from train.origin import TrainError

    try:
        result = run(config)
    except (CheckpointError, DataError, TokenizerError, TrainError, OSError) as error:
        raise cli.Failure(str(error)) from error
    if config.eval_only:
        print(json.dumps({"iter": result.iteration, **result.losses}))
        return 0
    if result.stopped_by is not None:
        print(
            f"{result.stopped_by.name}: stopped at iteration {result.iteration}, saved; "
            "continue with --config.init_from=auto",
            file=sys.stderr,
        )
        return 128 + result.stopped_by
    print(f"{result.model_dir}: best validation loss {result.best_val_loss:.4f}")
    return 0


def _read_config() -> TrainConfig:
    if _CONFIG.value is None:
        raise cli.UsageError("--config is required, for example --config=configs/gpt2.py")
    try:
        # A file that cannot be read is kept by ml_collections as an object that raises when it is used.
        return TrainConfig.from_dict(_CONFIG.value.to_dict())
    except (ConfigError, OSError) as error:
        raise cli.UsageError(str(error)) from error


if __name__ == "__main__":
    cli.start(main)
