"""Prints versions, devices and pins, for a bug report: `make env`."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from core import door

DISTRIBUTIONS = (
    "flaxmill-core jax jaxlib flax optax orbax-checkpoint apache-beam safetensors tokenizers"
    " huggingface-hub ml-collections numpy torch transformers"
).split()


def facts() -> dict[str, str]:
    """Returns what a report of a bug should say about the machine and the installation."""
    import jax

    pins = Path("requirements.txt")
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:16] if pins.exists() else "not here"
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "devices": ", ".join(str(device) for device in jax.devices()),
        "requirements.txt": digest,
        **{name: _version(name) for name in DISTRIBUTIONS},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    for name, value in facts().items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    door.run(main)
