"""Random weights, once for everyone, as the Hugging Face folder that every contestant can open."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from bench.workloads import Shape

TOKEN_STD = 0.02
# Five times GPT-2's: at 0.02 a random model repeats one token whatever came before, and equal outputs prove little.
MATRIX_STD = 0.1


def write(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors of a random GPT-2 to `folder`, and returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.hf_config(), indent=2) + "\n")
    draw = np.random.default_rng(seed)
    tensors = dict(_tensors(shape, draw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensors(shape: Shape, draw: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    def normal(*sizes: int, std: float = MATRIX_STD) -> np.ndarray:
        return draw.standard_normal(sizes, dtype=np.float32) * np.float32(std)

    width = shape.n_embd
    yield "transformer.wte.weight", normal(shape.vocab_size, width, std=TOKEN_STD)
    yield "transformer.wpe.weight", normal(shape.n_positions, width)
    norms = [f"h.{i}.ln_{j}" for i in range(shape.n_layer) for j in (1, 2)] + ["ln_f"]
    for name in norms:
        yield f"transformer.{name}.weight", 1 + normal(width)
        yield f"transformer.{name}.bias", normal(width)
    for i in range(shape.n_layer):
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            yield f"transformer.h.{i}.{name}.weight", normal(rows, columns)
            yield f"transformer.h.{i}.{name}.bias", normal(columns)
