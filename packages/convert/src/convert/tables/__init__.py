"""Dialects: whose names and layouts a checkpoint speaks, and how its config is read."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.mapping import Table
from convert.sources import Source, SourceTensor
from convert.tables import flax_hf, gpt2, gpt_oss, llmc, nanogpt, openai_tf, ours
from core import config as config_lib
from core.config import Config, ConfigError

Tensors = Mapping[str, SourceTensor]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """`recognizes` looks at a config and at the tensors' names; `read_config` is given the tensors too, or none yet.

    `read_config` raises ConfigError with everything that it does not understand; `notes` are what the user must hear of
    a checkpoint that is odd but can be read.
    """

    name: str
    recognizes: Callable[[Mapping[str, Any], Collection[str]], bool]
    read_config: Callable[[Mapping[str, Any], Tensors], Config]
    table: Callable[[Config], Table]
    notes: Callable[[Mapping[str, Any], Tensors], tuple[str, ...]] = lambda config, tensors: ()


_HF: dict[str, Callable[[Config], Table]] = {
    "gpt2": lambda config: gpt2.HF,
    "gpt_oss": gpt_oss.hf_table,
}

HF = Dialect(
    "hf",
    recognizes=lambda config, names: "model_type" in config,
    read_config=lambda config, tensors: gpt_oss.as_stored(config_lib.from_hf(config), tensors),
    table=lambda config: _HF[config.family](config),
    notes=gpt_oss.notes,
)

HF_RESAVED = Dialect(
    "hf_resaved",
    recognizes=gpt_oss.is_resaved,
    read_config=gpt_oss.read_resaved_config,
    table=lambda config: gpt_oss.HF_RESAVED,
    notes=gpt_oss.notes,
)

GPT_OSS_ORIGINAL = Dialect(
    "gpt_oss_original",
    recognizes=lambda config, names: gpt_oss.recognizes_original(config),
    read_config=gpt_oss.read_original_config,
    table=lambda config: gpt_oss.ORIGINAL,
)

OPENAI_TF = Dialect(
    "openai_tf",
    recognizes=lambda config, names: openai_tf.recognizes(config),
    read_config=lambda config, tensors: openai_tf.read_config(config),
    table=lambda config: openai_tf.TABLE,
)

LLMC = Dialect(
    "llmc",
    recognizes=lambda config, names: llmc.recognizes(config),
    read_config=lambda config, tensors: llmc.read_config(config),
    table=lambda config: llmc.TABLE,
)

NANOGPT = Dialect(
    "nanogpt",
    recognizes=nanogpt.recognizes,
    read_config=nanogpt.read_config,
    table=lambda config: nanogpt.TABLE,
)

FLAX_HF = Dialect(
    "flax_hf",
    recognizes=flax_hf.recognizes,
    read_config=lambda config, tensors: config_lib.from_hf(config),
    table=lambda config: flax_hf.TABLE,
)

OURS = Dialect(
    "ours",
    recognizes=ours.recognizes,
    read_config=lambda config, tensors: ours.read_config(config),
    table=ours.table,
)

DIALECTS: tuple[Dialect, ...] = (
    OURS,
    FLAX_HF,
    HF_RESAVED,
    HF,
    GPT_OSS_ORIGINAL,
    NANOGPT,
    OPENAI_TF,
    LLMC,
)
"""In the order in which they are tried: the config decides, and names where it leaves a choice."""


def recognize(path: Path, config: Mapping[str, Any], names: Collection[str] = ()) -> Dialect:
    """Returns the dialect of a checkpoint at `path`, by its config.

    Raises:
      ConvertError: the config is nobody's that we know.
    """
    for dialect in DIALECTS:
        if dialect.recognizes(config, names):
            return dialect
    keys = ", ".join(sorted(config)[:8])
    raise ConvertError(
        f"{path}: the config (with {keys or 'no keys'}) does not say what the tensors are; expected 'model_type' "
        "as Hugging Face writes it, or another format's own"
    )


def read_config(path: Path, config: Mapping[str, Any], tensors: Tensors | None = None) -> Config:
    """Returns the model that the config of the checkpoint at `path` describes.

    Raises:
      ConvertError: another family, or keys that are not understood; all of them are named.
    """
    try:
        return recognize(path, config, tensors or ()).read_config(config, tensors or {})
    except ConfigError as error:
        raise ConvertError(f"{path}: {error}") from error


def table(source: Source, config: Config) -> Table:
    """Returns how the dialect of `source` stores a model."""
    return recognize(source.path, source.config, source.tensors).table(config)


def notes(source: Source) -> tuple[str, ...]:
    """Returns what is odd about a source that can be read all the same."""
    dialect = recognize(source.path, source.config, source.tensors)
    return dialect.notes(source.config, source.tensors)
