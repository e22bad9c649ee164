"""What every test stands on: strict JAX, a compilation cache between runs, the shared test data."""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One cache for all workers and the processes that they start; small programs are most of what tests compile.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "FLAXMILL_JAX_CACHE", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples in every run, and no deadline: a first call may compile.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder with GPT-2's BPE files and tinyshakespeare; tests that need it skip without."""
    folder = os.environ.get("FLAXMILL_TESTDATA")
    if not folder:
        pytest.skip("FLAXMILL_TESTDATA names no folder with gpt2_vocab.bpe and tinyshakespeare.txt")
    return Path(folder)
