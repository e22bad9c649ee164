"""What a model folder can be written as, one module each."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from core.checkpoint import ModelFolder

TARGETS = {
    "hf": "convert.targets.hf",
    "nanogpt": "convert.targets.nanogpt",
    "gguf": "convert.targets.gguf",
    "npz": "convert.targets.npz",
    "msgpack": "convert.targets.msgpack",
    "orbax": "convert.targets.orbax",
}
"""The module that writes each format."""


class Target(Protocol):
    """What a module of this package offers.

    `check` returns everything about a model that the format cannot hold, `nbytes` what `write` will report to its
    `on_bytes` in all; `write` fills the empty folder `out` (where `IS_FILE`, the file `out`, which does not exist) and
    returns what the user must hear. `is_own` tells whether such an export lies at a path, where it may be replaced.
    """

    IS_FILE: bool

    def check(self, folder: ModelFolder) -> list[str]: ...

    def nbytes(self, folder: ModelFolder) -> int: ...

    def write(
        self, folder: ModelFolder, out: Path, on_bytes: Callable[[int], None], **options: Any
    ) -> list[str]: ...

    def is_own(self, path: Path) -> bool: ...


def target(name: str) -> Target:
    """Returns the module that writes format `name`, a key of `TARGETS`."""
    return cast(Target, importlib.import_module(TARGETS[name]))
