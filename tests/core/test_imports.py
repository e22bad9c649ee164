import resource
import subprocess
import sys

import pytest

import core


@pytest.mark.parametrize(
    "code",
    [
        "import core",
        "import core.config, core.axes",
        "import core.tokenizer",
        "import core.errors",
        "import core.chat, core.harmony",
        "import core.sampling_flags",
    ],
)
def test_a_launcher_does_not_wait_for_jax(code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    check = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = set(done.stdout.split())
    assert "core" in loaded
    assert not {"jax", "jaxlib", "flax", "torch"} & loaded
    # Processor time, which a busy machine does not stretch: 0.04 s; jax alone would take 1.5.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_every_public_name_is_there():
    names = [name for name in dir(core) if name[0].isupper() or name in {"load", "loss", "build"}]
    assert {"Engine", "Sampling", "GPT2Config", "Tokenizer", "Batch", "Completion"} <= set(names)
    for name in names:
        assert getattr(core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        core.nothing  # noqa: B018
