"""Tiny GPT-2 checkpoints as Hugging Face stores them, written by the reference safetensors library."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

# Pairwise different, also in products (3NH 42, NH 14), so that no wrong layout has the right shape.
V, P, D, N, H, F, L = 37, 11, 14, 2, 7, 20, 3
CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": V,
    "n_positions": P,
    "n_ctx": P,
    "n_embd": D,
    "n_head": N,
    "n_layer": L,
    "n_inner": F,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 36,
    "eos_token_id": 36,
}
FILES = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 11}',
    "generation_config.json": b'{"eos_token_id": 36}',
}


def shapes(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, ...]]:
    """Every tensor of the format by its unprefixed name, from its description in words."""
    d, f = config["n_embd"], config["n_inner"]
    block = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, f),
        "mlp.c_fc.bias": (f,),
        "mlp.c_proj.weight": (f, d),
        "mlp.c_proj.bias": (d,),
    }
    layers = {f"h.{i}.{name}": s for i in range(config["n_layer"]) for name, s in block.items()}
    ends = {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    embeddings = {
        "wte.weight": (config["vocab_size"], d),
        "wpe.weight": (config["n_positions"], d),
    }
    return {**embeddings, **layers, **ends}


def tensors(
    dtype: str = "float32", seed: int = 0, config: Mapping[str, Any] = CONFIG
) -> dict[str, np.ndarray]:
    """Random weights under unprefixed names."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return {
        name: rng.standard_normal(shape, np.float32).astype(kind)
        for name, shape in shapes(config).items()
    }


def prefixed(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that GPT2LMHeadModel saves."""
    return {n if n.startswith("lm_head") else f"transformer.{n}": w for n, w in weights.items()}


def masks() -> dict[str, np.ndarray]:
    """The buffers that OpenAI's own repositories carry."""
    causal = np.tril(np.ones((1, 1, P, P), np.float32))
    return {f"h.{i}.attn.bias": causal for i in range(L)} | {
        f"h.{i}.attn.masked_bias": np.full((), -1e4, np.float32) for i in range(L)
    }


def write(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] = CONFIG,
    shards: int = 1,
    files: Mapping[str, bytes] = FILES,
) -> Path:
    """Writes a checkpoint folder, in `shards` files behind an index if more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for k in range(shards):
        shard = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[k::shards]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_parameters(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under our names and shapes, spelled out by hand and not by a table."""
    params = {"wte.embedding": weights["wte.weight"], "wpe.embedding": weights["wpe.weight"]}
    for i in range(L):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        for norm in ("ln_1", "ln_2"):
            params[f"{ours}{norm}.scale"] = weights[f"{theirs}{norm}.weight"]
            params[f"{ours}{norm}.bias"] = weights[f"{theirs}{norm}.bias"]
        params[f"{ours}attn.qkv.kernel"] = weights[f"{theirs}attn.c_attn.weight"].reshape(
            D, 3, N, H
        )
        params[f"{ours}attn.qkv.bias"] = weights[f"{theirs}attn.c_attn.bias"].reshape(3, N, H)
        params[f"{ours}attn.out.kernel"] = weights[f"{theirs}attn.c_proj.weight"].reshape(N, H, D)
        params[f"{ours}attn.out.bias"] = weights[f"{theirs}attn.c_proj.bias"]
        params[f"{ours}mlp.up.kernel"] = weights[f"{theirs}mlp.c_fc.weight"]
        params[f"{ours}mlp.up.bias"] = weights[f"{theirs}mlp.c_fc.bias"]
        params[f"{ours}mlp.down.kernel"] = weights[f"{theirs}mlp.c_proj.weight"]
        params[f"{ours}mlp.down.bias"] = weights[f"{theirs}mlp.c_proj.bias"]
    params["ln_f.scale"], params["ln_f.bias"] = weights["ln_f.weight"], weights["ln_f.bias"]
    if "lm_head.weight" in weights:
        params["lm_head.kernel"] = weights["lm_head.weight"]
    return params


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in shape, type and every bit (NaNs and signed zeros included)."""
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(
    module: str, *flags: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def the_error(done: subprocess.CompletedProcess[str], stdout: str | None = "") -> str:
    """The one line that a failed command leaves on stderr, after checking that it is one."""
    assert done.returncode == 1, done
    assert stdout is None or done.stdout == stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
