"""Token files on disk and the batches drawn from them.

A data folder holds `train.bin` and `val.bin` (token ids one after the other, no header: nanoGPT's format), `meta.json`,
and the tokenizer that wrote them. Batches are a pure function of (seed, stream, step): nothing is remembered between
draws, so a resumed run seeks in O(1) and an evaluation cannot shift the training data.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from core.errors import FlaxmillError
from core.tokenizer import Tokenizer

GPT2_VOCAB_SIZE = 50257
META_FILE = "meta.json"
TOKEN_FILES = {"train": "train.bin", "val": "val.bin"}

# Which file a stream reads, and the number that keeps its draws apart from the others'.
STREAMS = {"train": ("train", 0), "eval_train": ("train", 1), "eval_val": ("val", 2)}

# Opening checks this many ids of a file at once; beyond it, each batch is checked as it is drawn.
SCANNED_TOKENS = 2**25


class DataError(FlaxmillError):
    """A data folder that is missing, incomplete or corrupt; says which command makes a good one."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What meta.json says about the token files beside it."""

    vocab_size: int
    dtype: str
    train_tokens: int
    val_tokens: int
    source: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: Path) -> Self:
        try:
            meta = cls(**values)
        except TypeError as error:
            raise DataError(f"{path}: not a data folder's meta.json ({error})") from error
        if meta.dtype not in ("uint16", "uint32"):
            raise DataError(f"{path}: dtype {meta.dtype!r}, expected uint16 or uint32")
        return meta

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Dataset:
    """An opened data folder: its tokens are mapped, not read."""

    path: Path
    vocab_size: int
    tokens: Mapping[str, np.ndarray]
    tokenizer: Tokenizer | None

    def batch(self, stream: str, *, seed: int, step: int, rows: int, length: int) -> np.ndarray:
        """Returns `rows` windows of `length` ids, int32: the batch number `step` of `stream`.

        Row r depends on (seed, stream, step, r) alone, whatever `rows` is.
        """
        split, number = STREAMS[stream]
        tokens = self.tokens[split]
        draws = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, step]))
        # One 64-bit draw a row: scaling a double, unlike integers(), never rejects and redraws.
        starts = (draws.random(rows) * (len(tokens) - length + 1)).astype(np.int64)
        batch_BS = tokens[starts[:, None] + np.arange(length)].astype(np.int32)
        _check_ids(batch_BS, self.vocab_size, self.path / TOKEN_FILES[split])
        return batch_BS


def open_dataset(path: str | Path, *, block_size: int) -> Dataset:
    """Opens a data folder and refuses one that could not be trained on.

    A folder without meta.json is taken for what nanoGPT's openwebtext/prepare.py writes: uint16 ids of GPT-2's BPE.
    """
    path = Path(path)
    for name in TOKEN_FILES.values():
        if not (path / name).is_file():
            missing = f"no {name} in it" if path.is_dir() else "no such folder"
            raise DataError(f"{path}: {missing}; make it with: {prepare_command(path)}")
    meta = _read_meta(path)
    vocab_size = meta.vocab_size if meta else GPT2_VOCAB_SIZE
    tokens = {split: _map_tokens(path / file, meta) for split, file in TOKEN_FILES.items()}
    for split, file in TOKEN_FILES.items():
        count = len(tokens[split])
        if meta and count != (expected := getattr(meta, f"{split}_tokens")):
            raise DataError(
                f"{path / file}: holds {count:,} tokens, meta.json says {expected:,}; "
                f"write it again with: {prepare_command(path)}"
            )
        if count < block_size + 1:
            raise DataError(
                f"{path / file}: {count:,} tokens, but block_size={block_size} needs at least "
                f"{block_size + 1:,}; lower block_size or prepare more text"
            )
        _check_ids(tokens[split][:SCANNED_TOKENS], vocab_size, path / file)
    return Dataset(path, vocab_size, tokens, Tokenizer.find(path))


def prepare_command(path: Path) -> str:
    """The command that makes the data folder `path`."""
    from train.prepare import DATASETS

    text = "" if path.name in DATASETS else " --text='GLOB'"
    return f"python -m train.prepare --dataset={path.name}{text} --out={path}"


def _read_meta(path: Path) -> Meta | None:
    file = path / META_FILE
    if file.is_file():
        try:
            values = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(f"{file}: not JSON ({error})") from error
        return Meta.from_dict(values, path=file)
    if (path / "meta.pkl").exists():
        raise DataError(
            f"{path}: has nanoGPT's meta.pkl but no meta.json, and unpickling runs code; "
            f"prepare the text again with: {prepare_command(path)}"
        )
    return None


def _map_tokens(file: Path, meta: Meta | None) -> np.ndarray:
    dtype = np.dtype(meta.dtype if meta else "uint16")
    size = file.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise DataError(
            f"{file}: {size:,} bytes are not a whole number of {dtype} tokens; the file is truncated"
        )
    return np.memmap(file, dtype=dtype, mode="r")


def _check_ids(tokens: np.ndarray, vocab_size: int, file: Path) -> None:
    if (highest := int(tokens.max())) >= vocab_size:
        raise DataError(
            f"{file}: token id {highest} is outside the vocabulary of {vocab_size}; "
            f"the file is corrupt, or its meta.json belongs to another"
        )
