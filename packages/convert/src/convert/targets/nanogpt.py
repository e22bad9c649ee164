"""nanoGPT's out_dir: a `ckpt.pt` that its sample.py samples from and its train.py resumes, and the tokenizer.

sample.py looks for `meta.pkl` in data/DATASET, and takes GPT-2's encoding where there is none. The optimizer's state
has no moments: a resumed run begins with none, as a new one does.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert import mapping
from convert.sources import COMPANIONS
from convert.sources.nanogpt import CHECKPOINT, META
from convert.tables import nanogpt
from convert.targets import torch_archive
from core import axes, checkpoint
from core.checkpoint import ModelFolder, parts
from core.config import GPT2Config

IS_FILE = False
DATASET = "flaxmill"
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_TRAINING = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8}  # train.py's defaults
_DECAY = 0.1


def check(folder: ModelFolder) -> list[str]:
    """Returns everything about the model that nanoGPT's cannot be."""
    return nanogpt.unrepresentable(folder.config)


def nbytes(folder: ModelFolder) -> int:
    """Returns the size of the weights; the head is the embedding and stored once."""
    return sum(array.nbytes for array in folder.tensors.values())


def write(folder: ModelFolder, out: Path, on_bytes: Callable[[int], None]) -> list[str]:
    """Writes ckpt.pt, copies the tokenizer's files, and makes meta.pkl of a character tokenizer."""
    config = folder.config
    assert isinstance(config, GPT2Config), "check has refused any other"
    for name in folder.manifest["files"].keys() - {checkpoint.CONFIG}:
        (out / name).write_bytes((folder.path / name).read_bytes())
    characters = _characters(folder.path)
    if characters is not None:
        (out / META).write_bytes(_meta(characters))
    weights = {
        move.source: axes.relayout(
            folder.tensors[move.target], axes.inverse(move.layout), config.axes
        )
        for move in mapping.moves(nanogpt.TABLE, config)
    }
    keys = {name: str(number) for number, name in enumerate(weights)}
    state = {
        name: torch_archive.Tensor(keys[name], array.dtype.name, array.shape)
        for name, array in weights.items()
    }
    torch_archive.write(
        out / CHECKPOINT,
        {
            "model": {**state, _HEAD: state[_EMBEDDING]},
            "optimizer": _optimizer([len(tensor.shape) for tensor in state.values()]),
            "model_args": nanogpt.model_args(config),
            "iter_num": 0,
            "best_val_loss": 1e9,
            "config": {"dataset": DATASET} if characters is not None else {},
        },
        {keys[name]: array for name, array in weights.items()},
        parts,
        on_bytes,
    )
    return _notes(config, characters)


def is_own(path: Path) -> bool:
    """Tells whether `write` filled the folder at `path`, and nothing came beside; a run of nanoGPT's own is none."""
    return torch_archive.is_ours(path / CHECKPOINT) and all(
        entry.name in (CHECKPOINT, META, *COMPANIONS) for entry in path.iterdir()
    )


def _optimizer(ranks: list[int]) -> dict[str, Any]:
    """Returns the state of an AdamW that has not stepped: matrices decay, then vectors, which do not."""
    decays = sum(rank >= 2 for rank in ranks)
    groups = ((_DECAY, range(decays)), (0.0, range(decays, len(ranks))))
    return {
        "state": {},
        "param_groups": [
            {**_TRAINING, "weight_decay": decay, "params": list(numbers)}
            for decay, numbers in groups
        ],
    }


def _notes(config: GPT2Config, characters: Mapping[str, int] | None) -> list[str]:
    notes = []
    if config.activation_function != "gelu":
        notes.append(
            f"the model's activation is {config.activation_function}, nanoGPT computes the exact GELU: "
            "its logits will differ by about 0.001"
        )
    if len({config.embd_pdrop, config.attn_pdrop, config.resid_pdrop}) > 1:
        notes.append(
            f"nanoGPT has one dropout for all; resid_pdrop={config.resid_pdrop} is written as it"
        )
    if characters is not None:
        notes.append(
            f"sample.py looks for {META} in data/{DATASET}: copy it there in nanoGPT's folder"
        )
    elif config.vocab_size not in (nanogpt.BPE_SIZE, nanogpt.PADDED_SIZE):
        notes.append(
            f"sample.py knows GPT-2's tokenizer and characters; this model has {config.vocab_size} tokens of "
            "another one, so decode what it samples yourself"
        )
    return notes


def _characters(folder: Path) -> dict[str, int] | None:
    """Returns the ids of a character tokenizer, or None where the folder has another one or none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        model = json.loads(path.read_bytes())["model"]
        vocabulary = model["vocab"] if model["type"] == "WordLevel" else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != [*range(len(vocabulary))]:
        return None
    return vocabulary if vocabulary and all(len(token) == 1 for token in vocabulary) else None


def _meta(characters: Mapping[str, int]) -> bytes:
    """Returns nanoGPT's meta.pkl of a character dataset."""
    itos = {id_: character for character, id_ in sorted(characters.items(), key=lambda x: x[1])}
    stoi = {character: id_ for id_, character in itos.items()}
    return pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, protocol=4)
