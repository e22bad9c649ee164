"""OpenAI's models by name, against a bucket on this machine that breaks on demand."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import pytest
from huggingface_hub import close_session

import hf_checkpoints as hf
import openai_checkpoints
import tf_bundles as tf
from convert import ConvertError, convert, openai
from core import checkpoint
from hub_server import Hub, serve, wait_for

LARGE = {"n_vocab": 100_000, "n_ctx": 61, "n_embd": 64, "n_head": 2, "n_layer": 1}
CHUNK = 10 * 1024 * 1024  # huggingface_hub writes what it receives in pieces of this size
TOKENIZER = {"encoder.json": b'{"a": 0}', "vocab.bpe": b"#version: 0.2\n"}
OFFLINE = "http://127.0.0.1:9"


def published(folder: Path, hparams: dict[str, int]) -> dict[str, bytes]:
    """The seven files of a model as OpenAI published them."""
    tf.write(folder, openai_checkpoints.tensors(hparams), crc=google_crc32c.value)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    text = b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    files |= {"checkpoint": text, "hparams.json": json.dumps(hparams).encode()}
    return files | TOKENIZER | {"model.ckpt.meta": b"a graph"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("bucket")
    sizes = {"124M": openai_checkpoints.HPARAMS, "355M": LARGE}
    return {
        f"{name}/{file}": content
        for name, hparams in sizes.items()
        for file, content in published(folder / name, hparams).items()
    }


@pytest.fixture
def bucket(models: dict[str, bytes]) -> Iterator[Hub]:
    with serve(Hub(files=dict(models))) as hub:
        yield hub


@pytest.fixture
def here(bucket: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder whose downloads come from the bucket into a cache of their own; returns the cache."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FLAXMILL_GPT2_URL", f"{bucket.endpoint}/files")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    close_session()  # the library's one client reads the proxies when it is made
    yield tmp_path / "cache" / "flaxmill" / "gpt-2"
    close_session()


def fetch(name: str) -> dict[str, bytes]:
    folder = openai.fetch_companions(name, quiet=True)
    openai.fetch_weights(name, quiet=True)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def files(models: dict[str, bytes], name: str) -> dict[str, bytes]:
    """What is fetched of a model: all but the graph."""
    named = {path.partition("/"): content for path, content in models.items()}
    of_model = {file: content for (model, _, file), content in named.items() if model == name}
    return {file: content for file, content in of_model.items() if file != "model.ckpt.meta"}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return hf.run("convert", *flags, cwd=Path.cwd())


def test_a_name_is_a_model_folder_whose_manifest_says_where_it_is_from(bucket: Hub, here: Path):
    done = run("--model=124M")
    assert (done.returncode, done.stdout, done.stderr) == (0, "models/124M\n", "")
    folder = checkpoint.open("models/124M")
    w = openai_checkpoints.tensors()["model/h0/mlp/c_fc/w"][0]
    assert hf.same_bits(folder.tensors["blocks.0.mlp.up.kernel"], w)
    assert folder.manifest["source"]["url"] == f"{bucket.endpoint}/files/124M"
    assert Path("models/124M/vocab.json").read_bytes() == TOKENIZER["encoder.json"]
    assert Path("models/124M/merges.txt").read_bytes() == TOKENIZER["vocab.bpe"]


def test_everything_but_the_graph_is_fetched_and_no_token_is_sent(bucket: Hub, here: Path, models):
    assert fetch("124M") == files(models, "124M")
    assert [file for file, _ in bucket.downloads()] == [
        f"124M/{file}" for file in (*openai.COMPANIONS, openai.WEIGHTS)
    ]
    assert bucket.authorizations == {""}


def test_what_was_fetched_once_needs_no_request(
    bucket: Hub, here: Path, models, monkeypatch: pytest.MonkeyPatch
):
    fetch("124M")
    bucket.requests.clear()
    monkeypatch.setenv("FLAXMILL_GPT2_URL", OFFLINE)
    assert fetch("124M") == files(models, "124M")
    assert bucket.requests == []


@pytest.mark.parametrize("resets", [False, True])
def test_a_broken_connection_resumes_where_it_broke(bucket: Hub, here: Path, models, resets: bool):
    bucket.cuts, bucket.resets = [15_000_000], resets
    assert fetch("355M") == files(models, "355M")
    weights = [range_ for file, range_ in bucket.downloads() if file.endswith(openai.WEIGHTS)]
    assert weights == [None, f"bytes={CHUNK}-"]


def test_a_server_that_knows_no_ranges_sends_it_all_again(bucket: Hub, here: Path, models):
    bucket.cuts, bucket.ignores_ranges = [15_000_000], True
    assert fetch("355M") == files(models, "355M")


def test_a_bucket_that_stays_broken_is_told_and_the_next_run_resumes(
    bucket: Hub, here: Path, models
):
    openai.fetch_companions("355M", quiet=True)
    bucket.cuts = [15_000_000]
    weights = f"355M/{openai.WEIGHTS}"
    refuse = threading.Thread(
        target=lambda: _once(lambda: (weights, None) in bucket.downloads(), bucket)
    )
    refuse.start()
    size = len(models[weights])
    kept = f"{CHUNK:,} of {size:,} bytes are kept, run this again to resume"
    with pytest.raises(ConvertError, match=kept):
        openai.fetch_weights("355M", quiet=True)
    refuse.join()

    bucket.refuses = False
    bucket.requests.clear()
    assert fetch("355M") == files(models, "355M")
    assert bucket.downloads() == [(weights, f"bytes={CHUNK}-")]


def _once(happened: Callable[[], object], bucket: Hub) -> None:
    wait_for(happened)
    bucket.refuses = True


def test_a_killed_download_resumes_in_the_next_process(bucket: Hub, here: Path, models):
    bucket.cuts, bucket.stall = [15_000_000], threading.Event()
    killed = subprocess.Popen([sys.executable, "-m", "convert", "--model=355M"])
    partial = here / "355M" / f"{openai.WEIGHTS}.incomplete"
    wait_for(lambda: partial.exists() and partial.stat().st_size >= CHUNK)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not Path("models").exists()

    bucket.requests.clear()
    assert fetch("355M") == files(models, "355M")
    assert bucket.downloads() == [(f"355M/{openai.WEIGHTS}", f"bytes={CHUNK}-")]


def test_a_file_of_another_size_than_was_said_is_deleted_and_told(bucket: Hub, here: Path, models):
    bucket.claimed = {"124M/hparams.json": 99}
    size = len(models["124M/hparams.json"])
    with pytest.raises(ConvertError, match=f"{size} bytes arrived of 99 that .* run this again"):
        fetch("124M")
    assert not list(here.rglob("hparams.json*e"))
    bucket.claimed = {}
    assert fetch("124M") == files(models, "124M")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (openai.WEIGHTS, b"\1", "is damaged: its CRC32C"),
        (openai.INDEX, b"\1", "does not have its CRC32C"),
        ("hparams.json", b"<", "cannot be read as JSON"),
    ],
)
def test_what_arrived_damaged_is_deleted_and_told(
    bucket: Hub, here: Path, models, file: str, damage: bytes, message: str
):
    bucket.files[f"124M/{file}"] = damage + models[f"124M/{file}"][1:]
    with pytest.raises(ConvertError, match=f"{message}.*the download was deleted, run this again"):
        fetch("124M")
    assert not (here / "124M" / f"{file}.incomplete").exists()
    bucket.files = dict(models)
    assert fetch("124M") == files(models, "124M")


def test_a_file_that_is_not_there_is_told_with_its_address(bucket: Hub, here: Path):
    del bucket.files["124M/vocab.bpe"]
    address = f"{bucket.endpoint}/files/124M/vocab.bpe"
    with pytest.raises(ConvertError, match=f"{address}: expected a file .* found status 404"):
        fetch("124M")
    bucket.refuses = True
    with pytest.raises(ConvertError, match=r"is down \(503\)"):
        fetch("355M")


def test_no_network_is_one_line_that_names_the_folder_and_the_files(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLAXMILL_GPT2_URL", OFFLINE)
    error = hf.the_error(run("--model=1558M"))
    assert f"no network: {OFFLINE} cannot be reached" in error
    needed = (
        "hparams.json, model.ckpt.index, encoder.json, vocab.bpe and model.ckpt.data-00000-of-00001"
    )
    assert f"Put {needed} into models/src/1558M and run this again" in error


def test_files_put_there_by_hand_are_used_instead(bucket: Hub, here: Path, models):
    folder = Path("models/src/124M")
    folder.mkdir(parents=True)
    for file, content in files(models, "124M").items():
        if file != "checkpoint":
            (folder / file).write_bytes(content)
    assert run("--model=124M").returncode == 0
    assert checkpoint.open("models/124M").config.parameter_count == 18_288
    assert bucket.requests == []


def test_a_dry_run_fetches_no_weights(bucket: Hub, here: Path, models):
    done = run("--model=355M", "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    size = len(models[f"355M/{openai.WEIGHTS}"])
    assert f"fetches {openai.WEIGHTS} ({size:,} bytes)" in done.stdout
    assert "n_embd=64" in done.stdout
    assert not any(file.endswith(openai.WEIGHTS) for file, _ in bucket.downloads())


def test_a_revision_is_for_the_hub(here: Path):
    with pytest.raises(ConvertError, match="124M is OpenAI's own and has none"):
        convert("124M", out="out", revision="main")
