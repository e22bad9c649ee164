"""Reads nanoGPT's `ckpt.pt`: the model's arguments and its state dict; the optimizer's state is never touched.

The characters of a character model are not in it. They are in its dataset's `meta.pkl`, which is read where it lies
beside the checkpoint, or in the data folder of the repository that the checkpoint's folder lies in.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import unpickle
from convert.errors import ConvertError
from convert.sources import Source, companions, torch_zip
from convert.tables.nanogpt import BPE_SIZE, PADDED_SIZE

CHECKPOINT = "ckpt.pt"
META = "meta.pkl"
EXPECTED = f"nanoGPT's {CHECKPOINT}, or its folder"


def recognizes(path: Path) -> bool:
    """Tells whether a checkpoint of nanoGPT lies at `path`: in a folder by its name, as a file by its content."""
    if path.is_dir():
        return torch_zip.is_torch(path / CHECKPOINT)
    if not torch_zip.is_torch(path):
        return False
    try:
        value, _ = torch_zip.load(path)
    except (ConvertError, OSError):
        return False
    return _is_checkpoint(value)


def open(path: Path) -> Source:
    """Opens a checkpoint with the tokenizer that lies beside it, or the one that its dataset's characters make."""
    file = path / CHECKPOINT if path.is_dir() else path
    value, places = torch_zip.load(file)
    if not _is_checkpoint(value):
        raise ConvertError(
            f"{file}: not nanoGPT's, which holds a dict with 'model' and 'model_args'; "
            "a state dict alone needs a config.json beside it"
        )
    args = value["model_args"]
    tokenizer, files, notes = _tokenizer(file, args, value.get("config"))
    return Source(
        path=path,
        format="nanogpt",
        config={"model_args": args},
        tensors=torch_zip.state_dict(file, value["model"], places),
        files=(file, *files),
        companions=tokenizer,
        notes=notes,
    )


def characters(path: Path) -> tuple[str, ...]:
    """Returns the characters of a `meta.pkl`, each at its id.

    Raises:
      ConvertError: it holds anything else.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    meta = unpickle.load(buffer, where=path)
    itos = meta.get("itos") if type(meta) is dict else None
    if type(itos) is not dict or sorted(map(str, itos)) != sorted(map(str, range(len(itos)))):
        raise ConvertError(f"{path}: no 'itos' that gives every id from 0 on its character")
    found: tuple[Any, ...] = tuple(itos.get(id_) for id_ in range(len(itos)))
    strange = [c for c in found if type(c) is not str or len(c) != 1 or "\ud800" <= c <= "\udfff"]
    if strange or len(set(found)) != len(found):
        what = f"{str(strange[0])[:40]!r} is no character" if strange else "a character twice"
        raise ConvertError(
            f"{path}: {what}; only the tokenizer of a character dataset is understood: move it away, "
            "and put a tokenizer.json beside the checkpoint if there is one"
        )
    return found


def _is_checkpoint(value: Any) -> bool:
    return type(value) is dict and type(value.get("model")) is dict and "model_args" in value


def _tokenizer(
    file: Path, args: Any, config: Any
) -> tuple[Mapping[str, Path | bytes], tuple[Path, ...], tuple[str, ...]]:
    """Returns the tokenizer's files, what they were made from, and what the user must hear."""
    vocab_size = args.get("vocab_size") if type(args) is dict else None
    beside, meta = companions(file.parent), _meta(file, config)
    notes = ()
    if vocab_size == PADDED_SIZE:
        notes = (
            f"rows {BPE_SIZE} to {PADDED_SIZE - 1} of wte are padding, which training never saw; they are kept",
        )
    if "tokenizer.json" in beside or "vocab.json" in beside:
        return beside, (), notes
    if meta is not None:
        return {**beside, **_character_files(file, meta, vocab_size)}, (meta,), notes
    needed = "the dataset's meta.pkl"
    if vocab_size in (BPE_SIZE, PADDED_SIZE):
        needed = "GPT-2's tokenizer.json (or vocab.json and merges.txt)"
    return beside, (), (*notes, f"no tokenizer: put {needed} beside {file.name} and convert again")


def _character_files(file: Path, meta: Path, vocab_size: Any) -> Mapping[str, bytes]:
    from core.tokenizer import Tokenizer

    found = characters(meta)
    if len(found) != vocab_size:
        raise ConvertError(
            f"{meta}: {len(found)} characters, but {file.name} has a vocabulary of {str(vocab_size)[:40]}; "
            "it belongs to another dataset: move it away"
        )
    return Tokenizer.of_characters(found).files()


def _meta(file: Path, config: Any) -> Path | None:
    """Returns the meta.pkl of a checkpoint, if there is one: beside it, or in data/DATASET of the same repository."""
    places = [file.parent / META]
    dataset = config.get("dataset") if type(config) is dict else None
    if type(dataset) is str and dataset not in ("", ".", "..") and Path(dataset).name == dataset:
        data = [folder / "data" / dataset for folder in (file.parent, file.resolve().parent.parent)]
        places += [folder / META for folder in data]
    return next((place for place in places if _is_file(place)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (ValueError, OSError):  # a name that no file can have
        return False
