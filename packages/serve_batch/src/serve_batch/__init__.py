"""Turns prompt files of any size into text: one record per row, in order, whatever dies on the way.

manifest = serve_batch.run(model="models/gpt2", input="prompts/*.jsonl", output="completions")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve_batch.errors import JobError as JobError
    from serve_batch.errors import UsageError as UsageError
    from serve_batch.handler import JaxModelHandler as JaxModelHandler
    from serve_batch.job import run as run
    from serve_batch.transforms import Generate as Generate

_MODULE_OF = {
    "run": "job",
    "Generate": "transforms",
    "JaxModelHandler": "handler",
    "JobError": "errors",
    "UsageError": "errors",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _MODULE_OF:
        raise AttributeError(f"module 'serve_batch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"serve_batch.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
