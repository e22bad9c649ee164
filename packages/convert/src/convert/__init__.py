"""Checkpoints from elsewhere to model folders, and back.

    convert.convert("gpt2-xl", out="models/gpt2-xl")          # or a path
    convert.export("models/mine", to="hf", out="exported/mine")
    convert.verify("models/mine", against="exported/mine")

The work is in `importer`, `exporter` and `verifier`. The modules `export` and `verify` are command lines only and
refuse to be imported, because an imported submodule would take the place of the function of its name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError

if TYPE_CHECKING:
    from convert.verifier import Report

__all__ = ["ConvertError", "convert", "export", "verify"]


def convert(
    source_or_model: str | Path,
    *,
    out: str | Path,
    dtype: str = "keep",
    experts: str = "keep",
    quantization: str = "keep",
    format: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """Writes the model folder `out` from a checkpoint and returns its path.

    A path that exists is read, as `format` or by its content; any other string names a model on the hub ("gpt2-xl",
    "owner/name"), which is looked for in `models/src` first and downloaded otherwise, at `revision` (a branch, tag or
    commit). `dtype` is "keep", or what every weight is cast to: "float32", "bfloat16", "float16". `experts` is that
    for the experts of a GPT-OSS alone, which are packed as "mxfp4" and which any other type unpacks. `quantization`
    "int8" rounds the kernels of a GPT-2's blocks. `resume` goes on with the same conversion where an earlier one was
    interrupted or killed. `on_note` is told whether there was one, and what is odd about the source. `quiet=True`
    shows no progress, `None` shows it where stderr is a terminal.

    Raises:
      ConvertError: nothing was written at `out`.
      KeyboardInterrupt: with a message that tells how to go on.
    """
    from convert import destination, importer

    types: dict[str, Any] = {"dtype": dtype, "experts": experts, "quantization": quantization}
    destination.for_model(out, overwrite=overwrite)
    if isinstance(source_or_model, Path) or Path(source_or_model).exists():
        plan = importer.plan_source(source_or_model, **types, format=format, revision=revision)
    else:
        plan = importer.plan_model(source_or_model, **types, revision=revision, quiet=quiet)
    for note in plan.source.notes:
        if on_note is not None:
            on_note(note)
    return importer.write(
        plan, out, overwrite=overwrite, resume=resume, quiet=quiet, on_note=on_note
    )


def export(
    model: str | Path,
    *,
    to: str = "hf",
    out: str | Path,
    overwrite: bool = False,
    quiet: bool | None = None,
    on_note: Callable[[str], None] | None = None,
    **options: Any,
) -> Path:
    """Writes the model folder `model` in somebody else's format at `out` and returns that path.

    `to="hf"` is the folder that transformers' `from_pretrained` opens, in shards of at most `shard_bytes`;
    `to="gguf"` is a file for llama.cpp, its matrices of `type` "keep", "f32", "f16", "bf16" or "q8_0". `on_note`
    is told, one line each, what the format could hold only in another way.

    Raises:
      ConvertError: nothing was written at `out`.
    """
    from convert import exporter

    return exporter.export(
        model, to=to, out=out, overwrite=overwrite, quiet=quiet, on_note=on_note, **options
    )


def verify(
    model: str | Path,
    *,
    against: str | Path | None = None,
    format: str = "auto",
    logits: bool = False,
    quiet: bool | None = None,
) -> "Report":
    """Hashes every tensor and file of a model folder again and returns what was looked at.

    `against` is a checkpoint, read as `format` or by its content, from which every tensor is derived again. `logits`
    compares with torch, which must be installed, and names the first layer that differs.

    Raises:
      ConvertError: naming everything that differs.
    """
    from convert import verifier

    report = verifier.verify(model, against=against, format=format, logits=logits, quiet=quiet)
    report.check()
    return report
