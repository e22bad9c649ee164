import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.tokenizer import Tokenizer
from train.data import DataError, bytes_per_token, open_dataset
from train.prepare import prepare

DRAW: dict[str, Any] = {"seed": 3, "step": 7, "rows": 4, "length": 9}


@pytest.fixture
def folder(data_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(data_dir / "small", tmp_path / "small"))


@pytest.fixture(scope="module")
def dataset(data_dir: Path):
    return open_dataset(data_dir / "small", block_size=16)


def test_a_batch_is_windows_of_the_file(dataset):
    tokens = dataset.tokens["train"][:].astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 9)
    batch_BS = dataset.batch("train", **DRAW)
    assert batch_BS.dtype == np.int32
    assert all((windows == row).all(1).any() for row in batch_BS)


def test_the_same_draw_is_the_same_batch_and_any_other_is_not(dataset):
    batch_BS = dataset.batch("train", **DRAW)
    np.testing.assert_array_equal(batch_BS, dataset.batch("train", **DRAW))
    for change in ({"seed": 4}, {"step": 8}):
        assert (dataset.batch("train", **(DRAW | change)) != batch_BS).any()
    assert (dataset.batch("eval_train", **DRAW) != batch_BS).any()


def test_a_row_does_not_depend_on_how_many_are_drawn(dataset):
    many = dataset.batch("train", **(DRAW | {"rows": 11}))
    np.testing.assert_array_equal(many[:4], dataset.batch("train", **DRAW))


def test_draws_reach_both_ends_of_the_file(folder: Path):
    np.arange(12, dtype=np.uint16).tofile(folder / "val.bin")
    _rewrite_meta(folder, val_tokens=12)
    dataset = open_dataset(folder, block_size=8)
    starts = dataset.batch("eval_val", seed=1, step=0, rows=200, length=9)[:, 0]
    assert set(starts) == {0, 1, 2, 3}


def test_the_tokenizer_comes_with_the_data(dataset, text: str):
    opening = dataset.tokenizer.decode(list(map(int, dataset.tokens["train"][:50])))
    assert opening == text[:50]


def test_a_folder_of_nanogpts_openwebtext_is_read_as_gpt2_tokens(tmp_path: Path):
    for name in ("train.bin", "val.bin"):
        np.array([0, 50256] * 20, np.uint16).tofile(tmp_path / name)
    dataset = open_dataset(tmp_path, block_size=16)
    assert (dataset.vocab_size, dataset.tokenizer) == (50257, None)


def test_a_missing_folder_names_the_command_that_makes_it():
    with pytest.raises(
        DataError,
        match=r"data/shakespeare_char: no such folder.*"
        r"python -m train.prepare --dataset=shakespeare_char --out=data/shakespeare_char",
    ):
        open_dataset("data/shakespeare_char", block_size=8)
    with pytest.raises(DataError, match=r"--dataset=mine --text='GLOB' --out=data/mine"):
        open_dataset("data/mine", block_size=8)


def test_a_missing_file_is_named(folder: Path):
    (folder / "val.bin").unlink()
    with pytest.raises(DataError, match=r"no val\.bin in it"):
        open_dataset(folder, block_size=16)


def test_half_a_token_is_refused(folder: Path):
    with (folder / "train.bin").open("ab") as file:
        file.write(b"\1")
    with pytest.raises(DataError, match="not a whole number of uint16 tokens"):
        open_dataset(folder, block_size=16)


def test_a_truncated_file_is_refused(folder: Path):
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[:-5].tofile(folder / "train.bin")
    with pytest.raises(
        DataError, match=rf"{len(tokens) - 5:,} tokens, meta.json says {len(tokens):,}"
    ):
        open_dataset(folder, block_size=16)


def test_an_id_outside_the_vocabulary_is_refused(folder: Path):
    tokens = np.fromfile(folder / "val.bin", np.uint16)
    tokens[-1] = 60000
    tokens.tofile(folder / "val.bin")
    with pytest.raises(DataError, match=r"val\.bin: token id 60000 is outside the vocabulary"):
        open_dataset(folder, block_size=16)


def test_an_id_beyond_what_opening_scans_is_refused_when_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    tokens = np.fromfile(folder / "val.bin", np.uint16)
    tokens[5:] = 60000
    tokens.tofile(folder / "val.bin")
    monkeypatch.setattr("train.data.SCANNED_TOKENS", 5)
    dataset = open_dataset(folder, block_size=16)
    with pytest.raises(DataError, match="token id 60000"):
        dataset.batch("eval_val", **DRAW)


def test_a_file_shorter_than_one_window_is_refused(folder: Path):
    with pytest.raises(DataError, match="block_size=99999 needs at least 100,000"):
        open_dataset(folder, block_size=99_999)


def test_a_broken_meta_json_is_refused(folder: Path):
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json: not JSON"):
        open_dataset(folder, block_size=16)
    (folder / "meta.json").write_text('{"vocab_size": 65}')
    with pytest.raises(DataError, match=r"not a data folder's meta\.json"):
        open_dataset(folder, block_size=16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[]", r"not a data folder's meta\.json \(a list"),
        ("[" * 100_000, r"meta\.json: not JSON"),
        ({"vocab_size": "65"}, "vocab_size is '65', expected"),
        ({"vocab_size": 0}, "vocab_size 0, expected 1 to"),
        ({"vocab_size": 2**30}, "vocab_size 1073741824, expected 1 to 4,194,304"),
        ({"vocab_size": 300}, "says a vocabulary of 300, the tokenizer beside it has"),
        ({"dtype": "float64"}, "dtype 'float64', expected uint16 or uint32"),
        ({"train_tokens": None}, "train_tokens is None, expected"),
    ],
)
def test_a_meta_json_of_other_types_is_refused(folder: Path, values, message: str):
    if isinstance(values, str):
        (folder / "meta.json").write_text(values)
    else:
        _rewrite_meta(folder, **values)
    with pytest.raises(DataError, match=message):
        open_dataset(folder, block_size=16)


@pytest.fixture
def nanogpt_folder(folder: Path, text: str) -> Path:
    """What nanoGPT's data/shakespeare_char/prepare.py leaves."""
    for path in folder.iterdir():
        if path.suffix != ".bin":
            path.unlink()
    characters = sorted(set(text))
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nanogpts_pickled_vocabulary_is_read(nanogpt_folder: Path, text: str, protocol: int):
    meta = pickle.loads((nanogpt_folder / "meta.pkl").read_bytes())
    (nanogpt_folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    dataset = open_dataset(nanogpt_folder, block_size=16)
    assert dataset.vocab_size == len(set(text))
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.decode(dataset.tokens["train"][:50].tolist()) == text[:50]


def _hostile_pickles() -> dict[str, tuple[bytes, str]]:
    class Runs:
        def __reduce__(self):
            return Path.touch, (Path("was-here"),)

    characters = {0: "a", 1: "b"}
    return {
        "code": (pickle.dumps(Runs()), "opcode STACK_GLOBAL at byte"),
        "protocol 0": (pickle.dumps({"itos": characters}, 0), "opcode"),
        "a list": (pickle.dumps([1, 2]), "opcode EMPTY_LIST"),
        "cut short": (pickle.dumps({"itos": characters})[:-3], "not a pickle of nanoGPT's"),
        "no pickle": (b"\xff\x00 hello", "not a pickle of nanoGPT's"),
        "empty": (b"", "not a pickle of nanoGPT's"),
        "only a stop": (b".", "not a pickle of nanoGPT's"),
        "a vast memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "memo 2147483647 at byte"),
        "a long claim": (b"\x80\x02X\xff\xff\xff\x7fabc.", "not a pickle of nanoGPT's"),
        "an unhashable key": (b"\x80\x02}}K\x01s.", "not a pickle of nanoGPT's"),
        "too large": (b"\x80\x02" + b"}0" * 2**22, "more than the 4,194,304"),
        "no itos": (pickle.dumps({"vocab_size": 2}), "no dictionary `itos`"),
        "a gap": (pickle.dumps({"vocab_size": 2, "itos": {0: "a", 2: "b"}}), "none for id 1"),
        "words": (pickle.dumps({"vocab_size": 1, "itos": {0: "ab"}}), "is not one character"),
        "half a pair": (
            pickle.dumps({"vocab_size": 1, "itos": {0: "\ud800"}}),
            "not one character",
        ),
        "twice": (pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "a"}}), "1 different"),
        "a size": (pickle.dumps({"vocab_size": 3, "itos": characters}), "vocab_size 3; expected"),
    }


@pytest.mark.parametrize("name", _hostile_pickles())
def test_a_pickle_that_is_no_vocabulary_is_refused_and_runs_nothing(
    nanogpt_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(nanogpt_folder)
    content, message = _hostile_pickles()[name]
    (nanogpt_folder / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_dataset(nanogpt_folder, block_size=16)
    assert not Path("was-here").exists()


def llmc_file(
    path: Path,
    ids: np.ndarray,
    *,
    magic: int = 20240520,
    version: int = 1,
    count: int | None = None,
) -> None:
    """As llm.c's dev/data/data_common.py write_datafile."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.tobytes())


@pytest.mark.parametrize(
    ("magic", "version", "kind", "vocab_size"),
    [(20240520, 1, np.uint16, 50_257), (20240801, 7, np.uint32, 128_256)],
)
def test_llmcs_files_are_read_behind_their_header(
    tmp_path: Path, magic: int, version: int, kind: type, vocab_size: int
):
    ids = np.arange(vocab_size - 40, vocab_size).astype(kind)
    for name in ("tiny_train.bin", "tiny_val.bin"):
        llmc_file(tmp_path / name, ids, magic=magic, version=version)
    dataset = open_dataset(tmp_path, block_size=16)
    assert dataset.vocab_size == vocab_size
    np.testing.assert_array_equal(dataset.tokens["train"][:], ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 41}, r"1,104 bytes, but its header says 41 tokens: 1,024 \+ 2 x 41 = 1,106"),
        ({"count": 39}, r"says 39 tokens: 1,024 \+ 2 x 39 = 1,102; truncated"),
        ({"count": -1}, "says -1 tokens"),
        ({"version": 3}, "version 3 of llm.c's header; 1 is known"),
    ],
)
def test_llmcs_files_of_another_length_are_refused(tmp_path: Path, change, message: str):
    llmc_file(tmp_path / "a_train.bin", np.arange(40, dtype=np.uint16))
    llmc_file(tmp_path / "a_val.bin", np.arange(40, dtype=np.uint16), **change)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, block_size=16)


def test_a_header_cut_short_is_refused(tmp_path: Path):
    llmc_file(tmp_path / "train.bin", np.arange(40, dtype=np.uint16))
    (tmp_path / "val.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"1,000 bytes, but llm\.c's header alone has 1,024"):
        open_dataset(tmp_path, block_size=16)


def test_shards_are_one_sequence_in_the_order_of_their_numbers(tmp_path: Path):
    ids = np.arange(90, dtype=np.uint16)
    for name, part in {"2": ids[:30], "10": ids[30:41], "11": ids[41:]}.items():
        part.tofile(tmp_path / f"fineweb_train_{name}.bin")
    ids.tofile(tmp_path / "fineweb_val_0.bin")
    dataset = open_dataset(tmp_path, block_size=16)
    np.testing.assert_array_equal(dataset.tokens["train"][:], ids)
    for step in range(9):  # across the shards' borders, too
        shards, whole = (
            dataset.batch(stream, seed=3, step=step, rows=4, length=60)
            for stream in ("train", "eval_val")
        )
        assert (np.diff(shards) == 1).all()
        assert (np.diff(whole) == 1).all()


def test_one_file_and_shards_together_are_refused(folder: Path):
    shutil.copy(folder / "train.bin", folder / "train_1.bin")
    with pytest.raises(DataError, match=r"has train\.bin and train_1\.bin; keep one"):
        open_dataset(folder, block_size=16)


def test_shards_of_different_types_are_refused(tmp_path: Path):
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "train_1.bin")
    wide = np.arange(40, dtype=np.uint32)
    llmc_file(tmp_path / "train_2.bin", wide, magic=20240801, version=7)
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"train_1\.bin is uint16, train_2\.bin is uint32"):
        open_dataset(tmp_path, block_size=16)


def test_an_id_that_does_not_fit_31_bits_is_refused_when_drawn(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("train.data.SCANNED_TOKENS", 0)
    ids = np.full(40, 2**31 + 5, np.uint32)
    for name in ("train.bin", "val.bin"):
        llmc_file(tmp_path / name, ids, magic=20240801, version=7)
    with pytest.raises(DataError, match="token id 2147483653 is outside"):
        open_dataset(tmp_path, block_size=16).batch("train", **DRAW)


def test_an_epoch_has_every_window_once_and_the_next_has_another_order(folder: Path):
    np.arange(71, dtype=np.uint16).tofile(folder / "train.bin")
    _rewrite_meta(folder, train_tokens=71, vocab_size=100)
    (folder / "tokenizer.json").unlink()
    dataset = open_dataset(folder, block_size=10)

    def starts(seed: int, steps: range, rows: int) -> list[int]:
        draw: dict[str, Any] = {"seed": seed, "rows": rows, "length": 11, "order": "epoch"}
        return [
            i for step in steps for i in dataset.batch("train", step=step, **draw)[:, 0].tolist()
        ]

    first, second = starts(3, range(7), 1), starts(3, range(7, 14), 1)
    assert sorted(first) == sorted(second) == list(range(0, 70, 10))
    assert first != second
    assert starts(3, range(7), 2) == first + second
    assert starts(4, range(7), 1) != first
    assert len({tuple(starts(seed, range(7), 1)) for seed in range(40)}) > 35


def _rewrite_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def test_bytes_of_a_token_are_those_of_its_text(tmp_path: Path):
    """Two bytes of an e with an accent are one character; the end of a text is none."""
    text = "flax é " * 99
    prepare([text, text], tmp_path / "c", tokenizer=Tokenizer.characters(text), val_fraction=0.75)
    characters = open_dataset(tmp_path / "c", block_size=4)
    assert bytes_per_token(characters, "val") == pytest.approx(8 / 7, rel=1e-2)
    prepare([text, text], tmp_path / "b", tokenizer=Tokenizer.utf8(), val_fraction=0.75)
    by_bytes = open_dataset(tmp_path / "b", block_size=4)
    count = len(by_bytes.tokens["val"])
    assert bytes_per_token(by_bytes, "val") == (count - 1) / count
    assert bytes_per_token(dataclasses.replace(characters, tokenizer=None), "val") is None
