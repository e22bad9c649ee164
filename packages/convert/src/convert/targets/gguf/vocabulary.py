"""The tokenizer of a model folder as metadata of a GGUF file, where llama.cpp cuts every text just as it does.

llama.cpp has its own code for each way of splitting a text into words, and a file names one. So what a tokenizer.json
says is compared with what is behind those names, and a tokenizer that fits none is left out: the file then has no text,
and takes and gives token ids.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import models

from core.checkpoint import ModelFolder
from core.errors import TokenizerError
from core.tokenizer import Tokenizer

# llama.cpp's names of the expressions that cut a text into words (src/llama-vocab.cpp).
_SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ): "gpt-4o",
}
_CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`model` is llama.cpp's name of an algorithm: "gpt2" (byte-level BPE), "rwkv" (the longest token) or "none".

    `special` has the ids that mean something, by the names of the writer's methods.
    """

    model: str
    size: int
    pre: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    special: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chat_template: str = ""

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Tells `writer` its keys."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            writer.add_vocab_size(self.size)
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, id_ in self.special.items():
            getattr(writer, f"add_{name}_token_id")(id_)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def problems(folder: ModelFolder) -> list[str]:
    """Returns why the folder's tokenizer cannot be this model's."""
    try:
        tokenizer = Tokenizer.find(folder.path)
    except TokenizerError as error:
        return [str(error)]
    size = folder.config.vocab_size
    if tokenizer is None or tokenizer.vocab_size <= size:
        return []
    return [f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size}"]


def read(folder: ModelFolder) -> tuple[Vocabulary, list[str]]:
    """Returns the folder's vocabulary, and what to say about it."""
    size = folder.config.vocab_size
    tokenizer = Tokenizer.find(folder.path)
    if tokenizer is None:
        why = "the folder has no tokenizer"
    else:
        spec = json.loads(tokenizer.files()["tokenizer.json"])
        why = next(_obstacles(spec), None) or _unsplittable(spec)
        if why is None:
            return _vocabulary(folder, tokenizer, spec)
        why = f"llama.cpp cannot cut text as this tokenizer does ({why})"
    return Vocabulary("none", size), [f"{why}: the file takes and gives token ids, no text"]


def _vocabulary(
    folder: ModelFolder, tokenizer: Tokenizer, spec: Mapping[str, Any]
) -> tuple[Vocabulary, list[str]]:
    added = {token["id"]: token for token in spec["added_tokens"]}
    is_greedy = _is_greedy(spec)
    names = {id_: token for token, id_ in spec["model"]["vocab"].items()}
    tokens, types = [], []
    for id_ in range(folder.config.vocab_size):
        if id_ in added:
            text, kind = added[id_]["content"], TokenType.USER_DEFINED
            if added[id_]["special"]:
                kind = TokenType.CONTROL
        elif id_ in names:
            text = _escaped(tokenizer.token_bytes(id_)) if is_greedy else names[id_]
            kind = TokenType.NORMAL
        else:
            text, kind = _unused(id_, tokens, is_greedy), TokenType.UNUSED
        tokens.append(text)
        types.append(int(kind))
    special = _special(folder, tokenizer, spec)
    notes = [
        "the model has no token that ends a text; llama.cpp takes token 11 for one, as for every such file"
    ]
    vocabulary = Vocabulary(
        "rwkv" if is_greedy else "gpt2",
        folder.config.vocab_size,
        "" if is_greedy else _split(spec["pre_tokenizer"]) or "",
        tuple(tokens),
        tuple(types),
        tuple(_merges(spec)),
        special,
        _chat_template(folder),
    )
    return vocabulary, notes * ("eos" not in special and not is_greedy)


def _obstacles(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yields what stands in the way of any algorithm of llama.cpp."""
    if spec.get("normalizer") is not None:
        yield f"its normalizer is {spec['normalizer'].get('type')}"
    for token in spec["added_tokens"]:
        if any(token[key] for key in ("lstrip", "rstrip", "single_word")):
            yield f"{token['content']!r} has lstrip, rstrip or single_word"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if spec["model"].get(key):
            yield f"its model has {key}={spec['model'][key]!r}"


def _unsplittable(spec: Mapping[str, Any]) -> str | None:
    """Returns why neither of the two algorithms splits as `spec` does, or None where one does."""
    model, split = spec["model"], spec.get("pre_tokenizer") or {}
    if _is_greedy(spec):
        return None
    if model["type"] == "WordLevel" and _is_by_character(split):
        return "its characters are not all ASCII, and llama.cpp does not come to an end on one that it does not know"
    if model["type"] != "BPE" or (spec.get("decoder") or {}).get("type") != "ByteLevel":
        return f"it is a {model['type']} and not a byte-level BPE"
    if _split(split) is None:
        return f"its pre_tokenizer is {json.dumps(split)[:200]}"
    if model.get("ignore_merges") and (lost := _unreachable(spec)):
        return f"no merges lead to {lost!r}, which ignore_merges takes whole"
    return None


def _is_greedy(spec: Mapping[str, Any]) -> bool:
    """Tells whether every token is a byte or an ASCII character, so that taking the longest token is just the same.

    Longer ones, which were added, must begin with a token: where none fits, llama.cpp's search does not come to an end.
    """
    model, split = spec["model"], spec.get("pre_tokenizer") or {}
    added = {token["content"] for token in spec["added_tokens"]}
    tokens = model["vocab"].keys() - added
    by_byte = (
        model["type"] == "BPE"
        and not model["merges"]
        and (spec.get("decoder") or {}).get("type") == "ByteLevel"
        and _byte_level(split) is not None
    )
    by_character = (
        model["type"] == "WordLevel"
        and _is_by_character(split)
        and all(map(str.isascii, tokens | added))
    )
    return (
        (by_byte or by_character)
        and all(len(token) == 1 for token in tokens)
        and all(content[:1] in tokens for content in added)
    )


def _is_by_character(split: Mapping[str, Any]) -> bool:
    return all(split.get(key) == value for key, value in _CHARACTERS.items())


def _byte_level(split: Mapping[str, Any]) -> bool | None:
    """Returns whether a pre-tokenizer that is ByteLevel alone splits by GPT-2's expression; None for any other."""
    if split.get("type") != "ByteLevel" or split.get("add_prefix_space", True):
        return None
    return bool(split.get("use_regex", True))


def _split(split: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name for a pre-tokenizer, None if it has none."""
    if _byte_level(split):
        return "gpt-2"
    parts = split.get("pretokenizers") or []
    if split.get("type") != "Sequence" or len(parts) != 2 or _byte_level(parts[1]) is not False:
        return None
    first = parts[0]
    if first.get("type") != "Split" or first.get("behavior") != "Isolated" or first.get("invert"):
        return None
    return _SPLITS.get(first["pattern"].get("Regex", ""))


def _merges(spec: Mapping[str, Any]) -> Iterator[str]:
    for merge in spec["model"].get("merges", ()):
        yield merge if isinstance(merge, str) else " ".join(merge)


def _unreachable(spec: Mapping[str, Any]) -> str | None:
    """Returns a token that its own text does not merge to."""
    model, added = spec["model"], {token["content"] for token in spec["added_tokens"]}
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    bpe = models.BPE(model["vocab"], merges)  # pyright: ignore[reportArgumentType]
    words = (token for token in model["vocab"] if token not in added)
    return next((word for word in words if len(bpe.tokenize(word)) != 1), None)


def _escaped(token: bytes) -> str:
    """Returns `token` as the longest-token algorithm reads it: printable ASCII, and the rest in lower-case hex."""
    return "".join(
        chr(byte) if 32 <= byte < 127 and byte != ord("\\") else f"\\x{byte:02x}" for byte in token
    )


def _unused(id_: int, tokens: list[str], is_greedy: bool) -> str:
    """Returns the name of a row beyond the vocabulary, which no text has; llama.cpp's own converter calls it so too."""
    return f"{tokens[0]}\\xff[PAD{id_}]" if is_greedy else f"[PAD{id_}]"


def _special(folder: ModelFolder, tokenizer: Tokenizer, spec: Mapping[str, Any]) -> dict[str, int]:
    """Returns the ids that mean something: the config's, else the tokenizer's."""
    config = folder.config
    named = _object(folder, "special_tokens_map.json") | _object(folder, "tokenizer_config.json")
    ids = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}

    def stated(name: str) -> int | None:
        token = named.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        return ids.get(content) if isinstance(content, str) else None

    eos = config.eos_token_ids[0] if config.eos_token_ids else tokenizer.eos_id
    special = {
        "bos": next((x for x in (config.bos_token_id, stated("bos"), eos) if x is not None), None),
        "eos": eos,
        "unk": stated("unk"),
        "pad": config.pad_token_id if config.pad_token_id is not None else stated("pad"),
    }
    return {name: id_ for name, id_ in special.items() if id_ is not None}


def _chat_template(folder: ModelFolder) -> str:
    path = folder.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = _object(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _object(folder: ModelFolder, name: str) -> dict[str, Any]:
    """Returns a JSON object of the folder; `Tokenizer.find` has made sure that it is one."""
    path = folder.path / name
    return json.loads(path.read_bytes()) if path.is_file() else {}
