"""A small data folder of real text, and the smallest run worth the name."""

import dataclasses
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from core.tokenizer import Tokenizer
from train.config import TrainConfig
from train.prepare import prepare


@pytest.fixture(autouse=True)
def optax_promotes() -> Iterator[None]:
    """optax raises a float to an int32 power, which tests/conftest.py's strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def text() -> str:
    """Python's own reference: offline, ASCII, and long enough to overfit to."""
    topics = pydoc_data.topics.topics
    return "".join(topics[name] for name in ("strings", "lambda", "formatstrings"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """The `data_dir` that holds the dataset "small"."""
    folder = tmp_path_factory.mktemp("data")
    prepare([text], folder / "small", tokenizer=Tokenizer.characters(text))
    return folder


@pytest.fixture(scope="session")
def base_config(data_dir: Path) -> TrainConfig:
    """Two layers, 41 updates, everything switched on that could break a resume; out_dir is yours to set."""
    return TrainConfig(
        data_dir=str(data_dir),
        dataset="small",
        n_layer=2,
        n_head=3,
        n_embd=24,
        block_size=16,
        batch_size=5,
        gradient_accumulation_steps=3,
        dropout=0.2,
        bias=True,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=5,
        lr_decay_iters=40,
        max_iters=40,
        eval_interval=10,
        eval_iters=4,
        device="cpu",
    )


@pytest.fixture
def config(base_config: TrainConfig, tmp_path: Path) -> TrainConfig:
    return dataclasses.replace(base_config, out_dir=str(tmp_path / "out"))


@pytest.fixture(scope="session")
def smallest_config(data_dir: Path) -> TrainConfig:
    """One layer, four updates, an evaluation before the first, the third and the last; out_dir is yours to set."""
    return TrainConfig(
        data_dir=str(data_dir),
        dataset="small",
        n_layer=1,
        n_head=2,
        n_embd=8,
        block_size=12,
        batch_size=3,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=1,
        lr_decay_iters=4,
        max_iters=3,
        eval_interval=2,
        eval_iters=2,
        device="cpu",
    )
