import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from train.data import DataError, open_dataset

DRAW = {"seed": 3, "step": 7, "rows": 4, "length": 9}


@pytest.fixture
def folder(data_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(data_dir / "small", tmp_path / "small"))


@pytest.fixture(scope="module")
def dataset(data_dir: Path):
    return open_dataset(data_dir / "small", block_size=16)


def test_a_batch_is_windows_of_the_file(dataset):
    tokens = np.array(dataset.tokens["train"], np.int32)
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


def test_a_pickle_is_not_opened(folder: Path):
    (folder / "meta.json").rename(folder / "meta.pkl")
    with pytest.raises(DataError, match=r"unpickling runs code"):
        open_dataset(folder, block_size=16)


def _rewrite_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))
