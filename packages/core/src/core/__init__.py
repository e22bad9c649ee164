"""GPT models in JAX/Flax: the part of flaxmill that every other package stands on.

    model, params, tokenizer = core.load("models/gpt2")
    engine = core.Engine(model, params, tokenizer)

Names load on first use, so that a launcher or `--help` that needs only `core.config` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.config import PRESETS as PRESETS
    from core.config import GPT2Config as GPT2Config
    from core.engine import Engine as Engine
    from core.errors import CheckpointError as CheckpointError
    from core.errors import ConfigError as ConfigError
    from core.errors import FlaxmillError as FlaxmillError
    from core.errors import RequestError as RequestError
    from core.errors import SamplingError as SamplingError
    from core.errors import TokenizerError as TokenizerError
    from core.losses import Batch as Batch
    from core.losses import cross_entropy as cross_entropy
    from core.losses import loss as loss
    from core.models import Model as Model
    from core.models import build as build
    from core.models import load as load
    from core.requests import Completion as Completion
    from core.requests import Event as Event
    from core.requests import Request as Request
    from core.sampling import Sampling as Sampling
    from core.tokenizer import Tokenizer as Tokenizer

_MODULE_OF = {
    "CheckpointError": "errors",
    "PRESETS": "config",
    "ConfigError": "errors",
    "GPT2Config": "config",
    "Completion": "requests",
    "Engine": "engine",
    "Event": "requests",
    "Request": "requests",
    "RequestError": "errors",
    "FlaxmillError": "errors",
    "load": "models",
    "Batch": "losses",
    "cross_entropy": "losses",
    "loss": "losses",
    "Model": "models",
    "build": "models",
    "Sampling": "sampling",
    "SamplingError": "errors",
    "Tokenizer": "tokenizer",
    "TokenizerError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"core.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
