"""What the ids of a data folder mean: our meta.json, or nanoGPT's meta.pkl, which is read without its power.

A pickle is a program. nanoGPT's holds a size and two dictionaries, for which a dozen opcodes suffice: any other is
refused before Python's unpickler sees the file, and so is a name to import.
"""

import dataclasses
import io
import json
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from core.errors import FlaxmillError
from core.tokenizer import Tokenizer

META_FILE = "meta.json"
PICKLED_META_FILE = "meta.pkl"
MOST_BYTES = 4 * 2**20
"""Of either file: a dictionary of 100,000 characters, with room to spare."""

MOST_TOKENS = 2**22
"""Of a vocabulary, whose size decides how large a model is made: 16 times the largest that is known."""

_PLAIN_OPCODES = frozenset(
    """
    PROTO FRAME MARK STOP EMPTY_DICT SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    BININT BININT1 BININT2 BINUNICODE SHORT_BINUNICODE
    """.split()
)


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
        for field in dataclasses.fields(cls):
            if type(value := getattr(meta, field.name)) is not field.type:
                raise DataError(f"{path}: {field.name} is {value!r}, expected {field.type}")
        if meta.dtype not in ("uint16", "uint32"):
            raise DataError(f"{path}: dtype {meta.dtype!r}, expected uint16 or uint32")
        if not 0 < meta.vocab_size <= MOST_TOKENS:
            raise DataError(f"{path}: vocab_size {meta.vocab_size}, expected 1 to {MOST_TOKENS:,}")
        return meta

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_meta(folder: Path) -> Meta | None:
    """Returns what meta.json in `folder` says, or None where there is none."""
    file = folder / META_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{file}: not a data folder's meta.json (a {type(values).__name__})")
    return Meta.from_dict(values, path=file)


def read_pickled_characters(file: Path) -> Tokenizer:
    """Returns the tokenizer of a character vocabulary that nanoGPT's prepare.py pickled.

    Raises:
      DataError: anything else than its `vocab_size` and its `itos`, a character for every id.
    """
    meta = _unpickle_plain(file)
    characters = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(characters, dict) or not characters:
        raise DataError(
            f"{file}: no dictionary `itos` in it; nanoGPT's has the character of each id"
        )
    try:
        in_order = [characters[id_] for id_ in range(len(characters))]
    except KeyError as error:
        raise DataError(
            f"{file}: `itos` has {len(characters)} entries, none for id {error}"
        ) from error
    if not all(
        isinstance(c, str) and len(c) == 1 and not "\ud800" <= c < "\ue000" for c in in_order
    ):
        raise DataError(f"{file}: an entry of `itos` is not one character; prepare the text again")
    if len(set(in_order)) < len(in_order) or meta.get("vocab_size") != len(in_order):
        raise DataError(
            f"{file}: {len(set(in_order))} different characters for {len(in_order)} ids, "
            f"vocab_size {meta.get('vocab_size')!r}; expected the same number three times"
        )
    return Tokenizer.of_characters(in_order)


class _NothingImported(pickle.Unpickler):
    """The opcodes have been looked at; this is the second lock on the same door."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def _unpickle_plain(file: Path) -> Any:
    data = _read(file)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if opcode.name not in _PLAIN_OPCODES:
                raise DataError(
                    f"{file}: opcode {opcode.name} at byte {position}; a vocabulary needs no such "
                    "thing, and it could run code. Prepare the text again, or write a meta.json"
                )
            # Python's unpickler makes room for the number that is stated, whatever it is.
            if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > count:
                raise DataError(f"{file}: memo {argument} at byte {position}; the file is corrupt")
        return _NothingImported(io.BytesIO(data)).load()
    except DataError:
        raise
    except Exception as error:  # both raise whatever a damaged pickle makes them stumble over
        raise DataError(f"{file}: not a pickle of nanoGPT's ({error})") from error


def _read(file: Path) -> bytes:
    if (size := file.stat().st_size) > MOST_BYTES:
        raise DataError(f"{file}: {size:,} bytes, more than the {MOST_BYTES:,} that can be meant")
    return file.read_bytes()
