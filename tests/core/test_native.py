"""How the kernels come to be: compiled once, whole or not at all, and nobody needs a compiler."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import tiny
from core import models, native
from core.engine import Engine
from core.errors import NativeError
from core.native import build


@pytest.fixture
def real() -> Path:
    """A whole library."""
    if not native.available():
        pytest.skip("no native kernels: no C++ compiler, or FLAXMILL_NATIVE=off")
    return build.library(next(iter(build.isas().values())))


@pytest.fixture
def compiler(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes no time: a copy of the library is what it links. Returns the list of what it has linked."""
    linked, script = tmp_path / "linked", tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
        [ "$1" = --version ] && exec echo "a quick compiler 1.0"
        for last; do :; done
        case " $* " in *" -shared "*) sleep 0.3; echo "$last" >> {linked}; exec cp {real} "$last";; esac
        : > "$last"
        """
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return linked


def made() -> Path:
    return build.library(next(iter(build.isas().values())))


def test_a_library_is_compiled_once_and_kept(compiler: Path, real: Path, tmp_path: Path):
    path = made()
    assert path == made()
    assert path.is_relative_to(tmp_path / "cache" / "flaxmill" / "native")
    assert path.read_bytes() == real.read_bytes()
    assert len(compiler.read_text().splitlines()) == 1
    assert {file.suffix for file in path.parent.iterdir()} == {".so", ".lock"}


def test_another_compiler_makes_another_library(compiler: Path, tmp_path: Path):
    path = made()
    script = tmp_path / "c++"
    script.write_text(script.read_text().replace("1.0", "1.1"))
    assert made() != path


@pytest.mark.parametrize("left", [0, 1000, -1])
def test_a_torn_library_is_made_again(compiler: Path, left: int):
    path = made()
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    again = made()
    assert again.read_bytes() == whole
    assert len(compiler.read_text().splitlines()) == 2


def test_processes_that_ask_at_once_share_one_compilation(compiler: Path):
    script = "from core.native import build; print(build.library(build.isas()['plain']))"
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1
    assert Path(said.pop().strip()).is_file()
    assert len(compiler.read_text().splitlines()) == 1


def test_of_old_libraries_those_used_last_are_kept(compiler: Path):
    mine = made()
    for age in range(1, 12):
        for suffix in ("-00.so", ".lock"):
            path = mine.with_name(f"avx2-{age:02}{suffix}")
            path.touch()
            os.utime(path, (10_000 - age, 10_000 - age))
    os.utime(mine, (0, 0))
    assert made() == mine  # which is used again, and so the newest
    other = build.library(build.isas()["plain"])
    kept = {path.stem.rpartition("-")[0] for path in mine.parent.glob("*.so")}
    ours = {path.stem.rpartition("-")[0] for path in (mine, other)}
    assert kept == ours | {f"avx2-{age:02}" for age in range(1, 7)}
    assert {path.stem for path in mine.parent.glob("*.lock")} == kept


def test_without_a_cache_to_write_to_the_library_is_temporary(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = made()
    assert path.parent == tmp_path / f"flaxmill-native-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_to_is_not_trusted(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache" / "flaxmill" / "native"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert made().is_relative_to(tmp_path / "home" / ".cache")


def test_what_the_compiler_refuses_is_told_in_one_line(
    compiler: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exec echo 1\necho 'in x.h:'; echo 'x.h:3: error: no such thing'; exit 1"
    )
    with pytest.raises(NativeError, match=r"ended with 1: x.h:3: error: no such thing$"):
        made()
    assert not compiler.exists()
    build.main()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_compiler_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(NativeError, match=r"no C\+\+ compiler that runs \(CXX=.*none\); install"):
        made()


ANYWHERE = """
import jax, jax.numpy as jnp
from core import layers, native
x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
for _ in range(2):
    with native.serving():
        print(jax.jit(lambda: layers.linear(x, kernel, None))().sum(), native.available())
"""


def test_without_a_compiler_one_line_says_so_and_xla_serves(tmp_path: Path):
    environment = os.environ | {"PATH": "", "FLAXMILL_NATIVE": "auto", "HOME": str(tmp_path)}
    environment = {key: value for key, value in environment.items() if key != "CXX"}
    run = [sys.executable, "-c", ANYWHERE]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["24.0", "False"] * 2, done
    (line,) = done.stderr.splitlines()
    assert "found no C++ compiler" in line
    environment["FLAXMILL_NATIVE"] = "require"
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FLAXMILL_NATIVE=require, and no native kernels: found no C++" in done.stderr


@pytest.mark.parametrize("name", ["FLAXMILL_NATIVE", "FLAXMILL_NATIVE_ISA"])
def test_a_setting_that_is_none_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FLAXMILL_NATIVE", raising=False)
    monkeypatch.setenv(name, "yes")
    with pytest.raises(NativeError, match=f"{name}=yes"):
        native.available()


def test_off_is_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLAXMILL_NATIVE", "off")
    assert not native.available()
    with native.serving():
        assert not native.is_serving()
    with pytest.raises(NativeError, match="product is a native kernel, and there are none"):
        native.product(jnp.ones((1, 2)), jnp.ones((2, 3)), axis=0)


def test_serving_is_for_what_is_traced_inside_on_one_device(real: Path):
    seen = []
    traced = jax.jit(lambda: seen.append(native.is_serving()))
    traced()
    with native.serving():
        traced()
        mesh = jax.make_mesh((1,), ("data",))
        with jax.set_mesh(mesh):
            assert not native.is_serving()
    traced()
    assert seen == [False, True]  # and the third is the first one again


def test_an_engine_that_cannot_have_what_is_asked_for_fails_before_there_are_requests(
    monkeypatch: pytest.MonkeyPatch,
):
    model = models.build(tiny.config(n_layer=1))
    params = tiny.params(model)
    monkeypatch.setenv("FLAXMILL_NATIVE", "sometimes")
    with pytest.raises(NativeError, match="it is one of auto, off, require"):
        Engine(model, params, slots=1)
