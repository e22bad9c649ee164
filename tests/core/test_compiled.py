"""Where compiled programs are kept, and what happens where there is no such place."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from core import compiled

_DIR, _LEAST = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def nowhere_yet() -> Iterator[None]:
    """JAX as it is before anyone has told it where; what it was told comes back."""
    before = {name: jax.config.values[name] for name in (_DIR, _LEAST)}
    jax.config.update(_DIR, None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_user_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.keep()
    folder = Path(jax.config.values[_DIR])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "flaxmill" / "compiled"


@pytest.mark.parametrize("cache", ["relative", "file"])
def test_without_a_folder_to_write_to_nothing_is_kept(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", cache if cache == "relative" else str(tmp_path / cache))
    compiled.keep()
    assert jax.config.values[_DIR] is None
    assert not (tmp_path / "relative").exists()
