"""How other people name and lay out the tensors of the families we know: rows of data, one module a family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.mapping import Table
from convert.tables import gpt2
from core.config import ConfigError, GPT2Config

HF: dict[str, Table] = {"gpt2": gpt2.HF}
"""The Hugging Face table of every family."""


def read_config(path: Path, config: Mapping[str, Any]) -> GPT2Config:
    """Returns what the Hugging Face config.json found at `path` describes.

    Raises:
      ConvertError: another family, or keys that are not understood; all of them are named.
    """
    try:
        return GPT2Config.from_hf(config)
    except ConfigError as error:
        raise ConvertError(f"{path}: {error}") from error
