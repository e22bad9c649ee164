import hashlib
import http.server
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from core.tokenizer import Tokenizer
from train import sources
from train.data import DataError, open_dataset
from train.prepare import open_tokenizer, prepare, split
from train.sources import Files, HubDataset, Source, fetch


def test_shakespeare_has_nanogpts_counts(testdata: Path, tmp_path: Path):
    texts = Files(str(testdata / "tinyshakespeare.txt"))
    meta = prepare(texts, tmp_path / "s", tokenizer=open_tokenizer("char", texts))
    assert (meta.train_tokens, meta.val_tokens, meta.vocab_size) == (1_003_854, 111_540, 65)


def test_shakespeare_in_gpt2_tokens_has_nanogpts_counts(testdata: Path, tmp_path: Path):
    texts = Files(str(testdata / "tinyshakespeare.txt"))
    tokenizer = Tokenizer.from_bpe_files(
        testdata / "gpt2_encoder.json", testdata / "gpt2_vocab.bpe"
    )
    meta = prepare(texts, tmp_path / "s", tokenizer=tokenizer)
    assert (meta.train_tokens, meta.val_tokens) == (301_966, 36_059)


def test_both_splits_decode_to_the_text(text: str, tmp_path: Path):
    prepare([text], tmp_path / "d", tokenizer=Tokenizer.utf8(), val_fraction=0.25)
    dataset = open_dataset(tmp_path / "d", block_size=8)
    assert dataset.tokenizer is not None
    parts = [
        dataset.tokenizer.decode(dataset.tokens[name][:].tolist()) for name in ("train", "val")
    ]
    assert "".join(parts) == text
    assert len(parts[0]) == int(0.75 * len(text))


def test_texts_are_separated_by_end_of_text(tmp_path: Path):
    tokenizer = Tokenizer.utf8()
    prepare(["ab", "cd", "efgh"], tmp_path / "d", tokenizer=tokenizer, val_fraction=0.5)
    train = np.fromfile(tmp_path / "d" / "train.bin", np.uint16).tolist()
    assert tokenizer.decode(train) == "ab<|endoftext|>cd"


def test_a_split_keeps_every_character_in_order():
    train, val = split(["abc", "", "defgh", "ij"], 0.4)
    assert (train, val) == (["abc", "def"], ["gh", "ij"])


def test_large_vocabularies_are_written_in_four_bytes(tmp_path: Path):
    characters = "".join(chr(c) for c in range(0x20, 0x20 + 70_000) if not 0xD800 <= c < 0xE000)
    meta = prepare([characters], tmp_path / "d", tokenizer=Tokenizer.characters(characters))
    assert meta.dtype == "uint32"
    assert open_dataset(tmp_path / "d", block_size=8).tokens["val"][:][-1] == len(characters) - 1


def test_an_existing_folder_is_kept_unless_overwritten(text: str, tmp_path: Path):
    out, tokenizer = tmp_path / "d", Tokenizer.characters(text)
    prepare([text], out, tokenizer=tokenizer)
    with pytest.raises(DataError, match="exists already; pass --overwrite"):
        prepare([text], out, tokenizer=tokenizer)
    meta = prepare([text[:500]], out, tokenizer=tokenizer, overwrite=True)
    assert meta.train_tokens == 450
    assert len(open_dataset(out, block_size=8).tokens["train"]) == 450


def test_files_of_others_are_never_removed(text: str, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("\\end")
    with pytest.raises(DataError, match=r"holds other files \(thesis\.tex\)"):
        prepare([text], tmp_path, tokenizer=Tokenizer.characters(text), overwrite=True)


def test_a_failure_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(ValueError, match="has no 'z'"):
        prepare(["abcz" * 9], tmp_path / "d", tokenizer=Tokenizer.characters("abc"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="split is empty"):
        prepare([""], tmp_path / "d", tokenizer=Tokenizer.utf8())


def test_files_are_read_in_order_and_byte_for_byte(tmp_path: Path):
    (tmp_path / "b.txt").write_bytes(b"2\r\n")
    (tmp_path / "a.txt").write_bytes("ä".encode())
    assert list(Files(str(tmp_path / "*.txt"))) == ["ä", "2\r\n"]
    with pytest.raises(DataError, match="no such file"):
        list(Files(str(tmp_path / "*.md")))
    (tmp_path / "c.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"c\.txt: not UTF-8 at byte 3"):
        list(Files(str(tmp_path / "*.txt")))


def test_gpt2s_tokenizer_is_told_how_to_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="python -m convert --model=gpt2 --out=models/gpt2"):
        open_tokenizer("gpt2", [])


@pytest.fixture
def server(tmp_path: Path):
    """A web server of tmp_path's files, and of a cut.txt that ends early."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            if self.path != "/cut.txt":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"First")

        def log_message(self, format, *args):
            del format, args

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_named_text_is_fetched_and_checked(server: str, tmp_path: Path):
    (tmp_path / "input.txt").write_bytes(b"First Citizen:\n")
    digest = hashlib.sha256(b"First Citizen:\n").hexdigest()
    assert fetch(Source(f"{server}/input.txt", digest, "char")) == "First Citizen:\n"
    with pytest.raises(DataError, match=f"sha256 {digest}, expected 00"):
        fetch(Source(f"{server}/input.txt", "00", "char"))


def test_without_a_network_the_text_can_be_passed_instead():
    with pytest.raises(DataError, match=r"cannot fetch .* pass it with --text=FILE"):
        fetch(Source("http://127.0.0.1:9/input.txt", "00", "char"))


def test_a_connection_that_is_cut_is_one_clear_error(server: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot fetch .*cut\.txt \(IncompleteRead.*--text=FILE"):
        fetch(Source(f"{server}/cut.txt", "00", "char"))
    assert list(tmp_path.iterdir()) == []


def test_the_known_digest_is_tinyshakespeares(testdata: Path):
    digest = hashlib.sha256((testdata / "tinyshakespeare.txt").read_bytes()).hexdigest()
    assert sources.DATASETS["shakespeare_char"].sha256 == digest


def test_rows_of_json_and_parquet_are_texts(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = ["ab\ncd", "ü", "", "xyz"]
    lines = [json.dumps({"text": row, "id": 7}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    parquet.write_table(pa.table({"body": rows, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert list(Files(str(tmp_path / "*.jsonl"))) == rows
    assert list(Files(str(tmp_path / "*.parquet"), field="body")) == rows
    files = Files(str(tmp_path / "*.jsonl"))
    prepare(files, tmp_path / "d", tokenizer=Tokenizer.utf8(), val_fraction=0.25)
    dataset = open_dataset(tmp_path / "d", block_size=1)
    assert dataset.tokenizer is not None
    train = dataset.tokenizer.decode(dataset.tokens["train"][:].tolist())
    assert train == "ab\ncd<|endoftext|>ü"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 7}\n', r"c\.jsonl, line 2: 'text' is int, expected a string"),
        (b'{"text": "a"}\n{"body": "b"}\n', r"line 2: no field 'text' but body; choose one with"),
        (b"[1]\n", r"line 1: no field 'text' but list"),
        (b'{"text": "a"\n', "line 1: not JSON"),
        (b'{"text": "\xff"}\n', "line 1: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_rows_that_are_no_text_are_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(Files(str(tmp_path / "c.jsonl")))


def test_parquet_that_is_none_is_refused(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet, row 0: 'text' is int, expected a string"):
        list(Files(str(tmp_path / "c.parquet")))
    with pytest.raises(DataError, match=r"c\.parquet: no column 'body' but text; choose"):
        list(Files(str(tmp_path / "c.parquet"), field="body"))
    whole = (tmp_path / "c.parquet").read_bytes()
    for damaged in (
        b"",
        whole[:40],
        b"PAR1" + bytes(40) + b"PAR1",
        whole[:-9] + b"\xff\xff\xff\x7fPAR1",
    ):
        (tmp_path / "c.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match="not a Parquet file that can be read"):
            list(Files(str(tmp_path / "c.parquet")))


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"needs datasets, .* pip install 'flaxmill-train\[datasets\]'"
    ):
        list(HubDataset("openwebtext"))


def test_a_generator_is_prepared_as_a_list_is(text: str, tmp_path: Path):
    for name, texts in {"list": [text, "more"], "generator": iter([text, "more"])}.items():
        prepare(texts, tmp_path / name, tokenizer=Tokenizer.utf8())
    for file in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "list" / file).read_bytes() == (
            tmp_path / "generator" / file
        ).read_bytes()


@pytest.mark.parametrize(
    ("text", "message"), [("", "there is no text"), ("ab\ud800c", r"'\\ud800', half of a pair")]
)
def test_what_has_no_characters_is_no_vocabulary(text: str, message: str):
    with pytest.raises(DataError, match=message):
        open_tokenizer("char", [text])
