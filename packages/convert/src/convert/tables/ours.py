"""Our own names, in whatever container: every parameter is called what it is called in the Flax tree.

The config is a model folder's, which names its family, or Hugging Face's, where the names are ours.
"""

from collections.abc import Collection, Mapping
from typing import Any

from convert.mapping import Rule, Table, Tie
from core import config as config_lib
from core.config import Config

_HEAD = "lm_head.kernel"


def recognizes(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Tells whether a config is a model folder's, or the tensors are named as there."""
    return (
        "family" in config
        or ("model_type" in config and "blocks.0.norm_1.scale" in names)
        or ("model_type" in config and "blocks.0.ln_1.scale" in names)
    )


def read_config(config: Mapping[str, Any]) -> Config:
    """Returns the model that a config describes."""
    return config_lib.from_dict(config) if "family" in config else config_lib.from_hf(config)


def table(config: Config) -> Table:
    """Returns the rows in which nothing changes.

    >>> from core.config import GPT2Config
    >>> table(GPT2Config(n_layer=1)).rules[2]
    Rule(source='blocks.0.ln_1.scale', target='blocks.0.ln_1.scale', layout='D -> D')
    """
    words = {**config.tensors(), _HEAD: "VD"}
    return Table(
        rules=tuple(Rule(name, name, f"{word} -> {word}") for name, word in words.items()),
        tie=Tie(_HEAD, to="wte.embedding"),
    )
