"""TensorPort's three outputs, written as its Rust writes them; tests/golden/tensorport holds the same from Rust."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

DTYPES = {"float16": "<f2", "float32": "<f4", "uint8": "|u1", "int64": "<i8"}
_VARIANTS = {"float16": "Float16", "float32": "Float32", "uint8": "Uint8", "int64": "Int64"}


def ported(weights: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """What TensorPort makes of a checkpoint's tensors: bfloat16 becomes float16 or float32, bytes stay."""
    return {
        name: x.astype(precision) if x.dtype in (np.float32, ml_dtypes.bfloat16) else x
        for name, x in weights.items()
    }


def write(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    format: str,
    shards: int = 1,
) -> Path:
    """Writes `weights` as "numpy-direct", "msgpack" (or "msgpack-maps") or "jax-pickle"."""
    folder.mkdir(parents=True)
    parts = [dict(list(weights.items())[k::shards]) for k in range(shards)]
    manifest: dict[str, Any] = {
        "total_shards": shards,
        "total_parameters": sum(
            x.size * (2 if "_blocks" in name and x.dtype == np.uint8 else 1)
            for name, x in weights.items()
        ),
        "config": dict(config),
    }
    if format == "numpy-direct":
        manifest |= {"format": "numpy_direct", "tensors": []}
        for k, part in enumerate(parts):
            (folder / f"shard_{k:03}").mkdir()
            for name, x in part.items():
                file = f"shard_{k:03}/{name.replace('.', '_').replace('/', '_')}.npy"
                (folder / file).write_bytes(npy(x))
                descr = DTYPES[x.dtype.name]
                entry = {"name": name, "file": file, "shape": list(x.shape), "dtype": descr}
                manifest["tensors"].append({**entry, "size_mb": x.nbytes / 2**20})
    else:
        suffix = "pkl" if format == "jax-pickle" else "msgpack"
        precision = "float32" if any(x.dtype == np.float32 for x in weights.values()) else "float16"
        manifest["format"] = (
            "tensorport_jax_pickle_sharded" if suffix == "pkl" else f"tensorport_{precision}"
        )
        manifest["shards"] = []
        for k, part in enumerate(parts):
            stripped = {name.removeprefix("model."): x for name, x in part.items()}
            data = (
                pickled(stripped) if suffix == "pkl" else packed(stripped, format.endswith("maps"))
            )
            (folder / f"shard_{k:03}.{suffix}").write_bytes(data)
            manifest["shards"].append(
                {
                    "file": f"shard_{k:03}.{suffix}",
                    "size_mb": len(data) / 2**20,
                    "tensor_count": len(part),
                }
            )
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return folder


def npy(x: np.ndarray) -> bytes:
    """A .npy file whose newline comes after the padding, so that the data begin at 64k + 1."""
    sizes = ", ".join(map(str, x.shape)) + ("," if x.ndim == 1 else "")
    text = f"{{'descr': '{DTYPES[x.dtype.name]}', 'fortran_order': False, 'shape': ({sizes}), }}"
    text += " " * (-(10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + x.tobytes()


def packed(weights: Mapping[str, np.ndarray], as_maps: bool = False) -> bytes:
    """A MessagePack shard; rmp-serde writes structs as lists, and TensorPort's reader expects maps."""
    tensors = {}
    for name, x in weights.items():
        numbers = x.view(np.uint16) if x.dtype == np.float16 else x
        data = {_VARIANTS[x.dtype.name]: numbers.reshape(-1).tolist()}
        tensor = {"shape": list(x.shape), "dtype": x.dtype.name, "data": data}
        tensors[name] = tensor if as_maps else list(tensor.values())
    return msgpack.packb(tensors, use_single_float=True)  # pyright: ignore[reportReturnType]


def pickled(weights: Mapping[str, np.ndarray]) -> bytes:
    """A pickle shard: protocol 3, no memo, a thousand items a batch."""
    tensors = b"".join(
        _text(name)
        + b"}("
        + _text("shape")
        + _list([b"J" + struct.pack("<I", size) for size in x.shape])
        + _text("dtype")
        + _text(x.dtype.name)
        + _text("data")
        + _list([bytes((ord("K"), byte)) for byte in x.tobytes()])
        + b"u"
        + (b"u(" if count % 1000 == 0 else b"")
        for count, (name, x) in enumerate(weights.items(), start=1)
    )
    return b"\x80\x03}(" + tensors + b"u."


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _list(items: list[bytes]) -> bytes:
    if not items:
        return b"]"
    batches = [b"".join(items[i : i + 1000]) for i in range(0, len(items), 1000)]
    return b"](" + b"e(".join(batches) + (b"e(" if len(items) % 1000 == 0 else b"") + b"e"
