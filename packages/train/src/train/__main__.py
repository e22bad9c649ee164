"""`python -m train --config=configs/FILE.py [--config.KEY=VALUE ...]`: flags to a TrainConfig, and one call."""

from train import pages

if __name__ == "__main__":
    pages.start_again_with_huge()  # before all that takes time to import

import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

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


class _ConfigFile(flags.ArgumentParser):
    """Reads a config file as ml_collections does, FILE:ARGUMENT too, but says in one line what is wrong with it."""

    def parse(self, argument: str) -> ConfigDict:
        file, *rest = argument.split(":", 1)
        names: dict[str, Any] = {"__name__": "config", "__file__": file}
        try:
            exec(compile(Path(file).read_bytes(), file, "exec"), names)
            config = names["get_config"](*rest) if "get_config" in names else None
        except Exception as error:  # the file is the user's code, which may raise anything
            raise flags.IllegalFlagValueError(_what_is_wrong(file, error)) from error
        if not isinstance(config, ConfigDict):
            found = f"returns {type(config).__name__}" if "get_config" in names else "is missing"
            raise flags.IllegalFlagValueError(
                f"{file}: get_config() {found}; expected a function that returns a ConfigDict"
            )
        for key in _nested_keys(sys.argv):
            raise flags.IllegalFlagValueError(
                f'unknown config key "{key}": keys have no dots; see docs/training.md, Configuration'
            )
        return config


def _nested_keys(arguments: list[str]) -> list[str]:
    """ml_collections looks for A in the file when it sees --config.A.B, and ends in a traceback."""
    matches = (re.match(r"--?(?:no)?config\.([^=.]*\.[^=]*)", argument) for argument in arguments)
    return [match[1] for match in matches if match]


# The flag's own parser ends in a traceback for most of what can be wrong with a file.
flags.FLAGS["config"].parser = _ConfigFile()


def main() -> None:
    config = _read_config()
    if config.deterministic:  # XLA reads its flags when jax starts
        flag = "--xla_gpu_deterministic_ops=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    from train import preflight

    if config.processes > 1:
        _keep_stdout_to_ourselves()
    try:
        preflight.check(config)  # before jax, which takes a second to start
        from train.loop import run

        result = run(config)
    except OSError as error:
        raise preflight.TrainError(f"{config.out_dir}: {error}") from error
    if config.process == 0:  # one of several that know the same
        _tell(config, result)
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)


def _keep_stdout_to_ourselves() -> None:
    """Sends what libraries in C++ say on stdout to stderr: Gloo tells each process there whom it has met."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w")


def _tell(config: TrainConfig, result: Any) -> None:
    if config.dry_run:
        print(result.report)
    elif config.eval_only:
        print(json.dumps({"iter": result.iteration, **result.losses}))
    elif result.stopped_by is None:
        print(f"{result.model_dir}: best validation loss {result.best_val_loss:.4f}")
    else:
        sys.stderr.write(
            f"{result.stopped_by.name}: stopped at iteration {result.iteration}, saved; "
            "continue with --config.init_from=auto\n"
        )


def _read_config() -> TrainConfig:
    if _CONFIG.value is None:
        raise door.Usage("--config is required, for example --config=configs/gpt2.py")
    try:
        return TrainConfig.from_dict(_CONFIG.value.to_dict())
    except ConfigError as error:
        raise door.Usage(str(error)) from error


def _what_is_wrong(file: str, error: Exception) -> str:
    """File, line and cause: where the syntax is wrong, else the last line of `file` that was running."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {kind}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"{file}{f', line {lines[-1]}' if lines else ''}: {kind}: {error}"


if __name__ == "__main__":
    door.run(main, bad_flags=(TypeError, ValueError))
