"""What a model is: one frozen dataclass a family, read from Hugging Face's config.json or from a model folder.

Configurations know sizes and variants, never files or arrays. Whatever a config.json says that is not understood here
is an error, because a key that is skipped silently is a wrong model.
"""

from collections.abc import Mapping
from typing import Any

from core.config import gpt2, gpt_oss
from core.config.base import Config as Config
from core.config.gpt2 import ACTIVATIONS as ACTIVATIONS
from core.config.gpt2 import GPT2Config as GPT2Config
from core.config.gpt_oss import GptOssConfig as GptOssConfig
from core.errors import ConfigError as ConfigError

FAMILIES: dict[str, type[Config]] = {"gpt2": GPT2Config, "gpt_oss": GptOssConfig}
"""The families by name, which is Hugging Face's `model_type` too."""

PRESETS: dict[str, Config] = {**gpt2.PRESETS, **gpt_oss.PRESETS}
"""The models that are known by name."""

PRECISIONS = ("float32", "bfloat16", "int8")
"""What a model can compute in, see `core.precision`."""


def from_dict(config: Mapping[str, Any]) -> Config:
    """Reads a model folder's config.json of whichever family it names."""
    return _family(config, "family").from_dict(config)


def from_hf(config: Mapping[str, Any]) -> Config:
    """Reads a Hugging Face config.json of whichever `model_type` it names; see `Config.from_hf`."""
    return _family(config, "model_type").from_hf(config)


def _family(config: Mapping[str, Any], key: str) -> type[Config]:
    family = FAMILIES.get(str(config.get(key)))
    if family is None:
        raise ConfigError(f"{key} is {config.get(key)!r}; expected one of {', '.join(FAMILIES)}")
    return family
