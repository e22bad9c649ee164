"""Where output may go: never in the place of something else, and where there is room."""

from pathlib import Path

from convert.errors import ConvertError
from core import folders


def check(out: str | Path, *, overwrite: bool, source: Path | None = None) -> Path:
    """Returns `out` as a path that may be written.

    Raises:
      ConvertError: it exists and `overwrite` is false, it is no model that may be replaced, or `source` lies in it.
    """
    out = Path(out)
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise ConvertError(f"{out}: the source {source} lies there; choose another folder")
    if not out.exists():
        return out
    if not overwrite:
        raise ConvertError(f"{out} exists; choose another folder or pass --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise ConvertError(
            f"{out} is not a model folder and is not overwritten; remove it yourself"
        )
    return out


def check_space(out: Path, nbytes: int) -> None:
    """Raises ConvertError if the disk under `out` has less than `nbytes` free."""
    free = folders.free_bytes(out)
    if nbytes > free:
        raise ConvertError(f"{out}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
