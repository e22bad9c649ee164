import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import core
import serve_batch
import tiny
from core import checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights, bytes for tokens, a context of 61."""
    tokenizer = core.Tokenizer.utf8()
    config = tiny.config(vocab_size=tokenizer.vocab_size)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save(folder, config, tiny.params(core.build(config)), tokenizer=tokenizer)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`serve_batch.run` on the test's input, with 4 slots and small shards."""

    def call(**arguments: Any) -> dict[str, Any]:
        defaults = {
            "model": model,
            "input": tmp_path / "input" / "*",
            "output": tmp_path / "out",
            "sampling": core.Sampling(max_new_tokens=6, temperature=0.9, top_k=40, seed=3),
            "slots": 4,
            "shard_size": 16,
        }
        return serve_batch.run(**(defaults | arguments))

    return call


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, objects or ready-made lines of bytes, as a file of the test's input folder."""

    def write(rows: Iterable[Any], name: str = "input/prompts.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def read_parts() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads what `cat part-*` would print."""

    def read(output: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in joined_parts(output).splitlines()]

    return read


@pytest.fixture
def join_parts() -> Callable[[Path], bytes]:
    return joined_parts


def joined_parts(output: Path) -> bytes:
    return b"".join(part.read_bytes() for part in sorted(output.glob("part-*.jsonl")))
