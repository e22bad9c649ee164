"""Random weights, once for everyone, as the Hugging Face folder that every contestant can open.

Real names, shapes and files; the numbers are drawn once and repeated, each tensor beginning at another place, so that
14 GB are written as fast as the disk takes them. What is measured depends on how much it is, not on how random.
"""

import functools
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import shapes
from bench.shapes import AnyShape, Tensors

TOKEN_STD = 0.02
# Five times GPT-2's: at 0.02 a random model repeats one token whatever came before, and equal outputs prove little.
MATRIX_STD = 0.1
# A prime, so that no two rows of a matrix are the same: a tensor meets the same number again this many later.
PERIOD = 2**23 - 15


def write(folder: Path, shape: AnyShape, *, seed: int = 0) -> Path:
    """Writes config.json and the safetensors files of a random model to `folder`, on the disk for good; returns it."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(shape.hf_config(), indent=2) + "\n")
    files = shape.hf_files()
    for name, tensors in files.items():
        _write_file(partial / name, tensors, seed)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": shapes.nbytes(shape)},
            "weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors},
        }
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    partial.rename(folder)
    return folder


def _write_file(path: Path, tensors: Tensors, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, sizes) in tensors.items():
        size = shapes.ITEM_BYTES[dtype] * math.prod(sizes)
        offsets = [offset, offset + size]
        header[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": offsets}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, sizes) in tensors.items():
            for part in _parts(name, dtype, sizes, seed):
                file.write(part.data)
        file.flush()
        os.fsync(file.fileno())


def _parts(name: str, dtype: str, sizes: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Yields a tensor's numbers in consecutive parts."""
    if name.endswith(".attn.bias"):
        yield np.tril(np.ones(sizes, np.float32))  # GPT-2's causal mask, which is no parameter
        return
    tile = _tile(_kind(name, dtype), seed)
    left, start = math.prod(sizes), zlib.crc32(name.encode()) % PERIOD
    while left:
        yield (part := tile[start : start + left])
        left, start = left - len(part), 0


def _kind(name: str, dtype: str) -> str:
    if dtype == "U8":
        return "scales" if name.endswith("_scales") else "blocks"
    leaf = name.rsplit(".", 2)[-2:]
    if leaf[-1] == "weight" and ("norm" in leaf[0] or leaf[0].startswith("ln_")):
        return f"scale {dtype}"
    return f"token {dtype}" if leaf[0] in ("wte", "embed_tokens") else f"matrix {dtype}"


@functools.lru_cache(maxsize=4)
def _tile(kind: str, seed: int) -> np.ndarray:
    """Returns PERIOD numbers of one kind."""
    draw = np.random.default_rng(seed)
    if kind == "blocks":
        return draw.integers(0, 256, PERIOD, np.uint8)
    if kind == "scales":
        return draw.integers(116, 124, PERIOD, np.uint8)  # powers of two from 2^-11 to 2^-4
    word, dtype = kind.split()
    numbers = draw.standard_normal(PERIOD, dtype=np.float32)
    numbers *= np.float32(TOKEN_STD if word == "token" else MATRIX_STD)
    if word == "scale":
        numbers += 1
    if dtype == "F32":
        return numbers
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half
