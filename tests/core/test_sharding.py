"""Rules and meshes; on simulated devices, in processes of their own, models against themselves on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import tiny
import tiny_gpt_oss
from core import checkpoint, sharding
from core.config import PRESETS
from core.errors import ConfigError

PROGRAM = Path(__file__).parents[1] / "sharded_models.py"


def specs(config: Any, **sizes: int) -> tuple[dict[str, tuple[Any, ...]], tuple[str, ...]]:
    """The mesh axis along each axis of every parameter of layer 0 and outside, and the notes."""
    mesh = AbstractMesh(tuple(sizes.get(name, 1) for name in sharding.AXES), sharding.AXES)
    placement = sharding.place(config, mesh)
    return {
        name.removeprefix("blocks.0."): tuple(s.spec) for name, s in placement.shardings.items()
    }, placement.notes


def test_a_parameter_is_cut_by_its_letters_and_packed_kernels_like_their_scales():
    found, notes = specs(PRESETS["gpt-oss-20b"], fsdp=2, expert=4, tensor=2)
    assert notes == ()
    assert found["wte.embedding"] == ("tensor", "fsdp")
    assert found["attn.q.kernel"] == ("fsdp", "tensor", None)
    assert found["attn.sinks"] == ("tensor",)
    assert found["moe.router.kernel"] == ("fsdp", "expert")
    assert found["moe.gate_up.kernel.blocks"] == ("expert", "tensor", None, "fsdp", None)
    assert found["moe.gate_up.kernel.scales"] == ("expert", "tensor", None, "fsdp")
    assert found["moe.down.kernel.blocks"] == ("expert", "fsdp", "tensor", None)
    assert found["moe.down.kernel.scales"] == ("expert", "fsdp", "tensor")
    assert found["moe.down.bias"] == ("expert", "fsdp")


def test_what_does_not_divide_stays_whole_and_is_said():
    found, notes = specs(PRESETS["gpt2-xl"], tensor=2, fsdp=4)
    assert found["attn.qkv.kernel"] == ("fsdp", None, None, None)
    assert found["mlp.up.kernel"] == ("fsdp", "tensor")
    assert found["wte.embedding"] == (None, "fsdp")
    assert notes == (
        "V=50257 does not divide by tensor=2: wte.embedding not cut there",
        "N=25 does not divide by tensor=2: blocks.0.attn.qkv.kernel and 143 more not cut there",
    )


def test_rules_are_the_caller_s_and_use_a_mesh_axis_once_a_parameter():
    mesh = AbstractMesh((1, 2, 1, 1), sharding.AXES)
    placement = sharding.place(tiny.config(), mesh, {"D": "fsdp", "F": "fsdp"})
    assert tuple(placement.shardings["blocks.0.mlp.up.kernel"].spec) == ("fsdp", None)
    assert tuple(placement.shardings["blocks.0.mlp.down.kernel"].spec) == ("fsdp", None)


@pytest.mark.parametrize("sizes", ["", "tensor=1", "data=-1, expert=1", {"fsdp": -1}])
def test_a_mesh_has_every_axis(sizes: Any):
    mesh = sharding.mesh(sizes)
    assert (tuple(mesh.shape.values()), mesh.axis_names) == ((1, 1, 1, 1), sharding.AXES)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("tensors=2", "'tensors' is unknown; expected data, fsdp, expert, tensor"),
        ("tensor=2,tensor=2", "each axis once"),
        ("tensor", "expected AXIS=SIZE"),
        ("tensor=0", "sizes are positive"),
        ("tensor=-2", "sizes are positive"),
        ("tensor=-1,fsdp=-1", "sizes are positive, and one may be -1"),
        ("tensor=3", "mesh tensor=3 does not make the 1 devices"),
        ("tensor=3,fsdp=-1", "mesh tensor=3,fsdp=-1 does not make the 1 devices"),
    ],
)
def test_a_mesh_that_is_none_says_why(sizes: str, message: str):
    with pytest.raises(ConfigError, match=message):
        sharding.mesh(sizes)


def program(*arguments: Any) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parent),  # whose modules PYTHONSAFEPATH hides
    }
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *(("gpt2", mesh) for mesh in ("tensor=8", "fsdp=8", "data=2,fsdp=2,tensor=2")),
        *(
            (kind, mesh)
            for kind in ("dense", "mxfp4")
            for mesh in ("tensor=8", "expert=8", "fsdp=8", "fsdp=2,expert=2,tensor=2")
        ),
    ],
)
def test_eight_devices_give_the_tokens_logits_and_gradients_of_one(
    kind: str, mesh: str, tmp_path: Path
):
    """Sums in another order move logits whose deviation is 1 by 7e-6; a missing or doubled part by 1e-1."""
    found = result(program("run", kind, tmp_path / "model", mesh))
    assert found["spread"] > 0.5
    assert found["different"] > 10
    of_mesh = found["meshes"][mesh]
    assert of_mesh["same_tokens"]
    assert of_mesh["difference"] < 2e-5 * max(found["spread"], 1)
    assert of_mesh["gradients"] < 2e-5
    # Of a packed kernel eight devices do not divide the two blocks along D or the three along F; half is whole then.
    assert of_mesh["share"] < (0.6 if kind == "mxfp4" else 0.3)


def test_each_host_reads_its_own_parts_only_and_each_part_once(tmp_path: Path):
    """Two hosts with four devices each; `fsdp` lies across the hosts, and what it does not cut is on all devices."""
    config = tiny_gpt_oss.packed_config(num_local_experts=6)
    flat = tiny_gpt_oss.weights(config)
    checkpoint.save(tmp_path / "model", config, tiny_gpt_oss.params(flat))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [
        program("read", tmp_path / "model", "fsdp=2,expert=-1,tensor=2", i, port) for i in (0, 1)
    ]
    for found in [result(host) for host in hosts]:
        assert found["devices"] == 8
        assert found["right"]
        for name, word in config.tensors().items():
            share = 2 if set(word) & set("DQ") else 1
            assert found["reads"][name] * share == found["whole"][name], name


def test_parameters_with_shardings_are_cast_but_for_packed_ones(tmp_path: Path):
    config = tiny_gpt_oss.packed_config()
    checkpoint.save(tmp_path / "model", config, tiny_gpt_oss.params(tiny_gpt_oss.weights(config)))
    opened = checkpoint.open(tmp_path / "model")
    shardings = sharding.place(config, sharding.mesh("")).shardings
    for dtype in (None, "bfloat16"):
        placed, plain = opened.params(dtype, shardings=shardings), opened.params(dtype)
        jax.tree.map(np.testing.assert_array_equal, placed, plain)
        types = {str(x.dtype) for x in jax.tree.leaves(placed)}
        assert types == {"uint8", dtype or "float32"}
