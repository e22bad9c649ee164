"""A tiny GPT-2 in OpenAI's names and shapes, whose every value follows from a formula: no file has to be trusted."""

from collections.abc import Mapping

import numpy as np

V, P, D, L, N = 97, 61, 24, 2, 4
H = D // N
HPARAMS = {"n_vocab": V, "n_ctx": P, "n_embd": D, "n_head": N, "n_layer": L}


def shapes(hparams: Mapping[str, int] = HPARAMS) -> dict[str, tuple[int, ...]]:
    """The variables of OpenAI's model.py in the order in which it creates them."""
    vocab, positions, d = (hparams[key] for key in ("n_vocab", "n_ctx", "n_embd"))
    shapes: dict[str, tuple[int, ...]] = {"model/wpe": (positions, d), "model/wte": (vocab, d)}
    for i in range(hparams["n_layer"]):
        h = f"model/h{i}/"
        shapes |= {f"{h}ln_1/g": (d,), f"{h}ln_1/b": (d,)}
        shapes |= {f"{h}attn/c_attn/w": (1, d, 3 * d), f"{h}attn/c_attn/b": (3 * d,)}
        shapes |= {f"{h}attn/c_proj/w": (1, d, d), f"{h}attn/c_proj/b": (d,)}
        shapes |= {f"{h}ln_2/g": (d,), f"{h}ln_2/b": (d,)}
        shapes |= {f"{h}mlp/c_fc/w": (1, d, 4 * d), f"{h}mlp/c_fc/b": (4 * d,)}
        shapes |= {f"{h}mlp/c_proj/w": (1, 4 * d, d), f"{h}mlp/c_proj/b": (d,)}
    return shapes | {"model/ln_f/g": (d,), "model/ln_f/b": (d,)}


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 numbers of [-1, 1) that differ between seeds: exact in float32, the same on every machine."""
    count = int(np.prod(shape, dtype=np.int64))
    mixed = (np.arange(count, dtype=np.uint64) + np.uint64(seed * 1_000_003)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return (
        ((mixed >> np.uint64(40)).astype(np.float64) / 2**23 - 1).astype(np.float32).reshape(shape)
    )


def tensors(hparams: Mapping[str, int] = HPARAMS) -> dict[str, np.ndarray]:
    """Every variable, by OpenAI's name."""
    return {name: values(shape, seed) for seed, (name, shape) in enumerate(shapes(hparams).items())}


def as_hf(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under Hugging Face's names, as its own conversion script spells them."""
    renamed = {"model/wte": "wte.weight", "model/wpe": "wpe.weight"}
    result = {}
    for name, array in weights.items():
        path = renamed.get(name)
        if path is None:
            path = name.removeprefix("model/").replace("/", ".")
            path = path.replace("h", "h.", 1) if path.startswith("h") else path
            stem, _, leaf = path.rpartition(".")
            path = f"{stem}.{ {'w': 'weight', 'g': 'weight', 'b': 'bias'}[leaf] }"
        result[path] = array[0] if name.endswith("/w") else array
    return result
