"""From a model folder to somebody else's format: checked first, then written beside its name and renamed when whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert import destination, progress, targets
from convert.errors import ConvertError
from core import checkpoint, folders


def export(
    model: str | Path,
    *,
    to: str,
    out: str | Path,
    overwrite: bool = False,
    quiet: bool | None = None,
    on_note: Callable[[str], None] | None = None,
    **options: Any,
) -> Path:
    """Writes the model folder `model` at `out`; see `convert.export`. `on_note` is told what the user must hear."""
    if to not in targets.TARGETS:
        raise ConvertError(f"format {to!r} is not one of {', '.join(targets.TARGETS)}")
    target = targets.target(to)
    model = Path(model)
    destination.check_apart(Path(out), model)
    out = destination.for_export(out, is_own=target.is_own, overwrite=overwrite)
    try:
        folder = checkpoint.open(model)
        if getattr(folder.config, "quantization", None) == "int8":
            raise ConvertError(
                f"{model}: its kernels are rounded to int8, which no export holds; export a folder that was converted "
                f"without --quantization from {_origin(folder)}"
            )
        if problems := target.check(folder):
            raise ConvertError(f"{model} cannot be written as {to}", problems)
        total = target.nbytes(folder)
        folders.check_space(out, total)
        fresh = folders.fresh_file if target.IS_FILE else folders.fresh
        with fresh(out) as partial, progress.bar("exporting", total, quiet) as advance:
            notes = target.write(folder, partial, advance, **options)
    except (checkpoint.CheckpointError, OSError) as error:
        raise ConvertError(str(error)) from error
    for note in notes:
        if on_note is not None:
            on_note(note)
    return out


def _origin(folder: checkpoint.ModelFolder) -> str:
    source = folder.manifest.get("source") or {}
    return str(source.get("repo") or source.get("path") or source.get("url") or "its source")
