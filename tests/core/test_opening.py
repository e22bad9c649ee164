"""Opening costs no copy: not of the file, not between processes, not of quantised tensors."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import tiny
from core import axes, checkpoint
from core.checkpoint import CheckpointError, TensorSpec
from core.config import Config, GptOssConfig

MXFP4 = GptOssConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=9,
    num_experts_per_tok=2,
    quantization="mxfp4",
)


def specs(config: Config, dtype: str) -> list[TensorSpec]:
    return [
        TensorSpec(
            name,
            axes.shape(word, config.axes),
            "uint8" if checkpoint.is_quantised(name) else dtype,
        )
        for name, word in config.tensors().items()
    ]


def values(spec: TensorSpec) -> np.ndarray:
    rng = np.random.default_rng(sum(spec.name.encode()))
    if spec.dtype == "uint8":
        return rng.integers(0, 256, spec.shape, np.uint8)
    return rng.standard_normal(spec.shape, np.float32).astype(spec.dtype)


def write(path: Path, config: Config, dtype: str) -> Path:
    checkpoint.write(
        path,
        config=config,
        specs=specs(config, dtype),
        read=lambda spec: checkpoint.parts(values(spec)),
    )
    return path


def flat(params: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep=".")


def test_quantised_tensors_are_the_bytes_that_were_written_and_shared(tmp_path: Path):
    opened = checkpoint.open(write(tmp_path / "model", MXFP4, "bfloat16"))
    arrays = flat(opened.params())
    quantised = [name for name in arrays if checkpoint.is_quantised(name)]
    assert len(quantised) == 4 * MXFP4.num_hidden_layers
    for spec in specs(MXFP4, "bfloat16"):
        assert arrays[spec.name].dtype == spec.dtype
        assert np.asarray(arrays[spec.name]).tobytes() == values(spec).tobytes()
    for name, x in opened.tensors.items():
        if x.nbytes % 64 == 0:
            assert opened.manifest["tensors"][name]["offset"] % 64 == 0
            address = x.__array_interface__["data"][0]
            assert arrays[name].unsafe_buffer_pointer() == address, name
    assert any(opened.tensors[n].nbytes % 64 == 0 for n in quantised if n.endswith(".scales"))


def test_tensors_of_many_parts_are_what_was_written(tmp_path: Path):
    config = tiny.config(vocab_size=20_000, n_embd=192, n_head=3)  # 15 MB, 4 MB at a time
    opened = checkpoint.open(write(tmp_path / "model", config, "float32"))
    for spec in specs(config, "float32"):
        np.testing.assert_array_equal(opened.tensors[spec.name], values(spec))


def test_a_cast_leaves_quantised_tensors_alone(tmp_path: Path):
    opened = checkpoint.open(write(tmp_path / "model", MXFP4, "bfloat16"))
    for name, x in flat(opened.params(jnp.float32)).items():
        assert x.dtype == ("uint8" if checkpoint.is_quantised(name) else "float32")


def test_blocks_that_are_numbers_are_refused(tmp_path: Path):
    wrong = [TensorSpec(spec.name, spec.shape, "float32") for spec in specs(MXFP4, "float32")]
    with pytest.raises(CheckpointError, match=r"kernel\.blocks should be uint8, is float32"):
        checkpoint.write(tmp_path / "m", config=MXFP4, specs=wrong, read=lambda spec: [])


READER = """
import sys
import jax, numpy as np
from core import checkpoint
params = checkpoint.open(sys.argv[1]).params()
total = sum(float(np.asarray(x).sum(dtype=np.float64)) for x in jax.tree.leaves(params))
print(total, flush=True)
sys.stdin.read()
"""


def test_two_processes_share_one_copy(tmp_path: Path):
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs /proc/self/smaps")
    config = tiny.config(vocab_size=20_000, n_embd=192, n_head=3)
    model = write(tmp_path / "model", config, "float32")
    nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        lines = [reader.stdout.readline() for reader in readers if reader.stdout is not None]
        assert float(lines[0]) == float(lines[1])
        for reader in readers:
            memory = _of_shards(reader.pid)
            assert memory["Rss"] > 0.99 * nbytes
            assert memory["Pss"] < 0.51 * nbytes
            assert memory["Private_Clean"] + memory["Private_Dirty"] + memory["Anonymous"] == 0
    finally:
        for reader in readers:
            reader.communicate(timeout=60)


def _of_shards(pid: int) -> dict[str, int]:
    """What the process holds of mapped safetensors files, in bytes, by the names of /proc/PID/smaps."""
    counts: dict[str, int] = {}
    counted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if (found := re.fullmatch(r"(\w+): +(\d+) kB", line)) is None:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                counted = line.endswith(".safetensors")
        elif counted:
            counts[found[1]] = counts.get(found[1], 0) + 1024 * int(found[2])
    return counts
