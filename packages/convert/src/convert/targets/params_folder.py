"""What the exports of plain parameters have in common: our names, config.json, and the tokenizer's files beside."""

import json
from pathlib import Path
from typing import Any

from convert.sources import CONFIG
from core import checkpoint
from core.checkpoint import ModelFolder


def copy_files(folder: ModelFolder, out: Path) -> None:
    """Copies config.json and all that lies beside a model's weights."""
    for name in sorted({CONFIG, *folder.manifest["files"]}):
        (out / name).write_bytes((folder.path / name).read_bytes())


def is_own(path: Path) -> bool:
    """Tells whether the config at `path` is ours, and neither a model folder nor a training run is around it."""
    try:
        config: Any = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(config, dict)
        and "family" in config
        and not checkpoint.is_model_folder(path)
        and not any((path / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    )
