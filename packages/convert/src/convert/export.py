"""Writes a model folder in somebody else's format.

python -m convert.export --model=DIR --to=hf --out=PATH
"""

if __name__ != "__main__":
    raise ImportError("convert.export is a function; this file is its command line")

import sys
from pathlib import Path
from typing import Any

from absl import flags

import convert
from convert import targets
from core import door

_MODEL = flags.DEFINE_string("model", None, "The model folder to read.")
_TO = flags.DEFINE_enum(
    "to",
    "hf",
    list(targets.TARGETS),
    "hf: what transformers' from_pretrained opens; gguf: a file for llama.cpp; npz, msgpack, orbax: "
    "parameters by our names, as numpy, flax and Orbax open them.",
)
_TYPE = flags.DEFINE_enum(
    "type", "keep", ["keep", "f32", "f16", "bf16", "q8_0"], "What a gguf's matrices are stored as."
)
_OUT = flags.DEFINE_string("out", None, "The folder to write, or the file.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replaces --out.")


def main() -> None:
    if not _MODEL.value or not _OUT.value:
        raise door.Usage("give --model=DIR and --out=PATH")
    options: dict[str, Any] = {"type": _TYPE.value} if _TO.value == "gguf" else {}
    if _TYPE.value != "keep" and not options:
        raise door.Usage(f"--type is for --to=gguf; --to={_TO.value} keeps the types")
    model = Path(_MODEL.value).absolute()  # the working directory may be what --out replaces
    print(
        convert.export(
            model,
            to=_TO.value,
            out=_OUT.value,
            overwrite=_OVERWRITE.value,
            on_note=_note,
            **options,
        )
    )


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")


door.run(main)
