"""`python -m train --config=configs/FILE.py [--config.KEY=VALUE ...]`: flags to a TrainConfig, and one call."""

import json
import sys

from ml_collections import config_flags

from core import door
from core.errors import ConfigError
from train.config import TrainConfig

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/; any key of it can be set with --config.KEY=VALUE.",
    # Keys that the file does not have are let through, for TrainConfig to refuse with the nearest name.
    lock_config=False,
    accept_new_attributes=True,
)


def main() -> None:
    config = _read_config()
    from train.loop import run
    from train.origin import TrainError

    try:
        result = run(config)
    except OSError as error:
        raise TrainError(f"{config.out_dir}: {error}") from error
    if config.eval_only:
        print(json.dumps({"iter": result.iteration, **result.losses}))
    elif result.stopped_by is None:
        print(f"{result.model_dir}: best validation loss {result.best_val_loss:.4f}")
    else:
        sys.stderr.write(
            f"{result.stopped_by.name}: stopped at iteration {result.iteration}, saved; "
            "continue with --config.init_from=auto\n"
        )
        sys.exit(128 + result.stopped_by)


def _read_config() -> TrainConfig:
    if _CONFIG.value is None:
        raise door.Usage("--config is required, for example --config=configs/gpt2.py")
    try:
        # A file that cannot be read is kept by ml_collections as an object that raises when it is used.
        return TrainConfig.from_dict(_CONFIG.value.to_dict())
    except (ConfigError, OSError) as error:
        raise door.Usage(str(error)) from error


if __name__ == "__main__":
    door.run(main, bad_flags=(OSError, TypeError, ValueError))
