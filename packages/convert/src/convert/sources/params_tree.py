"""What containers of Flax parameters have in common: names joined by dots, and a config.json that lies beside.

Such a file says nothing of the model but its names and shapes. It may hold a whole training state, of which the
parameters are one part.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.sources import CONFIG, SourceTensor, read_json

PARAMS = "params"


def read_config(path: Path, folders: Iterable[Path]) -> tuple[Path, dict[str, Any]]:
    """Returns the first config.json in `folders` and its content."""
    for folder in folders:
        if (folder / CONFIG).is_file():
            return folder / CONFIG, read_json(folder / CONFIG)
    raise ConvertError(
        f"{path}: no {CONFIG} beside it; it says what the tensors are: a model folder's, or Hugging Face's"
    )


def parameters(
    tensors: Mapping[str, SourceTensor],
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Returns the tensors under "params", by their names below it, and a note of what is left out.

    Where nothing is called so, all are parameters.
    """
    top = f"{PARAMS}."
    inside = renamed(
        {n: tensor for n, tensor in tensors.items() if n.startswith(top)},
        lambda name: name.removeprefix(top),
    )
    if not inside:
        return dict(tensors), ()
    outside = [name for name in tensors if not name.startswith(top)]
    if not outside:
        return inside, ()
    kinds = ", ".join(sorted({name.split(".")[0] for name in outside}))
    return inside, (f"{len(outside)} tensors beside {PARAMS!r} are left out: {kinds}",)


def renamed(
    tensors: Mapping[str, SourceTensor], rename: Callable[[str], str]
) -> dict[str, SourceTensor]:
    """Returns the tensors by other names."""
    return {
        rename(name): dataclasses.replace(tensor, name=rename(name))
        for name, tensor in tensors.items()
    }
