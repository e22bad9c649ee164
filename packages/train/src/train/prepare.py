"""Text to a data folder: `python -m train.prepare`, or `prepare(texts, out, tokenizer=...)`.

The last part of the text, by characters, is the validation split; texts that follow one another within a split are
separated by the tokenizer's end-of-text id, if it has one. Texts are gone through one at a time, once to count them and
once to write them.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from core import door, folders
from core.tokenizer import TOKENIZER_FILES, Tokenizer
from train.meta import META_FILE, DataError, Meta
from train.sources import DATASETS, Files, HubDataset, fetch

TOKEN_FILES = {"train": "train.bin", "val": "val.bin"}


def prepare(
    texts: Iterable[str],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    val_fraction: float = 0.1,
    source: str = "",
    overwrite: bool = False,
) -> Meta:
    """Writes the data folder `out` and returns what its meta.json says.

    `texts` is gone through twice; what can be gone through only once, a generator, is held in memory.

    Raises DataError when there is too little text, or when `out` exists and may not be replaced.
    """
    out = Path(out)
    _check_replaceable(out, overwrite=overwrite)
    if iter(texts) is texts:
        texts = list(texts)
    total = sum(map(len, texts))
    with folders.fresh(out) as partial:
        parts = divided(texts, _cut(total, val_fraction))
        return _write(partial, parts, tokenizer, source, total)


def split(texts: Iterable[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Cuts the last `val_fraction` of the characters off; the text that the cut falls into is cut in two.

    >>> split(["abcdef", "ghij"], 0.5)
    (['abcde'], ['f', 'ghij'])
    """
    texts = list(texts)
    parts = list(divided(texts, _cut(sum(map(len, texts)), val_fraction)))
    train, val = ([text for name, text in parts if name == wanted] for wanted in TOKEN_FILES)
    return train, val


def divided(texts: Iterable[str], cut: int) -> Iterator[tuple[str, str]]:
    """Yields each text with its split: "train" up to character number `cut` of all, "val" from there on.

    >>> list(divided(["abcdef", "", "ghij"], 5))
    [('train', 'abcde'), ('val', 'f'), ('val', 'ghij')]
    """
    start = 0
    for text in texts:
        parts = ("train", text[: max(0, cut - start)]), ("val", text[max(0, cut - start) :])
        yield from ((name, part) for name, part in parts if part)
        start += len(text)


def _cut(total: int, val_fraction: float) -> int:
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must lie between 0 and 1")
    return int(total * (1 - val_fraction))


def _write(
    folder: Path,
    parts: Iterator[tuple[str, str]],
    tokenizer: Tokenizer,
    source: str,
    total: int,
) -> Meta:
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    between = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    counts = dict.fromkeys(TOKEN_FILES, 0)
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context((folder / f).open("wb")) for s, f in TOKEN_FILES.items()}
        bar = stack.enter_context(tqdm(total=total, unit="char", unit_scale=True, disable=None))
        for name, text in parts:
            ids = (between if counts[name] else []) + tokenizer.encode(text)
            np.array(ids, dtype).tofile(files[name])
            counts[name] += len(ids)
            bar.update(len(text))
    if empty := [name for name, count in counts.items() if not count]:
        raise DataError(f"the {empty[0]} split is empty: the text is too short to be divided")
    meta = Meta(
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        train_tokens=counts["train"],
        val_tokens=counts["val"],
        source=source,
    )
    tokenizer.save(folder)
    (folder / META_FILE).write_text(json.dumps(meta.to_dict(), indent=2) + "\n")
    return meta


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuses an `out` whose content we may not remove."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: exists and is not a folder; choose another --out")
    ours = {META_FILE, *TOKEN_FILES.values(), *TOKENIZER_FILES}
    names = {path.name for path in out.iterdir()}
    if names - ours:
        raise DataError(
            f"{out}: holds other files ({', '.join(sorted(names - ours)[:3])}); choose another --out"
        )
    if names and not overwrite:
        raise DataError(f"{out}: exists already; pass --overwrite to write it again")


def open_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `--tokenizer` names: char, gpt2, or the one in a folder."""
    if name == "char":
        return _of_characters(set(itertools.chain.from_iterable(texts)))
    if name == "gpt2" and not Path(name).is_dir():
        folder = Path("models/gpt2")
        if not folder.is_dir():
            raise DataError(
                f"--tokenizer=gpt2 reads {folder}, which is missing; make it with: "
                f"python -m convert --model=gpt2 --out={folder}"
            )
        return Tokenizer.open(folder)
    return Tokenizer.open(name)


def _of_characters(characters: set[str]) -> Tokenizer:
    if not characters:
        raise DataError("there is no text: a vocabulary of characters needs some")
    halves = sorted(c for c in characters if "\ud800" <= c < "\ue000")
    if halves:
        raise DataError(f"the text has {halves[0]!a}, half of a pair and no character; remove it")
    return Tokenizer.characters("".join(characters))


def _define_flags() -> None:
    """Not at import: `prepare` is also for programs with flags of their own."""
    fetched = " and ".join(DATASETS)
    flags.DEFINE_string("dataset", None, f"A name for the data; {fetched} can be fetched by it.")
    flags.DEFINE_string(
        "text", None, "Files to prepare, a path or a quoted glob: text, .jsonl, .parquet."
    )
    flags.DEFINE_string("hf_dataset", None, "NAME[:CONFIG] that Hugging Face's datasets can load.")
    flags.DEFINE_string("hf_split", "train", "Which split of --hf_dataset; we divide it ourselves.")
    flags.DEFINE_string(
        "field", "text", "Where a row of JSON, Parquet or --hf_dataset has its text."
    )
    flags.DEFINE_string("out", None, "The data folder to write (default: data/DATASET).")
    flags.DEFINE_string(
        "tokenizer", None, "char, gpt2, or a folder with one (default: the dataset's, else gpt2)."
    )
    flags.DEFINE_float("val_fraction", 0.1, "Share of the characters held out at the end.")
    flags.DEFINE_bool("overwrite", False, "Replace the data folder if it is there.")


def main() -> None:
    options = flags.FLAGS
    dataset, given = options.dataset, options.text or options.hf_dataset
    if options.text and options.hf_dataset:
        raise door.Usage("give --text or --hf_dataset, not both")
    if not dataset and not (given and options.out):
        raise door.Usage("give --dataset=NAME, or --text=GLOB with --out=DIR")
    source = DATASETS.get(dataset or "")
    out = Path(options.out or f"data/{dataset}")
    _check_replaceable(out, overwrite=options.overwrite)
    if options.hf_dataset:
        texts = HubDataset(options.hf_dataset, options.hf_split, options.field)
    elif options.text:
        texts = Files(options.text, options.field)
        texts.paths()  # there are some, before a tokenizer is opened
    elif source is not None:
        texts = [fetch(source)]
    else:
        raise door.Usage(
            f"--dataset={dataset} is not one that can be fetched ({', '.join(DATASETS)}); "
            "give its text with --text=GLOB, or with --hf_dataset=NAME"
        )
    name = options.tokenizer or (source.tokenizer if source else "gpt2")
    meta = prepare(
        texts,
        out,
        tokenizer=open_tokenizer(name, texts),
        val_fraction=options.val_fraction,
        source=dataset or given or "",
        overwrite=options.overwrite,
    )
    sys.stdout.write(
        f"{out}: {meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens, "
        f"vocabulary {meta.vocab_size:,}\n"
    )


if __name__ == "__main__":
    _define_flags()
    door.run(main)
