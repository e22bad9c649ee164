"""A model's parameters as tensors of a GGUF file: renamed, turned, encoded, and written in parts.

A row says where a parameter goes, its layout reads as in `convert.mapping`: the stored axes, then ours. Where it has
two names, the tensor is stored as two, the halves of the first of its stored axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import IO, cast

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType

from convert import importer
from convert.errors import ConvertError
from core import axes, checkpoint
from core.checkpoint import ModelFolder

TYPES = {"keep": None, "f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_KEPT = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}
_FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Kind.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
}
_PART_BYTES = 4 * 2**20  # encoding takes several times as much


@dataclasses.dataclass(frozen=True)
class Row:
    """`names` are the tensors that parameter `target` becomes, its axes as the left side of `layout`; {L} is a layer.

    `packed` is the layout of the blocks and that of the scales of a parameter that may be stored as MXFP4. A `plain`
    row is no matrix for llama.cpp, whatever its rank: it is F32.
    """

    names: tuple[str, ...]
    target: str
    layout: str
    packed: tuple[str, str] | None = None
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of the file. `parts` gives its encoded parts, and for each how many bytes the folder has of it."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    parts: Callable[[], Iterator[tuple[np.ndarray, int]]]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def plan(rows: Sequence[Row], folder: ModelFolder, type: str) -> tuple[list[Stored], list[str]]:
    """Returns the tensors of the file in its order, and what to say about them; nothing is read yet."""
    if type not in TYPES:
        raise ConvertError(f"type {type!r} is not one of {', '.join(TYPES)}")
    wanted, stored, ragged = TYPES[type], [], []
    for row in rows:
        if row.packed is not None and f"{row.target}.blocks" in folder.tensors:
            stored += _packed(row, row.packed, folder)
            continue
        tensors = list(_dense(row, folder, wanted))
        stored += tensors
        if wanted == Kind.Q8_0 and not row.plain:
            ragged += [tensor for tensor in tensors if tensor.shape[1:] and tensor.kind != wanted]
    if not ragged:
        return stored, []
    return stored, [
        f"{len(ragged)} matrices are stored as they were: q8_0 takes rows of a multiple of 32 numbers, "
        f"and those of {ragged[0].name} have {ragged[0].shape[-1]}"
    ]


def file_type(stored: Sequence[Stored]) -> LlamaFileType:
    """Returns the type that most of the bytes have."""
    nbytes = dict.fromkeys(_FILE_TYPES, 0)
    for tensor in stored:
        nbytes[tensor.kind] += tensor.nbytes
    return _FILE_TYPES[max(nbytes, key=lambda kind: nbytes[kind])]


def write(
    writer: gguf.GGUFWriter, stored: Sequence[Stored], on_bytes: Callable[[int], None]
) -> None:
    """Writes the header, the metadata that `writer` has been told, and the tensors."""
    for tensor in stored:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in stored:
        # The writer asks of an array its size, and to write itself; its own lazy arrays are just as little arrays.
        writer.write_tensor_data(cast(np.ndarray, _Stream(tensor, on_bytes)))


@dataclasses.dataclass(frozen=True)
class _Stream:
    tensor: Stored
    on_bytes: Callable[[int], None]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def tofile(self, file: IO[bytes]) -> None:
        for part, taken in self.tensor.parts():
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            self.on_bytes(taken)


def _dense(row: Row, folder: ModelFolder, wanted: Kind | None) -> Iterator[Stored]:
    is_there = row.target in folder.tensors
    turned = _turned(row.target, row.layout, folder)
    for name, array in zip(row.names, turned if len(row.names) > 1 else [turned], strict=True):
        kind = _KEPT[array.dtype.name]
        if row.plain or array.ndim == 1:
            kind = Kind.F32
        elif wanted is not None and (wanted != Kind.Q8_0 or array.shape[-1] % 32 == 0):
            kind = wanted
        parts = functools.partial(_encoded, name, array, kind, is_there=is_there)
        yield Stored(name, array.shape, kind, parts)


def _packed(row: Row, layouts: tuple[str, str], folder: ModelFolder) -> Iterator[Stored]:
    blocks, scales = (
        _turned(f"{row.target}.{part}", layout, folder)
        for part, layout in zip(("blocks", "scales"), layouts, strict=True)
    )
    if len(row.names) == 1:
        blocks, scales = blocks[np.newaxis], scales[np.newaxis]
    for name, b, s in zip(row.names, blocks, scales, strict=True):
        shape = (*s.shape[:-1], s.shape[-1] * 32)
        yield Stored(name, shape, Kind.MXFP4, functools.partial(_repacked, name, b, s))


def _turned(target: str, layout: str, folder: ModelFolder) -> np.ndarray:
    """Returns a view of a parameter in the stored order of axes, zeros for a bias that the model lacks."""
    sizes = folder.config.axes
    if target not in folder.tensors:
        shape = axes.shape(layout.partition(" -> ")[0], sizes)
        return np.broadcast_to(np.zeros((), np.float32), shape)
    return axes.relayout(folder.tensors[target], axes.inverse(layout), sizes)


def _encoded(
    name: str, array: np.ndarray, kind: Kind, *, is_there: bool
) -> Iterator[tuple[np.ndarray, int]]:
    for part in checkpoint.parts(array, _PART_BYTES):
        yield _encode(name, part, kind), part.nbytes if is_there else 0


def _encode(name: str, part: np.ndarray, kind: Kind) -> np.ndarray:
    if kind != Kind.Q8_0:
        dtype = next(dtype for dtype, kept in _KEPT.items() if kept == kind)
        return importer.cast(part, dtype, name)
    numbers = part.astype(np.float32)
    # A block is its scale, in float16, and 32 bytes.
    if not (largest := float(np.abs(numbers).max())) <= 127 * float(np.finfo(np.float16).max):
        raise ConvertError(f"{name}: {largest:.6g} does not fit in q8_0; choose f32 or bf16")
    return gguf.quants.quantize(numbers, kind)


def _repacked(
    name: str, blocks: np.ndarray, scales: np.ndarray
) -> Iterator[tuple[np.ndarray, int]]:
    for blocks_of_expert, scales_of_expert in zip(blocks, scales, strict=True):
        if (scales_of_expert == 255).any():
            raise ConvertError(f"{name}: a scale is 255, which is no number; the source is damaged")
        taken = blocks_of_expert.nbytes + scales_of_expert.nbytes
        yield repack_mxfp4(blocks_of_expert, scales_of_expert), taken


def repack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns GGML's blocks of 17 bytes: the scale, then numbers 0-15 in the low halves of 16 bytes, 16-31 in the high.

    A checkpoint's bytes [..., 16] hold neighbours, 2i low and 2i + 1 high. The four bits of a number are the same.
    """
    first, second = blocks[..., :8], blocks[..., 8:]
    result = np.empty((*scales.shape, 17), np.uint8)
    result[..., 0] = scales
    result[..., 1::2] = (first & 15) | (second << 4)
    result[..., 2::2] = (first >> 4) | (second & 0xF0)
    return result
