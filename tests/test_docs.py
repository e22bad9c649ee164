"""The README and the docs are true: every code block in them runs.

Python blocks of a page run one after another in one namespace; commands run as written. Both run in a folder that has
what the pages speak of: a (tiny) models/gpt2, prompts, the configs and the Makefile.
"""

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import core
import tiny
from core import checkpoint

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

# Commands that end with exit code 1 where there is no network, and what they then say.
NEEDS_NETWORK = {
    "-m convert --model=": "models/src/",
    "-m train.prepare --dataset=": "--text",
}
# What the tests themselves are part of, or what takes minutes: only their names are checked.
NOT_RUN = ("make ",)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s{2,}#.*", "", line).strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder like the checkout, with a tiny model where the pages have GPT-2."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "Makefile", "requirements.txt", "requirements-peers.txt", "packages"):
        (folder / name).symlink_to(ROOT / name)
    config = core.GPT2Config(
        vocab_size=257, n_positions=128, n_embd=24, n_layer=2, n_head=3, eos_token_id=256
    )
    params = tiny.params(core.build(config), amplify=1)
    checkpoint.save(folder / "models" / "gpt2", config, params, tokenizer=core.Tokenizer.utf8())
    (folder / "prompts").mkdir()
    (folder / "prompts" / "a.jsonl").write_text('{"prompt": "The flax mill"}\n')
    text = "All flax is linen in the making. " * 400
    (folder / "input.txt").write_text(text)
    run(
        f"{sys.executable} -m train.prepare --text=input.txt --out=data/shakespeare_char --tokenizer=char",
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def checkout(template, tmp_path_factory):
    """Returns a page's own copy of the folder, in which its blocks follow one another."""

    @functools.cache
    def copy(page: Path, kind: str) -> Path:
        return shutil.copytree(template, tmp_path_factory.mktemp(kind) / page.stem, symlinks=True)

    return copy


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(folder / "hf")}
    environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, checkout, monkeypatch):
    monkeypatch.chdir(checkout(page, "python"))
    namespace = {"__name__": "__main__", "np": np}
    with contextlib.redirect_stdout(io.StringIO()), jax.numpy_dtype_promotion("standard"):
        for block in blocks(page, "python"):
            exec(compile(block, f"{page.name}", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(page, checkout):
    """One after the other, as a reader would: later ones need what earlier ones made."""
    for line in commands(page):
        if not line.startswith(NOT_RUN):
            check_command(line, checkout(page, "bash"))


def check_command(line: str, folder: Path) -> None:
    command = re.sub(r"^python\b", shlex.quote(sys.executable), quickened(line))
    result = run(command, folder)
    expected = next((say for start, say in NEEDS_NETWORK.items() if start in command), None)
    if expected is None:
        assert result.returncode == 0, f"{line}: {result.stderr}"
    else:
        assert result.returncode == 1
        assert expected in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def quickened(command: str) -> str:
    """The same command with fewer iterations, and not in the way of the data that the others need."""
    if "-m train.prepare" in command:
        command = command.replace("--out=data/shakespeare_char", "--out=data/again")
    if "-m train --config" in command:
        small = "max_iters=4 eval_iters=2 eval_interval=2 warmup_iters=1 lr_decay_iters=4 batch_size=2 block_size=16"
        command += "".join(f" --config.{setting}" for setting in small.split())
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page):
    help_text = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = {line.split()[0] for line in help_text.splitlines() if line[:1].isalpha()}
    mentioned = set(re.findall(r"^make ([a-z-]+)", "\n".join(commands(page)), flags=re.M))
    mentioned |= set(re.findall(r"`make ([a-z-]+)", page.read_text()))
    assert mentioned <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_are_there(page):
    named = re.findall(r"`((?:tests|packages|configs|docs|core)/[\w./-]+)`", page.read_text())
    paths = [
        name.replace("core/", "packages/core/src/core/", 1) if name.startswith("core/") else name
        for name in named
    ]
    assert [path for path in paths if not (ROOT / path).exists()] == []
