"""Models by name, against a hub on this machine that speaks the real one's protocol and breaks on demand."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hf_checkpoints as hf
from core import checkpoint
from hub_server import Hub, serve, wait_for

REPO = "flax/tiny"
OLD, NEW, LARGE = "0" * 39 + "1", "0" * 39 + "2", "0" * 39 + "3"
LARGE_CONFIG = {**hf.CONFIG, "n_layer": 1, "n_embd": 64, "vocab_size": 100_000}
PYTORCH = Path(__file__).parents[1] / "golden" / "pytorch"
CHUNK = 10 * 1024 * 1024  # huggingface_hub writes what it receives in pieces of this size


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("repo")
    old = hf.write(folder / "old", hf.tensors(seed=1))
    new = hf.write(folder / "new", hf.tensors(seed=2), shards=2)
    large = hf.write(
        folder / "large", hf.tensors(config=LARGE_CONFIG), config=LARGE_CONFIG, files={}
    )
    return {OLD: content(old), NEW: content(new), LARGE: content(large)}


@pytest.fixture
def hub(commits: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with serve(Hub(repos={REPO: dict(commits)}, branches={"main": NEW, "v1": OLD})) as hub:
        yield hub


Run = Callable[..., subprocess.CompletedProcess[str]]

# The download alone, for the tests that are about nothing else: it prints the folder, or fails as the command does.
_FETCH = """
import sys
from convert import ConvertError, hub
try:
    snapshot = hub.resolve(*sys.argv[1:])
    print(hub.fetch_companions(snapshot))
    hub.fetch_weights(snapshot)
except ConvertError as error:
    sys.exit(f"error: {error}")
"""


def environment(tmp_path: Path, endpoint: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and "HF_" not in k
    }
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Runs `python -m convert --out=out` with a cache of its own against the local hub."""
    return functools.partial(
        hf.run, "convert", "--out=out", cwd=tmp_path, env=environment(tmp_path, hub.endpoint)
    )


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Run:
    """Downloads (name, revision) with a cache of its own from the local hub."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _FETCH, *arguments],
            cwd=tmp_path,
            env=environment(tmp_path, hub.endpoint),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def fetched(done: subprocess.CompletedProcess[str]) -> dict[str, bytes]:
    assert (done.returncode, done.stderr) == (0, "")
    return content(Path(done.stdout.strip()))


def source_of(folder: Path) -> dict:
    return dict(checkpoint.open(folder).manifest["source"])


def test_a_branch_is_resolved_once_and_its_commit_recorded(hub: Hub, run: Run, tmp_path: Path):
    done = run(f"--model={REPO}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")
    assert source_of(tmp_path / "out")["repo"] == REPO
    assert source_of(tmp_path / "out")["revision"] == NEW
    assert sum("/api/models/" in path for _, path, _ in hub.requests) == 1
    assert {resolved.partition("/")[0] for resolved in hub.resolved()} == {NEW}
    weights = hf.as_parameters(hf.tensors(seed=2))
    found = checkpoint.open(tmp_path / "out").tensors
    assert all(hf.same_bits(found[name], weights[name]) for name in weights)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == hf.FILES["tokenizer.json"]


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_tag_or_a_commit_pins_the_download(fetch: Run, commits, revision: str):
    done = fetch(REPO, revision)
    assert fetched(done) == commits[OLD]
    assert Path(done.stdout.strip()).name == OLD


def test_only_what_is_needed_is_fetched(hub: Hub, fetch: Run, commits):
    hub.repos[REPO][NEW] = commits[NEW] | {"pytorch_model.bin": b"PK", "onnx/model.onnx": b"x"}
    assert fetched(fetch(REPO)) == commits[NEW]


@pytest.mark.parametrize("resets", [False, True])
def test_a_broken_connection_resumes_where_it_broke(hub: Hub, fetch: Run, commits, resets: bool):
    hub.cuts, hub.resets = [15_000_000], resets
    assert fetched(fetch(REPO, LARGE)) == commits[LARGE]
    assert hub.storage_requests() == [None, f"bytes={CHUNK}-"]


def test_it_resumes_for_as_long_as_every_attempt_brings_something(hub: Hub, fetch: Run, commits):
    hub.cuts = [11_000_000, 11_000_000]
    assert fetched(fetch(REPO, LARGE)) == commits[LARGE]
    assert hub.storage_requests() == [None, f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-"]


def test_a_hub_that_stays_broken_is_told_and_the_next_run_resumes(
    hub: Hub, run: Run, tmp_path: Path
):
    hub.cuts = [15_000_000]
    threading.Thread(target=lambda: (wait_for(hub.storage_requests), _refuse(hub))).start()
    error = hf.the_error(run(f"--model={REPO}", f"--revision={LARGE}"))
    size = len(hub.repos[REPO][LARGE]["model.safetensors"])
    assert f"{CHUNK:,} of {size:,} bytes are kept, run this again to resume" in error
    assert not (tmp_path / "out").exists()

    hub.refuses = False
    hub.requests.clear()
    assert run(f"--model={REPO}", f"--revision={LARGE}").returncode == 0
    assert hub.storage_requests() == [f"bytes={CHUNK}-"]


def _refuse(hub: Hub) -> None:
    hub.refuses = True


def test_a_killed_download_resumes_in_the_next_process(
    hub: Hub, fetch: Run, tmp_path: Path, commits
):
    hub.cuts, hub.stall = [15_000_000], threading.Event()
    flags = [f"--model={REPO}", f"--revision={LARGE}", "--out=out"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "convert", *flags],
        cwd=tmp_path,
        env=environment(tmp_path, hub.endpoint),
    )
    blobs = tmp_path / "hf" / "hub" / "models--flax--tiny" / "blobs"
    wait_for(lambda: any(p.stat().st_size >= CHUNK for p in blobs.glob("*.incomplete")))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists()

    hub.requests.clear()
    assert fetched(fetch(REPO, LARGE)) == commits[LARGE]
    assert hub.storage_requests() == [f"bytes={CHUNK}-"]


def test_what_arrived_wrong_is_deleted_and_told(hub: Hub, fetch: Run, tmp_path: Path, commits):
    digest = hashlib.sha256(commits[OLD]["model.safetensors"]).hexdigest()
    partial = tmp_path / "hf" / "hub" / "models--flax--tiny" / "blobs" / f"{digest}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"not the beginning of that file")
    assert "it was deleted, run this again" in hf.the_error(fetch(REPO, "v1"), stdout=None)
    assert not partial.exists()
    assert fetched(fetch(REPO, "v1")) == commits[OLD]


def test_a_leftover_longer_than_the_file_is_thrown_away(
    hub: Hub, fetch: Run, tmp_path: Path, commits
):
    data = commits[OLD]["model.safetensors"]
    digest = hashlib.sha256(data).hexdigest()
    partial = tmp_path / "hf" / "hub" / "models--flax--tiny" / "blobs" / f"{digest}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data + b"and more")
    assert fetched(fetch(REPO, "v1")) == commits[OLD]


def test_what_is_cached_needs_no_network(hub: Hub, run: Run, tmp_path: Path):
    assert run(f"--model={REPO}").returncode == 0
    first = hf.digests(tmp_path / "out")
    offline = environment(tmp_path, "http://127.0.0.1:9")
    done = run(f"--model={REPO}", "--overwrite", env=offline)
    assert done.returncode == 0, done.stderr
    assert hf.digests(tmp_path / "out") == first


def test_no_network_is_one_line_that_names_the_folder_and_the_files(tmp_path: Path):
    started = time.monotonic()
    done = hf.run(
        "convert", "--model=gpt2-xl", cwd=tmp_path, env=environment(tmp_path, "http://127.0.0.1:9")
    )
    error = hf.the_error(done)
    assert "no network: http://127.0.0.1:9 cannot be reached" in error
    assert "into models/src/gpt2-xl and run this again" in error
    assert all(name in error for name in ("config.json", "model.safetensors", "tokenizer.json"))
    assert time.monotonic() - started < 15
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=flax/none"], "has no model flax/none"),
        ([f"--model={REPO}", "--revision=v9"], f"{REPO} has no revision 'v9'"),
        (["--model=gpt-2"], "neither a path here nor a model"),
    ],
)
def test_an_unknown_model_or_revision_is_told(run: Run, flags: list[str], message: str):
    assert message in hf.the_error(run(*flags))


def test_what_cannot_be_converted_is_not_downloaded(hub: Hub, run: Run, commits):
    hub.repos[REPO][NEW] = commits[NEW] | {"config.json": b'{"model_type": "llama"}'}
    assert "model_type is 'llama'" in hf.the_error(run(f"--model={REPO}"))
    assert hub.storage_requests() == []


def test_a_repository_without_safetensors_says_what_it_has(hub: Hub, run: Run, commits):
    hub.repos[REPO][NEW] = {
        "config.json": commits[NEW]["config.json"],
        "tf_model.h5": b"HDF",
    }
    assert "found tf_model.h5" in hf.the_error(run(f"--model={REPO}"))
    assert hub.storage_requests() == []


@pytest.mark.parametrize("file", ["zip.bin", "legacy.bin"])
def test_a_repository_without_safetensors_is_fetched_as_pytorchs(
    hub: Hub, run: Run, commits, tmp_path: Path, file: str
):
    companions = {n: x for n, x in commits[NEW].items() if "safetensors" not in n}
    hub.repos[REPO][NEW] = companions | {"pytorch_model.bin": (PYTORCH / file).read_bytes()}
    done = run(f"--model={REPO}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")
    assert source_of(tmp_path / "out")["revision"] == NEW
    assert "pytorch_model.bin" in source_of(tmp_path / "out")["files"]
    weights = hf.as_parameters(hf.tensors())
    found = checkpoint.open(tmp_path / "out").tensors
    assert all(hf.same_bits(found[name], weights[name]) for name in weights)


def test_pytorchs_shards_are_those_of_its_index(hub: Hub, fetch: Run, commits):
    index = json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}).encode()
    shards = {"one.bin": b"1", "two.bin": b"2", "pytorch_model.bin.index.json": index}
    kept = {"config.json": commits[NEW]["config.json"], **shards}
    hub.repos[REPO][NEW] = kept | {"three.bin": b"3"}
    assert fetched(fetch(REPO)) == kept


def test_a_shard_that_the_repository_lacks_is_told_before_any_is_fetched(
    hub: Hub, run: Run, fetch: Run, commits
):
    hub.repos[REPO][NEW] = {
        name: data
        for name, data in commits[NEW].items()
        if name != "model-00002-of-00002.safetensors"
    }
    for done in (run(f"--model={REPO}", "--dry_run"), fetch(REPO)):
        assert "lacks model-00002-of-00002.safetensors" in hf.the_error(done, stdout=None)
    assert hub.storage_requests() == []


def test_pytorchs_weights_resume_too_and_are_hashed(hub: Hub, fetch: Run, commits):
    weights = os.urandom(26_000_000)
    hub.repos[REPO][NEW] = {
        "config.json": commits[NEW]["config.json"],
        "pytorch_model.bin": weights,
    }
    hub.cuts = [15_000_000]
    assert fetched(fetch(REPO))["pytorch_model.bin"] == weights
    assert hub.storage_requests() == [None, f"bytes={CHUNK}-"]


def test_a_dry_run_says_what_would_be_fetched(hub: Hub, run: Run, tmp_path: Path):
    done = run(f"--model={REPO}", f"--revision={LARGE}", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert f"{REPO} at {LARGE}" in done.stdout
    assert f"{len(hub.repos[REPO][LARGE]['model.safetensors']):,} bytes" in done.stdout
    assert hub.storage_requests() == []
    assert not (tmp_path / "out").exists()
