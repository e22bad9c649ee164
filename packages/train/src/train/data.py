"""A data folder, and the batches drawn from it.

A data folder holds the ids of the splits "train" and "val" (`train.token_files`), what they mean (`train.meta`) and the
tokenizer that wrote them. Batches are a pure function of (seed, stream, step): nothing is remembered between draws, so
a resumed run seeks in O(1) and an evaluation cannot shift the training data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.tokenizer import Tokenizer, TokenizerError
from train import token_files
from train.meta import PICKLED_META_FILE, Meta, read_meta, read_pickled_characters
from train.meta import DataError as DataError
from train.sources import DATASETS
from train.token_files import GPT2_VOCAB_SIZE as GPT2_VOCAB_SIZE
from train.token_files import Tokens

SPLITS = ("train", "val")

# Which split a stream reads, and the number that keeps its draws apart from the others'.
STREAMS = {"train": ("train", 0), "eval_train": ("train", 1), "eval_val": ("val", 2)}

# Opening checks this many ids of a split at once; beyond it, each batch is checked as it is drawn.
SCANNED_TOKENS = 2**25


@dataclass(frozen=True)
class Dataset:
    """An opened data folder: its tokens are mapped, not read."""

    path: Path
    vocab_size: int
    tokens: Mapping[str, Tokens]
    tokenizer: Tokenizer | None

    def batch(
        self,
        stream: str,
        *,
        seed: int,
        step: int,
        rows: int,
        length: int,
        order: str = "random",
        chosen: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns `rows` windows of `length` ids, int32: the batch number `step` of `stream`.

        In `order` "random", windows start anywhere, with replacement, as in nanoGPT, and row r depends on (seed,
        stream, step, r) alone, whatever `rows` is. In "epoch", the windows that tile the split come once in each
        epoch, in an order of that epoch; row r of the step is number step * rows + r.

        `chosen` are the numbers of the rows to return; no others are read.
        """
        split, number = STREAMS[stream]
        tokens = self.tokens[split]
        if order == "random":
            draws = np.random.Generator(
                np.random.Philox(key=[seed, number], counter=[0, 0, 0, step])
            )
            # One 64-bit draw a row: scaling a double, unlike integers(), never rejects and redraws.
            starts = (draws.random(rows) * (len(tokens) - length + 1)).astype(np.int64)
        else:
            n = windows(len(tokens), length)
            epochs, places = np.divmod(np.int64(step) * rows + np.arange(rows), n)
            starts = shuffled(places, epochs, n, key=(seed, number)) * (length - 1)
        return self.read(split, starts if chosen is None else starts[chosen], length)

    def read(self, split: str, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns the windows of `length` ids that begin at `starts`, int32, after checking the ids."""
        batch_BS = self.tokens[split].take(starts[:, None] + np.arange(length))
        token_files.check_ids(batch_BS, self.vocab_size, self.path / f"{split}.bin")
        return batch_BS.astype(np.int32)


def bytes_per_token(dataset: Dataset, split: str) -> float | None:
    """Returns the mean bytes of text of a token of `split`, over the first SCANNED_TOKENS; the end of a text has none.

    None where no tokenizer says what they are.
    """
    tokenizer, counts_V = dataset.tokenizer, np.zeros(dataset.vocab_size, np.int64)
    if tokenizer is None:
        return None
    for _, ids in dataset.tokens[split].beginnings(SCANNED_TOKENS):
        counts_V += np.bincount(ids, minlength=len(counts_V))
    counts = {int(id_): int(counts_V[id_]) for id_ in np.flatnonzero(counts_V)}
    try:
        nbytes = sum(
            count * len(tokenizer.token_bytes(id_))
            for id_, count in counts.items()
            if id_ != tokenizer.eos_id
        )
    except TokenizerError:  # ids that the model has and the tokenizer has not
        return None
    return nbytes / sum(counts.values()) or None


def windows(count: int, length: int) -> int:
    """How many windows of `length` ids tile `count` ids; each begins with the last id of the one before.

    >>> windows(10, 4)
    3
    """
    return (count - 1) // (length - 1)


def shuffled(places: np.ndarray, epochs: np.ndarray, n: int, *, key: tuple[int, int]) -> np.ndarray:
    """Returns where the permutation of range(`n`) that belongs to (`key`, epoch) sends each place.

    A Feistel network on the next even power of two; a value beyond `n` is sent on until it is within (cycle walking),
    which takes less than four rounds on average. Nothing of size `n` is made.

    >>> sorted(shuffled(np.arange(5), np.zeros(5, int), 5, key=(1, 2)).tolist())
    [0, 1, 2, 3, 4]
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    seeds = np.uint64(key[0]) ^ _mixed(np.uint64(key[1]) ^ _mixed(epochs.astype(np.uint64)))

    def permuted(x: np.ndarray, seed: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for turn in range(6):
            left, right = (
                right,
                left ^ (_mixed(seed ^ _mixed(right + np.uint64(turn << 48))) & mask),
            )
        return (left << np.uint64(half)) | right

    found = permuted(places.astype(np.uint64), seeds)
    while (outside := found >= n).any():
        found[outside] = permuted(found[outside], seeds[outside])
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Returns the finaliser of splitmix64 (Steele et al. 2014), which leaves no bit of `x` where it was."""
    x = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def open_dataset(path: str | Path, *, block_size: int) -> Dataset:
    """Opens a data folder and refuses one that could not be trained on.

    What the ids are is said by meta.json, else by nanoGPT's meta.pkl, else by a tokenizer in the folder, else by the
    files' header (llm.c's); else they are what nanoGPT's openwebtext/prepare.py writes: uint16 ids of GPT-2's BPE.
    """
    path = Path(path)
    remedy = f"write it again with: {prepare_command(path)}"
    files = {split: token_files.find(path, split) for split in SPLITS}
    for split, found in files.items():
        if not found:
            missing = f"no {split}.bin in it" if path.is_dir() else "no such folder"
            raise DataError(f"{path}: {missing}; make it with: {prepare_command(path)}")
    meta, tokenizer = read_meta(path), Tokenizer.find(path)
    if meta is None and (path / PICKLED_META_FILE).is_file():
        tokenizer = read_pickled_characters(path / PICKLED_META_FILE)
    is_wide = tokenizer is not None and tokenizer.vocab_size > 2**16
    kind = meta.dtype if meta else "uint32" if is_wide else "uint16"
    tokens = {
        split: token_files.open_tokens(found, kind, may_have_header=meta is None, remedy=remedy)
        for split, found in files.items()
    }
    if meta and tokenizer and meta.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"{path}: meta.json says a vocabulary of {meta.vocab_size}, the tokenizer beside it has "
            f"{tokenizer.vocab_size}; {remedy}"
        )
    vocab_size = _vocab_size(meta, tokenizer, tokens["train"])
    for split in SPLITS:
        _check_split(path, split, tokens[split], meta, vocab_size, block_size)
    return Dataset(path, vocab_size, tokens, tokenizer)


def prepare_command(path: Path) -> str:
    """The command that makes the data folder `path`."""
    text = "" if path.name in DATASETS else " --text='GLOB'"
    return f"python -m train.prepare --dataset={path.name}{text} --out={path}"


def _vocab_size(meta: Meta | None, tokenizer: Tokenizer | None, tokens: Tokens) -> int:
    if meta is not None:
        return meta.vocab_size
    if tokenizer is not None:
        return tokenizer.vocab_size
    return tokens.vocab_size or GPT2_VOCAB_SIZE


def _check_split(
    path: Path, split: str, tokens: Tokens, meta: Meta | None, vocab_size: int, block_size: int
) -> None:
    count = len(tokens)
    where = tokens.files[0] if len(tokens.files) == 1 else path / f"*{split}*.bin"
    if meta and count != (expected := getattr(meta, f"{split}_tokens")):
        raise DataError(
            f"{where}: holds {count:,} tokens, meta.json says {expected:,}; "
            f"write it again with: {prepare_command(path)}"
        )
    if count < block_size + 1:
        raise DataError(
            f"{where}: {count:,} tokens, but block_size={block_size} needs at least "
            f"{block_size + 1:,}; lower block_size or prepare more text"
        )
    for file, ids in tokens.beginnings(SCANNED_TOKENS):
        token_files.check_ids(ids, vocab_size, file)
