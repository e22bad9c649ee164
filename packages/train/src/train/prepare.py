"""Text to a data folder: `python -m train.prepare`, or `prepare(texts, out, tokenizer=...)`.

The last part of the text, by characters, is the validation split; texts that follow one another within a split are
separated by the tokenizer's end-of-text id, if it has one.
"""

import glob
import hashlib
import http.client
import itertools
import json
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from core import door, folders
from core.tokenizer import TOKENIZER_FILES, Tokenizer
from train.data import META_FILE, TOKEN_FILES, DataError, Meta


@dataclass(frozen=True)
class Source:
    """A text that can be fetched by name."""

    url: str
    sha256: str
    tokenizer: str


_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DATASETS = {
    "shakespeare_char": Source(_SHAKESPEARE_URL, _SHAKESPEARE_SHA256, tokenizer="char"),
    "shakespeare": Source(_SHAKESPEARE_URL, _SHAKESPEARE_SHA256, tokenizer="gpt2"),
}


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

    Raises DataError when there is too little text, or when `out` exists and may not be replaced.
    """
    out = Path(out)
    _check_replaceable(out, overwrite=overwrite)
    train, val = split(list(texts), val_fraction)
    with folders.fresh(out) as partial:
        return _write(partial, {"train": train, "val": val}, tokenizer, source)


def split(texts: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Cuts the last `val_fraction` of the characters off; the text that the cut falls into is cut in two.

    >>> split(["abcdef", "ghij"], 0.5)
    (['abcde'], ['f', 'ghij'])
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must lie between 0 and 1")
    cut = int(sum(map(len, texts)) * (1 - val_fraction))
    ends = list(itertools.accumulate(map(len, texts), initial=0))
    train = [text[: cut - start] for text, start in zip(texts, ends, strict=False) if start < cut]
    val = [text[max(0, cut - start) :] for text, start in zip(texts, ends, strict=False)]
    return list(filter(None, train)), list(filter(None, val))


def _write(folder: Path, splits: dict[str, list[str]], tokenizer: Tokenizer, source: str) -> Meta:
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    counts = {}
    for name, texts in splits.items():
        counts[name] = _write_tokens(folder / TOKEN_FILES[name], texts, tokenizer, dtype)
        if not counts[name]:
            raise DataError(f"the {name} split is empty: the text is too short to be divided")
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


def _write_tokens(path: Path, texts: list[str], tokenizer: Tokenizer, dtype: np.dtype) -> int:
    count = 0
    with path.open("wb") as file:
        for ids in tqdm(
            _encode(texts, tokenizer), path.name, len(texts), unit="text", disable=None
        ):
            np.array(ids, dtype).tofile(file)
            count += len(ids)
    return count


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    between = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for i, text in enumerate(texts):
        yield (between if i else []) + tokenizer.encode(text)


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


def read_texts(pattern: str) -> list[str]:
    """Returns the files that match `pattern`, in the order of their names."""
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())  # noqa: PTH207 - absolute patterns too
    if not paths:
        raise DataError(f"--text={pattern}: no such file")
    return [_read(Path(path)) for path in paths]


def _read(path: Path) -> str:
    try:
        # Bytes first: read_text would turn \r\n into \n, and the corpus is what it is.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start:,}") from error


def fetch(source: Source) -> str:
    """Downloads a named text and checks that it is the one that was meant."""
    try:
        with urllib.request.urlopen(source.url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # a cut connection is no OSError
        reason = getattr(error, "reason", error)
        raise DataError(
            f"cannot fetch {source.url} ({reason}); download it elsewhere and pass it with --text=FILE"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != source.sha256:
        raise DataError(f"{source.url}: sha256 {found}, expected {source.sha256}")
    return content.decode("utf-8")


def open_tokenizer(name: str, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer that `--tokenizer` names: char, gpt2, or the one in a folder."""
    if name == "char":
        return Tokenizer.characters("".join(texts))
    if name == "gpt2" and not Path(name).is_dir():
        folder = Path("models/gpt2")
        if not folder.is_dir():
            raise DataError(
                f"--tokenizer=gpt2 reads {folder}, which is missing; make it with: "
                f"python -m convert --model=gpt2 --out={folder}"
            )
        return Tokenizer.open(folder)
    return Tokenizer.open(name)


def _define_flags() -> None:
    """Not at import: `prepare` is also for programs with flags of their own."""
    fetched = " and ".join(DATASETS)
    flags.DEFINE_string("dataset", None, f"A name for the data; {fetched} can be fetched by it.")
    flags.DEFINE_string("text", None, "Text files to prepare: a path or a quoted glob.")
    flags.DEFINE_string("out", None, "The data folder to write (default: data/DATASET).")
    flags.DEFINE_string(
        "tokenizer", None, "char, gpt2, or a folder with one (default: the dataset's, else gpt2)."
    )
    flags.DEFINE_float("val_fraction", 0.1, "Share of the characters held out at the end.")
    flags.DEFINE_bool("overwrite", False, "Replace the data folder if it is there.")


def main() -> None:
    options = flags.FLAGS
    dataset, pattern = options.dataset, options.text
    if dataset is None and (pattern is None or options.out is None):
        raise door.Usage("give --dataset=NAME, or --text=GLOB with --out=DIR")
    source = DATASETS.get(dataset or "")
    out = Path(options.out or f"data/{dataset}")
    _check_replaceable(out, overwrite=options.overwrite)
    if pattern is not None:
        texts = read_texts(pattern)
    elif source is not None:
        texts = [fetch(source)]
    else:
        raise door.Usage(
            f"--dataset={dataset} is not one that can be fetched ({', '.join(DATASETS)}); "
            "give its text with --text=GLOB"
        )
    name = options.tokenizer or (source.tokenizer if source else "gpt2")
    meta = prepare(
        texts,
        out,
        tokenizer=open_tokenizer(name, texts),
        val_fraction=options.val_fraction,
        source=dataset or pattern or "",
        overwrite=options.overwrite,
    )
    sys.stdout.write(
        f"{out}: {meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens, "
        f"vocabulary {meta.vocab_size:,}\n"
    )


if __name__ == "__main__":
    _define_flags()
    door.run(main)
