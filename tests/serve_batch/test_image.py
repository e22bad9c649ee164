"""The image for workers, as far as can be told without Docker: what it is made of is there, installs, and imports."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serve_batch import runners

with runners.quiet():
    import apache_beam as beam

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "packages" / "serve_batch" / "Dockerfile").read_text()


def test_the_image_has_the_launcher_s_python_and_beam():
    python, version = re.findall(
        r"^FROM apache/beam_python([\d.]+)_sdk:([\d.]+)$", DOCKERFILE, re.M
    )[0]
    assert version == beam.__version__
    assert f"apache-beam=={version}" in (ROOT / "requirements.txt").read_text()
    assert python == "3.11"  # what every package here supports, and CI runs


def uv(*arguments: str | Path) -> None:
    tool = os.environ.get("UV") or shutil.which("uv") or str(ROOT / ".bootstrap" / "bin" / "uv")
    try:
        done = subprocess.run(
            [tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=250
        )
    except OSError as error:
        pytest.skip(f"no uv: {error}")
    if done.returncode and re.search("error sending request|dns error|offline", done.stderr):
        pytest.skip(f"no network: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheels_install_beside_the_pins_and_import(tmp_path):
    wheels, python = tmp_path / "dist", tmp_path / "venv" / "bin" / "python"
    uv("build", "-q", "--all-packages", "--wheel", "--out-dir", wheels)
    uv("venv", "-q", "--python", sys.executable, tmp_path / "venv")
    install = ("pip", "install", "-q", "--python", python, "--no-deps")
    uv(*install, "--require-hashes", "-r", "requirements.txt")
    uv(*install, *sorted(wheels.glob("*.whl")))
    code = (
        "import serve_batch.runners, serve_batch.transforms, serve_batch.handler, core\n"
        "print(serve_batch.__file__)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=100
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert Path(shown.stdout.strip()).is_relative_to(tmp_path / "venv")
