"""GGUF, one file with the tokenizer in it: what llama.cpp, and all that is built on it, computes with.

`check` refuses what llama.cpp would compute differently, because its graph is fixed for each architecture and knows no
key for most of what a config says. `type` is what the matrices are stored as ("keep": as they are); norms, biases,
position embeddings and routers are always F32, because llama.cpp computes with nothing else, and MXFP4 stays MXFP4.
"""

from collections.abc import Callable
from pathlib import Path

import gguf

from convert.targets.gguf import families, vocabulary, weights
from core import folders
from core.checkpoint import ModelFolder

IS_FILE = True
_MAGIC = b"GGUF"


def check(folder: ModelFolder) -> list[str]:
    """Returns everything that llama.cpp would compute differently, or not at all."""
    family = families.FAMILIES[folder.config.family]
    return [*family.problems(folder.config), *vocabulary.problems(folder)]


def nbytes(folder: ModelFolder) -> int:
    """Returns the size of the weights as they are stored now, which is how `write` counts."""
    return sum(array.nbytes for array in folder.tensors.values())


def write(
    folder: ModelFolder, out: Path, on_bytes: Callable[[int], None], *, type: str = "keep"
) -> list[str]:
    """Writes the metadata, then every tensor in parts; one part is in memory at a time.

    Raises:
      ConvertError: `type` is unknown, or a value does not fit in it.
      CheckpointError: there is no room for the file.
    """
    config = folder.config
    family = families.FAMILIES[config.family]
    stored, notes = weights.plan(family.rows(config), folder, type)
    folders.check_space(out, sum(tensor.nbytes for tensor in stored))
    tokens, more = vocabulary.read(folder)
    writer = gguf.GGUFWriter(out, family.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(folder.path.resolve().name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(weights.file_type(stored))
        family.describe(writer, config)
        tokens.describe(writer)
        weights.write(writer, stored, on_bytes)
    finally:
        writer.close()
    return [*family.notes(config), *notes, *more]


def is_own(path: Path) -> bool:
    """Tells whether a GGUF file lies at `path`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC
