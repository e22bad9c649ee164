"""A field of contestants whose processes end with the test."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.driver import Field
from bench.peers.contestants import Contestant, environment


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Callable[..., Field]]:
    """Makes a `Field` of the contestants given."""
    with ExitStack() as stack:

        def make(*contestants: Contestant, timeout_s: float = 60, **options: Any) -> Field:
            env = environment(os.environ, device="cpu", threads=2, scratch=tmp_path)
            made = Field(
                contestants,
                env=env,
                scratch=tmp_path,
                logs=tmp_path,
                timeout_s=timeout_s,
                **{"turn_s": 0.02, **options},
            )
            return stack.enter_context(made)

        yield make
