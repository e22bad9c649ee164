"""Converts a checkpoint to a model folder.

    python -m convert --model=gpt2-xl
    python -m convert --source=PATH --out=DIR [--dtype=bfloat16] [--resume]

A model known by name is read from models/src/NAME where that folder exists, and downloaded otherwise.
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from convert import sources
from core import door

if TYPE_CHECKING:
    from convert import importer

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, gpt-oss-20b, gpt-oss-120b, or OWNER/NAME on the hub; "
    "or OpenAI's TensorFlow originals: 124M, 355M, 774M, 1558M.",
)
_SOURCE = flags.DEFINE_string("source", None, "A checkpoint: a folder or a file.")
_OUT = flags.DEFINE_string("out", None, "The model folder to write; models/NAME with --model.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "keep", ["keep", "float32", "bfloat16", "float16"], "The type of every weight written."
)
_EXPERTS = flags.DEFINE_enum(
    "experts",
    "keep",
    ["keep", "mxfp4", "float32", "bfloat16", "float16"],
    "The type of GPT-OSS's experts; another than mxfp4 unpacks them (bfloat16: exactly, to four times the size).",
)
_QUANTIZATION = flags.DEFINE_enum(
    "quantization",
    "keep",
    ["keep", "int8"],
    "int8 rounds the kernels of a GPT-2's blocks, with a scale for each output channel; --dtype is the rest's.",
)
_FORMAT = flags.DEFINE_enum(
    "format", "auto", ["auto", *sources.READERS], "The format of --source, which its content tells."
)
_REVISION = flags.DEFINE_string("revision", None, "The branch, tag or commit to download.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replaces the model folder --out.")
_RESUME = flags.DEFINE_bool(
    "resume", False, "Goes on with this conversion where an earlier one was interrupted or killed."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Prints the plan, downloads and writes no weights.")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # what is done is kept, and said
    model, source = _MODEL.value, _SOURCE.value
    if source is not None and model is None:
        _convert_source(source)
    elif model is not None and source is None:
        _convert_model(model)
    else:
        raise door.Usage("give either --model=NAME or --source=PATH")


def _convert_source(path: str) -> None:
    if not path:
        raise door.Usage("--source is empty; expected the path of a folder or a file")
    if _REVISION.value is not None:
        raise door.Usage("--revision pins a download; it says nothing about --source")
    if not _OUT.value and not _DRY_RUN.value:
        raise door.Usage("--source needs --out=DIR")
    from convert import destination, importer

    if _DRY_RUN.value:
        print(importer.plan_source(path, format=_FORMAT.value, **_types()).describe())
        return
    out = destination.for_model(_OUT.value or "", overwrite=_OVERWRITE.value)
    plan = importer.plan_source(path, format=_FORMAT.value, **_types())
    _write(plan, out)


def _convert_model(name: str) -> None:
    from convert import destination, hub, importer

    if hub.looks_like_path(name):
        raise door.Usage(
            f"--model={name} is a path; --model is NAME or OWNER/NAME, a checkpoint on disk is --source=PATH --out=DIR"
        )
    if _FORMAT.value != "auto":
        raise door.Usage("--format says what --source is; of a --model it is known")
    if _DRY_RUN.value:
        print(importer.describe_model(name, revision=_REVISION.value, **_types()))
        return
    out = destination.for_model(_OUT.value or hub.default_out(name), overwrite=_OVERWRITE.value)
    plan = importer.plan_model(name, revision=_REVISION.value, **_types())
    _write(plan, out)


def _types() -> dict[str, Any]:
    return {"dtype": _DTYPE.value, "experts": _EXPERTS.value, "quantization": _QUANTIZATION.value}


def _write(plan: "importer.Plan", out: Path) -> None:
    from convert import importer

    for text in plan.source.notes:
        _note(text)
    overwrite, resume = _OVERWRITE.value, _RESUME.value
    print(importer.write(plan, out, overwrite=overwrite, resume=resume, on_note=_note))


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")


if __name__ == "__main__":
    door.run(main)
