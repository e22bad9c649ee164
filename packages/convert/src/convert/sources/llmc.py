"""Reads llm.c's model files (`gpt2_124M.bin`, `model_00019560.bin`): versions 3, all float32, and 5, all bfloat16.

The file is 256 numbers and then the weights, each kind for all layers in one piece; here a layer's part of a piece is a
tensor of its own, by llm.c's name and the layer's number. Rows of the vocabulary that are only padding are left out.
"""

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.errors import ConvertError
from convert.sources import Source, SourceTensor, companions, map_file, reader

EXPECTED = "an llm.c model .bin (version 3 or 5), or a log folder with model_STEP.bin and DONE_STEP"

DTYPES: dict[int, np.dtype] = {3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}
"""The file's versions, as the types of all its weights."""

_MAGIC = 20240326
_OTHERS = {
    20240327: "debug state",
    20240328: "tokenizer",
    20240520: "training tokens",
    20240522: "evaluation set",
    20240527: "optimizer state",
    20240801: "Llama 3 training tokens",
    20240803: "Llama 3 model",
}
"""The first numbers of llm.c's other files, and what those are."""

_SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "padded_vocab_size")
"""The third to eighth numbers of the file, by the names of llm.c's GPT2Config."""

_HEADER_BYTES = 1024
_STEP = re.compile(r"model_(\d{8})\.bin")


def recognizes(path: Path) -> bool:
    """Tells whether a file begins as one of llm.c's does, or a folder holds its models."""
    if path.is_dir():
        return any(_has_magic(file) for file in _steps(path).values())
    return _has_magic(path)


def open(path: Path) -> Source:
    """Opens one model file, or of a log folder the latest checkpoint that llm.c has finished."""
    file, notes = _latest(path) if path.is_dir() else (path, list(_unfinished(path)))
    version, sizes = _read_header(file)
    dtype = DTYPES[version]
    _check_size(file, sizes, dtype)
    buffer = map_file(file)
    notes += _padding(buffer, sizes, dtype)
    return Source(
        path=path,
        format="llmc",
        config=sizes,
        tensors={tensor.name: tensor for tensor in _tensors(buffer, sizes, dtype)},
        files=(file,),
        companions=companions(file.parent),
        notes=tuple(notes),
    )


def _steps(folder: Path) -> dict[int, Path]:
    """Returns the models in a log folder by their steps, in order."""
    found = {match[1]: path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))}
    return {int(step): path for step, path in sorted(found.items()) if path.is_file()}


def _latest(folder: Path) -> tuple[Path, list[str]]:
    """Returns the model of the last step with a DONE file, and a note on later ones."""
    steps = _steps(folder)
    done = [path for path in steps.values() if not list(_unfinished(path))]
    if not done:
        raise ConvertError(
            f"{folder}: found {', '.join(path.name for path in steps.values()) or 'no model_STEP.bin'} "
            "without DONE_STEP, so llm.c had not finished; give the path of the .bin to take it all the same"
        )
    later = [path.name for path in steps.values() if path.name > done[-1].name]
    note = (
        f"{', '.join(later)} passed over for {done[-1].name}: no DONE file says that llm.c finished"
    )
    return done[-1], [note] if later else []


def _unfinished(path: Path) -> Iterator[str]:
    """Yields a note if a training run has written `path` and not the DONE file that follows it."""
    match = _STEP.fullmatch(path.name)
    if match and not path.with_name(f"DONE_{match[1]}").exists():
        yield f"{path.name} has no DONE_{match[1]} beside it: llm.c had not finished that checkpoint"


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    known = {_MAGIC, *_OTHERS}
    return len(start) == 4 and int.from_bytes(start, "little", signed=True) in known


def _read_header(path: Path) -> tuple[int, dict[str, int]]:
    """Returns the version and the sizes of a model file.

    Raises:
      ConvertError: another of llm.c's files, another version, or sizes that no model has.
    """
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    if len(start) < _HEADER_BYTES:
        raise ConvertError(f"{path}: cut short: found {len(start)} bytes, a header has 1024")
    magic, version, *numbers = (int(n) for n in np.frombuffer(start, "<i4"))
    if magic != _MAGIC:
        what = f"llm.c's {_OTHERS[magic]}" if magic in _OTHERS else f"no file of llm.c's ({magic})"
        raise ConvertError(f"{path}: {what}; expected its GPT-2, which begins with {_MAGIC}")
    sizes: dict[str, int] = dict(zip(_SIZES, numbers, strict=False))
    if version not in DTYPES or not sizes["padded_vocab_size"]:
        older = ", from before the padded vocabulary" if not sizes["padded_vocab_size"] else ""
        raise ConvertError(
            f"{path}: version {version}{older}; expected 3 (float32) or 5 (bfloat16) with a padded vocabulary, "
            "as llm.c's train_gpt2.py writes them since May 2024"
        )
    _check_sizes(path, sizes)
    return version, sizes


def _check_sizes(path: Path, sizes: Mapping[str, int]) -> None:
    wrong = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    if sizes["padded_vocab_size"] < sizes["vocab_size"]:
        wrong.append(f"padded_vocab_size={sizes['padded_vocab_size']} is below vocab_size")
    if wrong:
        raise ConvertError(f"{path}: the header cannot be", wrong)


def _pieces(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns what a file holds, in its order: llm.c's names and shapes, [out, in]; {L} stands for every layer."""
    d = sizes["channels"]
    return {
        "wte": (sizes["padded_vocab_size"], d),
        "wpe": (sizes["max_seq_len"], d),
        "ln1w.{L}": (d,),
        "ln1b.{L}": (d,),
        "qkvw.{L}": (3 * d, d),
        "qkvb.{L}": (3 * d,),
        "attprojw.{L}": (d, d),
        "attprojb.{L}": (d,),
        "ln2w.{L}": (d,),
        "ln2b.{L}": (d,),
        "fcw.{L}": (4 * d, d),
        "fcb.{L}": (4 * d,),
        "fcprojw.{L}": (d, 4 * d),
        "fcprojb.{L}": (d,),
        "lnfw": (d,),
        "lnfb": (d,),
    }


def _check_size(path: Path, sizes: Mapping[str, int], dtype: np.dtype) -> None:
    layers = sizes["num_layers"]
    elements = sum(
        math.prod(shape) * (layers if "{L}" in name else 1)
        for name, shape in _pieces(sizes).items()
    )
    found, expected = path.stat().st_size, _HEADER_BYTES + elements * dtype.itemsize
    if found != expected:
        state = "cut short: " if found < expected else ""
        raise ConvertError(
            f"{path}: {state}found {found} bytes, expected {expected} from its header "
            f"({', '.join(f'{name}={size}' for name, size in sizes.items())}, {dtype.name})"
        )


def _tensors(
    buffer: mmap.mmap | bytes, sizes: Mapping[str, int], dtype: np.dtype
) -> Iterator[SourceTensor]:
    offset = _HEADER_BYTES
    for name, shape in _pieces(sizes).items():
        layers = [str(i) for i in range(sizes["num_layers"])] if "{L}" in name else [""]
        kept = (sizes["vocab_size"], *shape[1:]) if name == "wte" else shape
        for layer in layers:
            full = name.replace("{L}", layer)
            yield SourceTensor(full, dtype.name, kept, reader(buffer, dtype, kept, offset))
            offset += math.prod(shape) * dtype.itemsize


def _padding(buffer: mmap.mmap | bytes, sizes: Mapping[str, int], dtype: np.dtype) -> Iterator[str]:
    """Yields a note if there are rows beyond the vocabulary; llm.c never predicts them and leaves them at zero."""
    vocab, padded, width = (sizes[n] for n in ("vocab_size", "padded_vocab_size", "channels"))
    if vocab == padded:
        return
    row = width * dtype.itemsize
    begin, end = (_HEADER_BYTES + rows * row for rows in (vocab, padded))
    part = 1 << 20
    trained = any(any(buffer[i : min(i + part, end)]) for i in range(begin, end, part))
    held = "not zero, though llm.c never uses them" if trained else "all zero"
    yield f"{padded - vocab} rows of wte beyond vocab_size={vocab} are left out: padding, {held}"
