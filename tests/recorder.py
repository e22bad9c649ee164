"""A stand-in for packages that are extras and not installed here."""

import importlib.machinery
import types
from typing import Any


class Recorder(types.ModuleType):
    """Stands in for wandb or tensorboardX, which are extras: remembers what it was told."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.told: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "errors":
            return types.SimpleNamespace(CommError=ConnectionError)

        def tell(*arguments: Any, **options: Any) -> Any:
            self.told.append((name, arguments, options))
            return self

        return tell

    def calls(self, name: str) -> list[Any]:
        return [options or arguments for what, arguments, options in self.told if what == name]
