"""One amplified tiny model and one engine for all of core's tests, so that each shape compiles once."""

from typing import Any

import jax
import pytest

import tiny
from core.engine import Engine
from core.models import Model, build
from core.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def model() -> Model:
    return build(tiny.config())


@pytest.fixture(scope="session")
def params(model: Model) -> dict[str, Any]:
    return tiny.params(model)


@pytest.fixture(scope="session")
def apply(model: Model) -> Any:
    return jax.jit(model.apply)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Speaks UTF-8 bytes; the vocabulary has six rows more than the tokenizer, and the cache one length only.

    The weights are so large that greedy text has twenty different tokens and not the same few over and over.
    """
    tokenizer = Tokenizer.utf8()
    model = build(tiny.config(vocab_size=tokenizer.vocab_size + 6))
    return Engine(model, tiny.params(model, amplify=25), tokenizer, slots=5)
