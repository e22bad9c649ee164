"""Where output may go: never in the place of something else."""

import os
from collections.abc import Callable
from pathlib import Path

from convert.errors import ConvertError
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


def for_export(out: str | Path, *, is_own: Callable[[Path], bool], overwrite: bool) -> Path:
    """Returns `out` as a path where an export may be written.

    Raises:
      ConvertError: it exists and `overwrite` is false, or what is there is not such an export.
    """
    out = Path(out)
    try:
        folders.check_replaceable(out, overwrite=overwrite, is_own=is_own, kind="an exported model")
    except checkpoint.CheckpointError as error:
        raise ConvertError(str(error)) from error
    return out


def check_apart(out: Path, source: Path) -> None:
    """Raises ConvertError if `source` lies where `out` would be written."""
    if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(out)):
        raise ConvertError(f"{out}: the source {source} lies there; choose another folder")
