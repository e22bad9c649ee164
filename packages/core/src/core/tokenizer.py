"""Text to token ids and back, through the `tokenizers` library.

One class serves GPT-2's byte-level BPE, character vocabularies and plain bytes: each is a `tokenizer.json`, so each
travels with a model folder and opens in transformers. Decoding can go token by token: `stream` holds back the bytes of
an unfinished UTF-8 character, so that what it prints never has to be taken back.
"""

import codecs
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from core.errors import TokenizerError as TokenizerError

END_OF_TEXT = "<|endoftext|>"

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""The files that make up a tokenizer; a conversion copies those that are there."""

GENERATION_CONFIG = "generation_config.json"
"""Names the tokens that end a text, beside what else transformers' sampling loop is told."""


class Tokenizer:
    """A vocabulary with its encoding and decoding; immutable and safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str | None = END_OF_TEXT):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._eos = eos if eos is not None and backend.token_to_id(eos) is not None else None

    @classmethod
    def open(cls, folder: str | Path) -> "Tokenizer":
        """Opens the tokenizer of a model folder: tokenizer.json, else vocab.json with merges.txt.

        The token that ends a text is tokenizer_config.json's, else special_tokens_map.json's, else GPT-2's. A
        tokenizer.json holds all tokens itself; to the other two files, added_tokens.json and special_tokens_map.json
        add theirs.

        Raises:
          TokenizerError: neither is there, a file does not parse, or an added token cannot have its id.
        """
        folder = Path(folder)
        whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
        named = _read_object(folder / "special_tokens_map.json")
        settings = read_settings(folder)
        eos = _content(settings.get("eos_token", END_OF_TEXT), folder)
        if whole.exists():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(whole)), eos=eos)
            except Exception as error:  # the library raises bare Exception
                raise TokenizerError(f"{whole} is not a tokenizer: {error}") from error
        if vocab.exists() and merges.exists():
            backend = _open_bpe(vocab, merges)
            _add_tokens(backend, folder / "added_tokens.json")
            for entry in named.values():
                _mark_special(backend, entry, folder / "special_tokens_map.json")
            _mark_special(backend, settings.get("eos_token"), folder / "tokenizer_config.json")
            return cls._of_bpe(backend, eos)
        raise TokenizerError(
            f"{folder} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"
        )

    @classmethod
    def find(cls, folder: str | Path) -> "Tokenizer | None":
        """Opens the tokenizer of a model folder as `open` does, or returns None where the folder has none.

        Raises:
          TokenizerError: there is tokenizer.json or vocab.json, and it cannot be opened.
        """
        names = ("tokenizer.json", "vocab.json")
        return cls.open(folder) if any((Path(folder) / name).exists() for name in names) else None

    @classmethod
    def from_bpe_files(
        cls, vocab: str | Path, merges: str | Path, *, eos: str | None = END_OF_TEXT
    ) -> "Tokenizer":
        """Opens GPT-2's own files: vocab.json (OpenAI: encoder.json) and merges.txt (OpenAI: vocab.bpe)."""
        return cls._of_bpe(_open_bpe(Path(vocab), Path(merges)), eos)

    @classmethod
    def _of_bpe(cls, backend: tokenizers.Tokenizer, eos: str | None) -> "Tokenizer":
        if eos is not None and backend.token_to_id(eos) is not None:
            backend.add_special_tokens([eos])
        return cls(backend, eos=eos)

    @classmethod
    def characters(cls, text: str) -> "Tokenizer":
        """Returns a tokenizer whose tokens are the characters of `text`, in code point order.

        >>> Tokenizer.characters("hello").encode("hell")
        [1, 0, 2, 2]
        """
        return cls.of_characters(sorted(set(text)))

    @classmethod
    def of_characters(cls, characters: Sequence[str]) -> "Tokenizer":
        """Returns a tokenizer whose token i is the single character `characters[i]`; none may be there twice."""
        vocabulary = {character: i for i, character in enumerate(characters)}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return cls(backend, eos=None)

    @classmethod
    def utf8(cls) -> "Tokenizer":
        """Returns a tokenizer of the 256 bytes and an end-of-text token.

        >>> Tokenizer.utf8().decode(Tokenizer.utf8().encode("naïve"))
        'naïve'
        """
        vocabulary = {character: i for i, character in enumerate(_byte_characters())}
        backend = _byte_level(models.BPE(vocabulary, []), use_regex=False)
        backend.add_special_tokens([END_OF_TEXT])
        return cls(backend)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, eos: str = END_OF_TEXT) -> "Tokenizer":
        """Learns a byte-level BPE of at most `vocab_size` tokens from `texts`, GPT-2's kind; the last id is `eos`.

        Raises:
          TokenizerError: `vocab_size` has no room for the 256 bytes and `eos`.
        """
        if vocab_size < 257:
            raise TokenizerError(
                f"vocab_size is {vocab_size}; expected at least 257: the bytes and {eos}"
            )
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([eos])
        return cls(backend, eos=eos)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def missing_ids(self) -> tuple[int, ...]:
        """The ids below `vocab_size` that stand for nothing; hardly any vocabulary has some."""
        known = set(self._backend.get_vocab(with_added_tokens=True).values())
        return tuple(sorted(set(range(self.vocab_size)) - known))

    @functools.cached_property
    def added_tokens(self) -> dict[str, bool]:
        """The tokens that stand for themselves in a text, and whether each is special."""
        return {t.content: t.special for t in self._backend.get_added_tokens_decoder().values()}

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""
        return None if self._eos is None else self._backend.token_to_id(self._eos)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; special tokens written out in it are recognised, none are added.

        Raises:
          TokenizerError: `text` has a character that the vocabulary lacks, or a lone surrogate.
        """
        return self._encode(self._backend, text)

    def encode_plain(self, text: str) -> list[int]:
        """Returns the ids of `text` as if no token had been added: "<|endoftext|>" is thirteen characters.

        Raises:
          TokenizerError: as `encode`; and where the vocabulary itself makes an added token of the characters.
        """
        ids = self._encode(self._without_added_tokens, text)
        if not self._backend.get_added_tokens_decoder().keys().isdisjoint(ids):
            raise TokenizerError(f"{text!r:.60} cannot be encoded as plain text")
        return ids

    @functools.cached_property
    def _without_added_tokens(self) -> tokenizers.Tokenizer:
        spec = json.loads(self._backend.to_str())
        spec |= {"added_tokens": [], "post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}") from error
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            missing = sorted({c for c in text if self._backend.token_to_id(c) is None})
            if not missing:
                raise TokenizerError(f"the text cannot be encoded: {error}") from error
            raise TokenizerError(
                f"the vocabulary of {self.vocab_size} has no {', '.join(map(repr, missing[:5]))}"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens written out; broken UTF-8 shows as U+FFFD.

        Raises:
          TokenizerError: an id is outside the vocabulary.
        """
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self) -> "TextStream":
        """Returns a decoder that takes one id at a time."""
        return TextStream(self)

    def files(self) -> dict[str, bytes]:
        """Returns the files that `open` and transformers read this tokenizer from."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self._eos is not None:
            settings |= {"eos_token": self._eos, "bos_token": self._eos}
        return {
            "tokenizer.json": self._backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }

    def save(self, folder: str | Path) -> None:
        """Writes `files` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        """The UTF-8 bytes that each id stands for."""
        added = self._backend.get_added_tokens_decoder()
        is_byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        if not is_byte_level and not isinstance(self._backend.decoder, decoders.Fuse):
            raise TokenizerError(
                f"decoder {self._backend.decoder!r} is not supported; byte-level BPE and characters are"
            )
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        return {
            id_: bytes(to_byte[c] for c in token)
            if is_byte_level and id_ not in added
            else token.encode()
            for token, id_ in self._backend.get_vocab(with_added_tokens=True).items()
        }

    def token_bytes(self, id_: int) -> bytes:
        """Returns the UTF-8 bytes that `id_` stands for; they may be part of a character."""
        try:
            return self._token_bytes[id_]
        except KeyError:
            raise TokenizerError(
                f"token id {id_} is outside the vocabulary of {self.vocab_size}"
            ) from None


class TextStream:
    """Decodes ids one at a time; the pieces joined are what `Tokenizer.decode` gives for all of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id_: int) -> str:
        """Returns the text that `id_` completes: nothing while a character is unfinished."""
        return self._utf8.decode(self._tokenizer.token_bytes(id_))

    def flush(self) -> str:
        """Returns what was held back, as U+FFFD, and starts anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _byte_level(model: models.Model, *, use_regex: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


@functools.cache
def _byte_characters() -> tuple[str, ...]:
    """The printable character with which byte-level BPE writes each byte (GPT-2, encoder.py, bytes_to_unicode)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def _open_bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        return _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{vocab} and {merges} are not a BPE vocabulary: {error}") from error


def _add_tokens(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Adds the tokens of added_tokens.json, which must have the ids that follow on; those there already keep theirs."""
    added = _read_object(path)
    if wrong := [f"{token!r}: {id_!r}" for token, id_ in added.items() if type(id_) is not int]:
        raise TokenizerError(f"{path}: expected a token's id, found {wrong[0]}")
    for token, id_ in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([tokenizers.AddedToken(token, normalized=False)])
        if id_ != (given := backend.token_to_id(token)):
            raise TokenizerError(
                f"{path}: {token!r} has id {id_}, expected {given}: added tokens follow on "
                "after the vocabulary, one by one"
            )


def _mark_special(backend: tokenizers.Tokenizer, entry: Any, path: Path) -> None:
    """Makes the tokens of an entry of `path` stand for themselves in a text: one, a list of them, or none."""
    for token in entry if isinstance(entry, list) else [entry]:
        content = _content(token, path)
        if content is None:
            continue
        if backend.token_to_id(content) is None:
            raise TokenizerError(
                f"{path} names {content!r}, which neither vocab.json nor added_tokens.json has; "
                "give it an id in added_tokens.json"
            )
        if isinstance(token, dict) and any(map(token.get, ("lstrip", "rstrip", "single_word"))):
            raise TokenizerError(
                f"{path}: {content!r} has lstrip, rstrip or single_word, which only a tokenizer.json "
                "can have here; save the tokenizer as one"
            )
        backend.add_special_tokens([content])


def _content(token: Any, path: Path) -> str | None:
    """Returns a token as it is written: in JSON it is a string, or an object that has it as `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise TokenizerError(f"{path}: expected a special token as a string, found {content!r}")
    return content


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns what a model folder says about its tokenizer: tokenizer_config.json, else special_tokens_map.json.

    Raises:
      TokenizerError: one of them is no JSON object.
    """
    files = ("special_tokens_map.json", "tokenizer_config.json")
    return _read_object(folder / files[0]) | _read_object(folder / files[1])


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`, an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} should hold a JSON object")
    return content
