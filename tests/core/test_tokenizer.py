import itertools
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from core.tokenizer import END_OF_TEXT, Tokenizer, TokenizerError

UTF8 = Tokenizer.utf8()
CORPUS = ["naïve café, 東京 😀!", "the quick brown fox", "the lazy dog's the", "  indented\n\ttabs"]
LEARNED = Tokenizer.train(CORPUS * 5, 300)
# What GPT-2's regular expression, UTF-8 and byte pairs each stumble over.
TRICKY = [
    "",
    " ",
    "  two  spaces   three ",
    "\n\n \t\r\n x",
    "I'll we've they're it's 'S 's",
    "abc123def 4567",
    "naïve café",
    "é e\u0301",
    "東京都",
    "😀👩‍👩‍👧🏽",
    "\u00a0nbsp\u3000wide",
    "\x00\x01\x7f",
    "a\u200bb",
    "\U0010ffff",
    "½ ² ⅷ ٣",
    "the end<|endoftext|>and on",
]


@pytest.fixture(scope="session")
def gpt2(testdata: Path) -> Tokenizer:
    return Tokenizer.from_bpe_files(testdata / "gpt2_encoder.json", testdata / "gpt2_vocab.bpe")


def random_texts(count: int) -> list[str]:
    """Strings of whatever Unicode has, and of the short ranges that merges are made of."""
    rng = random.Random(0)
    ranges = [(32, 126), (32, 126), (9, 13), (160, 591), (0x4E00, 0x4EFF), (0x1F300, 0x1F5FF)]

    def character() -> str:
        while True:
            low, high = rng.choice([*ranges, (0, sys.maxunicode)])
            # Not what Unicode assigned after Python's tables: each implementation's \p{L} has its own age.
            if unicodedata.category(code := chr(rng.randint(low, high))) not in ("Cs", "Cn"):
                return code

    words = ["the", " the", " and", "ing", "'s", "'ll", " 2023", "\n\n", "  ", " naïve"]
    pieces = [lambda: rng.choice(words), character]
    return ["".join(rng.choice(pieces)() for _ in range(rng.randint(0, 40))) for _ in range(count)]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("text", TRICKY, ids=ascii)
def test_gpt2_gives_tricky_text_back(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_s_known_ids(gpt2):
    """From the paper's own example prompts, as every GPT-2 encodes them."""
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode(" hello") == [23748]
    assert gpt2.encode(END_OF_TEXT) == [50256]
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)


def test_gpt2_encodes_a_thousand_random_texts_as_openai_s_encoder(gpt2, testdata):
    reference = OpenAIEncoder(testdata)
    texts = random_texts(1_000)
    assert len({unicodedata.category(c) for text in texts for c in text}) >= 20
    for text in texts:
        assert gpt2.encode(text) == reference.encode(text), ascii(text)


@pytest.mark.parity
def test_gpt2_encodes_and_decodes_a_thousand_random_texts_as_transformers(gpt2, testdata):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(
        vocab=str(testdata / "gpt2_encoder.json"), merges=str(testdata / "gpt2_vocab.bpe")
    )
    rng = random.Random(1)
    for text in [*random_texts(1_000), *TRICKY]:
        ids = gpt2.encode(text)
        assert ids == theirs.encode(text), ascii(text)
        rng.shuffle(ids)  # most of which is no UTF-8
        assert gpt2.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


class OpenAIEncoder:
    """The algorithm of GPT-2's encoder.py: split by the expression, then merge the best-ranked pair while it lasts."""

    def __init__(self, folder: Path):
        self.ids = json.loads((folder / "gpt2_encoder.json").read_text())
        lines = (folder / "gpt2_vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        self.pattern = regex.compile(
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        )
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
        printable += range(ord("®"), ord("ÿ") + 1)
        self.letters = {byte: chr(byte) for byte in printable}
        for byte in range(256):
            self.letters.setdefault(byte, chr(256 + len(self.letters) - len(printable)))

    def encode(self, text: str) -> list[int]:
        words = (word.encode() for word in self.pattern.findall(text))
        letters = ([self.letters[byte] for byte in word] for word in words)
        return [self.ids[part] for word in letters for part in self.merged(word)]

    def merged(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            if min(ranks) == len(self.ranks):
                break
            first, second = (parts[ranks.index(min(ranks)) + i] for i in (0, 1))
            joined, i = [], 0
            while i < len(parts):
                both = parts[i : i + 2] == [first, second]
                joined.append(first + second if both else parts[i])
                i += 2 if both else 1
            parts = joined
        return parts


@pytest.mark.parametrize("tokenizer", [UTF8, LEARNED], ids=["bytes", "learned"])
@given(text=st.text())
def test_decoding_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_a_stream_shows_no_broken_character_of_a_whole_text(text):
    ids = LEARNED.encode(text)
    pieces = pieces_of(LEARNED, ids)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    for count in range(len(ids) + 1):  # what has been shown is never taken back
        shown = "".join(pieces[:count])
        assert text.startswith(shown)
        # and what is held back is less than a character
        whole = b"".join(map(LEARNED.token_bytes, ids[:count]))
        assert len(whole) - len(shown.encode()) < 4


@given(ids=st.lists(st.integers(0, LEARNED.vocab_size - 1)))
def test_pieces_of_any_ids_join_to_their_decoding(ids):
    whole = b"".join(map(LEARNED.token_bytes, ids)).decode(errors="replace")
    assert LEARNED.decode(ids) == "".join(pieces_of(LEARNED, ids)) == whole


def test_half_a_character_is_held_back_and_flushed_as_a_replacement():
    stream = UTF8.stream()
    euro = UTF8.encode("€")
    assert [stream.push(id_) for id_ in euro] == ["", "", "€"]
    assert stream.push(euro[0]) == ""
    assert stream.flush() == "\ufffd"
    assert [stream.push(id_) for id_ in euro] == ["", "", "€"]


def test_a_learned_vocabulary_has_every_byte_merges_and_the_end_last():
    assert LEARNED.vocab_size <= 300
    assert LEARNED.eos_id == LEARNED.vocab_size - 1
    assert LEARNED.encode(END_OF_TEXT) == [LEARNED.eos_id]
    assert len(LEARNED.encode(" the the the")) == 3
    assert Tokenizer.train(CORPUS * 5, 300).files() == LEARNED.files()


def test_the_end_of_text_may_be_spelled_in_any_script():
    tokenizer = Tokenizer.train(CORPUS, 300, eos="<終わり>")
    assert tokenizer.decode([tokenizer.eos_id or 0]) == "<終わり>"


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match="vocab_size is 256; expected at least 257"):
        Tokenizer.train(CORPUS, 256)


def test_characters_are_numbered_in_code_point_order():
    tokenizer = Tokenizer.characters("héllo\n \U0001f600")
    assert tokenizer.vocab_size == 7
    assert tokenizer.eos_id is None
    assert tokenizer.encode("\n ho\U0001f600") == [0, 1, 2, 4, 6]
    assert tokenizer.decode([6, 0, 5]) == "\U0001f600\né"


def test_characters_of_shakespeare_are_nano_gpt_s_65(testdata):
    text = (testdata / "tinyshakespeare.txt").read_text()
    tokenizer = Tokenizer.characters(text)
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("First") == [18, 47, 56, 57, 58]
    assert tokenizer.decode(tokenizer.encode(text[:10_000])) == text[:10_000]


@given(text=st.text(alphabet="abc\n \r\t\u0301😀"))
def test_any_text_of_known_characters_survives(text):
    tokenizer = Tokenizer.characters("abc\n \r\t\u0301😀")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("tokenizer", "text", "says"),
    [
        (Tokenizer.characters("abc"), "abxyx", "the vocabulary of 3 has no 'x', 'y'"),
        (UTF8, "a\ud800", "the text is not valid Unicode"),
        (Tokenizer.characters("abc"), "a\udfff", "the text is not valid Unicode"),
    ],
    ids=["unknown", "surrogate", "surrogate in characters"],
)
def test_text_that_cannot_be_encoded_is_one_clear_error(tokenizer, text, says):
    with pytest.raises(TokenizerError, match=says):
        tokenizer.encode(text)


@pytest.mark.parametrize("id_", [257, -1])
def test_an_id_outside_the_vocabulary_is_one_clear_error(id_):
    with pytest.raises(TokenizerError, match=f"token id {id_} is outside the vocabulary of 257"):
        UTF8.decode([1, id_])


@pytest.mark.parametrize(
    "tokenizer", [UTF8, LEARNED, Tokenizer.characters("ab\n")], ids=["bytes", "learned", "chars"]
)
def test_a_saved_tokenizer_opens_as_the_same(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "new")
    opened = Tokenizer.open(tmp_path / "new")
    assert (opened.vocab_size, opened.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert opened.encode("ab\nba") == tokenizer.encode("ab\nba")
    assert opened.files() == tokenizer.files()


def test_gpt2_opens_from_either_kind_of_files(tmp_path, testdata, gpt2):
    for name, file in (("vocab.json", "gpt2_encoder.json"), ("merges.txt", "gpt2_vocab.bpe")):
        (tmp_path / name).write_bytes((testdata / file).read_bytes())
    from_two = Tokenizer.open(tmp_path)
    gpt2.save(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    from_one = Tokenizer.open(tmp_path / "whole")
    for text in TRICKY:
        assert from_two.encode(text) == from_one.encode(text) == gpt2.encode(text)
    assert from_two.eos_id == from_one.eos_id == 50256


def two_files(folder: Path, **beside: object) -> dict[str, int]:
    """Writes LEARNED as vocab.json and merges.txt without its end of text, and other JSON files beside."""
    model = json.loads(LEARNED.files()["tokenizer.json"])["model"]
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    for name, content in {"vocab": model["vocab"], **beside}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return model["vocab"]


END = LEARNED.vocab_size - 1
ADDED = {"<pad>": END + 2, "<end>": END, "<tool>": END + 1}
SPECIAL = {"eos_token": {"content": "<end>", "lstrip": False}, "pad_token": "<pad>"}
SPOKEN = "the<tool> quick <pad>brown<end> fox"


def test_added_tokens_stand_after_the_vocabulary_and_end_a_text(tmp_path):
    vocab = two_files(tmp_path, added_tokens=ADDED, special_tokens_map=SPECIAL)
    tokenizer = Tokenizer.open(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (len(vocab), len(vocab) + 3)
    assert [tokenizer.encode(token) for token in ADDED] == [[id_] for id_ in ADDED.values()]
    ids = tokenizer.encode(SPOKEN)
    assert [id_ for id_ in ids if id_ >= len(vocab)] == [END + 1, END + 2, END]
    assert tokenizer.decode(ids) == SPOKEN
    tokenizer.save(tmp_path / "whole")
    assert Tokenizer.open(tmp_path / "whole").encode(SPOKEN) == ids


def test_tokens_of_the_vocabulary_may_be_named_again(tmp_path):
    vocab = two_files(tmp_path)
    two_files(tmp_path, added_tokens={"the": vocab["the"]}, special_tokens_map={"eos_token": "the"})
    tokenizer = Tokenizer.open(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (vocab["the"], len(vocab))


@pytest.mark.parametrize("kind", ["two files", "whole"])
def test_the_end_of_a_text_is_the_config_s_or_else_the_map_s(tmp_path, kind):
    two_files(tmp_path, added_tokens=ADDED, special_tokens_map={"eos_token": "<pad>"})
    if kind == "whole":
        (tmp_path / "tokenizer.json").write_bytes(
            Tokenizer.open(tmp_path).files()["tokenizer.json"]
        )
    assert Tokenizer.open(tmp_path).eos_id == ADDED["<pad>"]
    for named, expected in (("<tool>", ADDED["<tool>"]), (None, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert Tokenizer.open(tmp_path).eos_id == expected


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        (
            {"added_tokens": {"<a>": END, "<b>": END + 2}},
            f"'<b>' has id {END + 2}, expected {END + 1}",
        ),
        ({"added_tokens": {"the": 5}}, "'the' has id 5, expected"),
        ({"added_tokens": {"<a>": "7"}}, "expected a token's id, found '<a>': '7'"),
        ({"added_tokens": ["<a>"]}, "added_tokens.json should hold a JSON object"),
        ({"special_tokens_map": {"eos_token": "<end>"}}, "special_tokens_map.json names '<end>'"),
        ({"special_tokens_map": {"more": ["the", "<x>"]}}, "special_tokens_map.json names '<x>'"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, "tokenizer_config.json names '<end>'"),
        (
            {"special_tokens_map": {"mask_token": {"content": "the", "lstrip": True}}},
            "'the' has lstrip, rstrip or single_word",
        ),
        ({"special_tokens_map": {"eos_token": 3}}, "expected a special token as a string, found 3"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_as_the_files_say_are_one_clear_error(tmp_path, beside, says):
    two_files(tmp_path, **beside)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.open(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parity
def test_added_tokens_are_where_transformers_has_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = {"tokenizer_class": "GPT2Tokenizer", "model_type": "gpt2"}
    two_files(
        tmp_path,
        added_tokens=ADDED,
        special_tokens_map={**SPECIAL, "bos_token": "<end>", "unk_token": "<end>"},
        tokenizer_config=kind,
        config=kind,
    )
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(tmp_path)
    assert ours.encode(SPOKEN) == theirs.encode(SPOKEN)
    assert ours.eos_id == theirs.eos_token_id


def test_a_folder_without_a_tokenizer_is_told_from_one_whose_tokenizer_is_broken(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.find(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        Tokenizer.find(tmp_path)
    LEARNED.save(tmp_path)
    found = Tokenizer.find(tmp_path)
    assert found is not None
    assert found.files() == LEARNED.files()


@pytest.mark.parity
@pytest.mark.parametrize(
    "tokenizer", [UTF8, LEARNED, Tokenizer.characters("ab\n cd")], ids=["bytes", "learned", "chars"]
)
def test_a_saved_tokenizer_opens_in_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "ab\n cd dc"
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"),
        ({"vocab.json": "{}"}, "holds no tokenizer"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not a tokenizer"),
        ({"vocab.json": "[]", "merges.txt": "a b"}, "are not a BPE vocabulary"),
        (
            {"tokenizer.json": "{}", "tokenizer_config.json": "{"},
            "tokenizer_config.json is not JSON",
        ),
        (
            {"tokenizer.json": "{}", "special_tokens_map.json": "[" * 100_000},
            "special_tokens_map.json is not JSON: maximum recursion",
        ),
    ],
    ids=str,
)
def test_files_that_are_no_tokenizer_are_one_clear_error(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.open(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
