"""The workspace keeps its promises: declared dependencies, light imports, help in no time."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "convert", "train", "serve_batch", "bench")
DOORS = (
    "core.generate",
    "core.quality",
    "convert",
    "convert.export",
    "convert.verify",
    "train",
    "train.prepare",
    "train.hellaswag",
    "serve_batch",
    "bench",
    "bench.demo",
    "bench.env",
)
# Peers run in an interpreter of their own, which has them.
PEERS = {"ctranslate2", "llama_cpp", "onnxruntime", "torch", "transformers"}


def imported(package: str) -> set[str]:
    """The top-level modules that a package's files import."""
    names: set[str] = set()
    for file in (ROOT / "packages" / package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_a_declared_dependency(package):
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]

    def names(dependencies: list[str]) -> set[str]:
        return {re.split(r"[\[<>=!~ ]", d)[0].lower().replace("_", "-") for d in dependencies}

    declared = names(project["dependencies"])
    extras = {
        n for group in project.get("optional-dependencies", {}).values() for n in names(group)
    }
    distributions = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in imported(package) - extras - (PEERS if package == "bench" else set())
        if not declared
        & {d.lower().replace("_", "-") for d in distributions.get(name, [f"flaxmill-{name}"])}
    }
    assert missing == set()


@pytest.mark.parametrize("door", DOORS)
def test_help_takes_less_than_a_second(door):
    """The best of three, because the machine may be busy; what is held is that no heavy import is on the way."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", door, "--help"], capture_output=True, text=True, check=False
        )
        best = min(best, time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
        if best < 1:
            return
    assert best < 1


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("arguments", [["--no_such_flag=1"], ["stray"]])
def test_wrong_usage_is_one_line_and_exit_code_2(door, arguments):
    result = subprocess.run(
        [sys.executable, "-m", door, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_pins_name_no_registry():
    for name in ("requirements.txt", "requirements-peers.txt"):
        assert "://" not in (ROOT / name).read_text()
