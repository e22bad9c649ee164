import subprocess
import sys

import pytest

import core


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stderr


@pytest.mark.parametrize(
    "code",
    ["import core", "import core.config, core.axes", "import core.tokenizer", "import core.errors"],
)
def test_a_launcher_does_not_wait_for_jax(code):
    log = run(code)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in log.splitlines() if "|" in line}
    assert "core" in loaded
    assert not {"jax", "jaxlib", "flax", "torch"} & loaded
    seconds = int(log.splitlines()[-1].split("|")[1]) / 1e6
    assert seconds < 1  # 0.1 s on an idle machine; jax alone takes 1.5


def test_every_public_name_is_there():
    names = [name for name in dir(core) if name[0].isupper() or name in {"load", "loss", "build"}]
    assert {"Engine", "Sampling", "GPT2Config", "Tokenizer", "Batch", "Completion"} <= set(names)
    for name in names:
        assert getattr(core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        core.nothing  # noqa: B018
