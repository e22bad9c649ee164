"""Where output may go: never in the place of something else."""

from pathlib import Path

from convert.errors import ConvertError
from convert.sources import safetensors
from core import checkpoint, folders


def for_model(out: str | Path, *, overwrite: bool) -> Path:
    """Returns `out` as a path where a model folder may be written.

    Raises:
      ConvertError: it exists and `overwrite` is false, or what is there is no model folder.
    """
    out = Path(out)
    try:
        checkpoint.check_replaceable(out, overwrite=overwrite)
    except checkpoint.CheckpointError as error:
        raise ConvertError(str(error)) from error
    return out


def for_export(out: str | Path, *, overwrite: bool) -> Path:
    """Returns `out` as a path where an export may be written.

    Raises:
      ConvertError: it exists and `overwrite` is false, or what is there is no exported model.
    """
    out = Path(out)
    try:
        folders.check_replaceable(
            out, overwrite=overwrite, is_own=_is_export, kind="an exported model"
        )
    except checkpoint.CheckpointError as error:
        raise ConvertError(str(error)) from error
    return out


def check_apart(out: Path, source: Path) -> None:
    """Raises ConvertError if `source` lies where `out` would be written."""
    if source.resolve().is_relative_to(out.resolve()):
        raise ConvertError(f"{out}: the source {source} lies there; choose another folder")


def _is_export(folder: Path) -> bool:
    """Tells whether a model as Hugging Face stores it lies at `folder`, and no training run around one."""
    weights = (safetensors.SINGLE, safetensors.INDEX)
    return (
        (folder / safetensors.CONFIG).is_file()
        and any((folder / name).is_file() for name in weights)
        and not any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    )
