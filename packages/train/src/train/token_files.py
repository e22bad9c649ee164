"""Files of token ids: nanoGPT's (ids and nothing else) and llm.c's (a header first), alone or as the shards of a split.

The shards of a split are one sequence, in the order of their names; numbers in names count as numbers.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.meta import DataError

GPT2_VOCAB_SIZE = 50257

# llm.c, dev/data/data_common.py: 256 int32, of which the first three are magic, version and the number of tokens.
HEADER_BYTES = 4 * 256


@dataclass(frozen=True)
class _Format:
    version: int
    dtype: str
    vocab_size: int


# Neither magic is two tokens of GPT-2's (their lower halves are above 50,256), nor one of any vocabulary.
_LLMC = {20240520: _Format(1, "uint16", GPT2_VOCAB_SIZE), 20240801: _Format(7, "uint32", 128_256)}


@dataclass(frozen=True)
class Tokens:
    """A split: the ids of its files, one after the other, mapped and not read."""

    files: tuple[Path, ...]
    parts: tuple[np.ndarray, ...]
    vocab_size: int | None
    """What the files' header implies; None without one."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, index: np.ndarray) -> np.ndarray:
        """Returns the ids at the places `index`, in the files' own unsigned type."""
        if len(self.parts) == 1:
            return self.parts[0][index]
        ends = np.cumsum([len(part) for part in self.parts])
        which = np.searchsorted(ends, index, side="right")
        found = np.empty(index.shape, self.parts[0].dtype)
        for number in np.unique(which):
            start = ends[number] - len(self.parts[number])
            found[which == number] = self.parts[number][index[which == number] - start]
        return found

    def __getitem__(self, place: slice) -> np.ndarray:
        return self.take(np.arange(*place.indices(len(self))))

    def beginnings(self, count: int) -> Iterator[tuple[Path, np.ndarray]]:
        """Yields the first `count` ids, file by file."""
        for file, part in zip(self.files, self.parts, strict=True):
            yield file, part[: max(count, 0)]
            count -= len(part)


def find(folder: Path, split: str) -> list[Path]:
    """Returns the files of a split: SPLIT.bin, or the shards *SPLIT*.bin; none if there are none.

    Raises:
      DataError: SPLIT.bin and shards are there, and which is meant cannot be told.
    """
    single, shards = folder / f"{split}.bin", sorted(folder.glob(f"*{split}*.bin"), key=_natural)
    if single in shards and len(shards) > 1:
        other = next(shard for shard in shards if shard != single)
        raise DataError(
            f"{folder}: has {single.name} and {other.name}; keep one file or the shards, not both"
        )
    return [shard for shard in shards if shard.is_file()]


def open_tokens(files: Sequence[Path], dtype: str, *, may_have_header: bool, remedy: str) -> Tokens:
    """Maps `files` as one sequence of ids of type `dtype`, unless they have llm.c's header, which says it itself.

    Raises:
      DataError: a file is empty, truncated or of another type than the first; ends with the `remedy`.
    """
    opened = [_map(file, dtype, may_have_header, remedy) for file in files]
    types = {str(part.dtype): file for file, (part, _) in zip(files, opened, strict=True)}
    if len(types) > 1:
        found = ", ".join(f"{file.name} is {name}" for name, file in types.items())
        raise DataError(f"{files[0].parent}: shards of different types ({found})")
    sizes = {size for _, size in opened}
    return Tokens(tuple(files), tuple(part for part, _ in opened), sizes.pop())


def check_ids(ids: np.ndarray, vocab_size: int, where: Path) -> None:
    """Raises DataError if one of `ids` is outside the vocabulary."""
    if ids.size and (highest := int(ids.max())) >= vocab_size:
        raise DataError(
            f"{where}: token id {highest} is outside the vocabulary of {vocab_size}; "
            f"the file is corrupt, or its meta.json belongs to another"
        )


def _map(
    file: Path, dtype: str, may_have_header: bool, remedy: str
) -> tuple[np.ndarray, int | None]:
    size = file.stat().st_size
    if size == 0:
        raise DataError(f"{file}: empty; {remedy}")
    known = _LLMC.get(int.from_bytes(_start(file, 4), "little"))
    if known and may_have_header:
        return _map_llmc(file, known, size, remedy), known.vocab_size
    kind = np.dtype(dtype)
    count, rest = divmod(size, kind.itemsize)
    if rest:
        raise DataError(
            f"{file}: {size:,} bytes are not a whole number of {kind} tokens: {count:,} and "
            f"{rest} byte{'s' * (rest > 1)} over; the file is truncated. {remedy}"
        )
    return np.memmap(file, kind, "r"), None


def _map_llmc(file: Path, known: _Format, size: int, remedy: str) -> np.ndarray:
    if size < HEADER_BYTES:
        raise DataError(
            f"{file}: {size:,} bytes, but llm.c's header alone has {HEADER_BYTES:,}; truncated. {remedy}"
        )
    version, stated = np.frombuffer(_start(file, 12), "<i4")[1:].tolist()
    kind = np.dtype(known.dtype)
    if version != known.version:
        raise DataError(f"{file}: version {version} of llm.c's header; {known.version} is known")
    if stated < 1 or size != HEADER_BYTES + stated * kind.itemsize:
        raise DataError(
            f"{file}: {size:,} bytes, but its header says {stated:,} tokens: {HEADER_BYTES:,} + "
            f"{kind.itemsize} x {stated:,} = {HEADER_BYTES + stated * kind.itemsize:,}; truncated. {remedy}"
        )
    return np.memmap(file, kind, "r", offset=HEADER_BYTES)


def _start(file: Path, count: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(count)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Orders shard_9 before shard_10."""
    words = re.split(r"(\d+)", path.name)
    return [(int(w), "") if w.isdecimal() else (-1, w) for w in words], path.name
