"""Several devices against one, several processes against one: simulated, in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import training_runs
from core import sharding
from core.config import GPT2Config, GptOssConfig
from core.errors import ConfigError
from core.models import build
from train import compute, preflight, step
from train.config import TrainConfig
from train.devices import Devices, _does_not_divide, join, open_devices
from train.metrics import read_rows

PROGRAM = Path(__file__).parents[1] / "mesh_runs.py"
RUN: dict[str, Any] = {
    "dataset": "small",
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "dropout": 0.2,
    "bias": True,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
    "warmup_iters": 2,
    "lr_decay_iters": 20,
    "max_iters": 19,
    "eval_interval": 10,
    "eval_iters": 2,
}


def program(
    devices: int, out: Path, cache: Path | None = None, **settings: Any
) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parent),  # whose modules PYTHONSAFEPATH hides
        "JAX_COMPILATION_CACHE_DIR": str(
            cache or os.environ.get("FLAXMILL_JAX_CACHE", root / ".cache" / "jax")
        ),
    }
    given = [f"{key}={json.dumps(value)}" for key, value in {**RUN, **settings}.items()]
    command = [sys.executable, str(PROGRAM), str(devices), str(out), *given]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1]), err


@pytest.fixture(scope="module")
def alone(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run on one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    found, _ = result(program(1, out, data_dir=str(data_dir), mesh="data=1"))
    return {**found, "out": out}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "share"),
    [
        ("data=8", 1),
        ("fsdp=8", 0.2),
        ("data=2,fsdp=2,tensor=2", 0.35),
        ("data=2,fsdp=2,tensor=2,scan", 0.35),
        ("data=2,tensor=4", 0.4),
    ],
)
def test_eight_devices_make_the_updates_of_one(
    alone: dict[str, Any], data_dir: Path, tmp_path: Path, mesh: str, share: float
):
    """Dropout is on: were its masks not the same, the losses would differ in the second digit."""
    # What is taken from a cache of programs is not compiled, and the compiler cannot complain.
    settings: dict[str, Any] = {"data_dir": str(data_dir), "mesh": mesh.removesuffix(",scan")}
    settings["scan_layers"] = mesh.endswith(",scan")
    settings["cache"] = tmp_path / "cache"
    found, err = result(program(8, tmp_path / "out", **settings))
    assert "Involuntary full rematerialization" not in err
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=2e-6)
    assert found["val_loss"] == pytest.approx(alone["val_loss"], rel=2e-6)
    assert found["share"] <= share
    ours, theirs = (
        {name: array.copy() for name, array in training_runs.last_arrays(out).items()}
        for out in (tmp_path / "out", alone["out"])
    )
    for name, array in theirs.items():
        if name.startswith(".params"):
            if "qkv" in name and "bias" in name:
                # A bias of all keys moves no weight of the softmax: its gradient is rounding alone.
                ours[name][1] = array[1]
            np.testing.assert_allclose(ours[name], array, rtol=0, atol=3e-5, err_msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh_and_another_number_of_devices(
    alone: dict[str, Any], data_dir: Path, tmp_path: Path
):
    settings: dict[str, Any] = {"data_dir": str(data_dir), "init_from": "auto"}
    out = tmp_path / "out"
    parts = [(8, "data=2,fsdp=2,tensor=2", 5), (8, "data=8", 11), (1, "data=1", 19)]
    for devices, mesh, last in parts:
        result(program(devices, out, mesh=mesh, max_iters=last, **settings))
    found, expected = (
        [row["train_loss"] for row in read_rows(run / "metrics.jsonl") if "train_loss" in row]
        for run in (out, alone["out"])
    )
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def two_processes(out: Path, **settings: Any) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        program(1, out, processes=2, process=i, coordinator=f"localhost:{port}", **settings)
        for i in (0, 1)
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_and_each_reads_its_own_rows(
    alone: dict[str, Any], data_dir: Path, tmp_path: Path
):
    settings: dict[str, Any] = {"data_dir": str(data_dir), "mesh": "fsdp=2"}
    found = [result(p)[0] for p in two_processes(tmp_path / "out", **settings)]
    for one in found:
        np.testing.assert_allclose(one["losses"], alone["losses"], rtol=2e-6)
    assert [one["rows"] for one in found] == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
    ]
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [row["iter"] for row in rows if "train_loss" in row] == list(range(20))
    # What two processes left, one goes on with.
    more = result(
        program(1, tmp_path / "out", data_dir=str(data_dir), init_from="auto", max_iters=21)
    )[0]
    assert len(more["losses"]) == 22


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_a_signal_to_one_ends_all(
    data_dir: Path, tmp_path: Path
):
    long: dict[str, Any] = {"data_dir": str(data_dir), "mesh": "data=2", "dist_timeout_s": 10}
    long |= {"max_iters": 100_000, "lr_decay_iters": 100_000, "eval_interval": 100_000}
    for number, expected in ((signal.SIGKILL, None), (signal.SIGTERM, 0)):
        out = tmp_path / number.name
        first, second = two_processes(out, **long)
        try:
            begun = time.monotonic()
            while len(read_rows(out / "metrics.jsonl")) < 5:
                assert time.monotonic() - begun < 120
                assert first.poll() is None, first.communicate()[1][-2000:]
                time.sleep(0.2)
            second.send_signal(number)
            codes = [process.wait(timeout=90) for process in (first, second)]
        finally:
            for process in (first, second):
                process.kill()
                process.communicate()  # closes its pipes
        assert codes[0] == 0 if expected == 0 else codes[0] != 0
        assert codes[1] == (0 if expected == 0 else -number)
    checkpoints = preflight.iterations(tmp_path / "SIGTERM" / "checkpoints")
    assert len(checkpoints) == 1


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    config = TrainConfig(batch_size=12, gradient_accumulation_steps=40)
    said = _does_not_divide(config, 8)
    assert "batch_size=12 does not divide over data * fsdp = 8" in said
    assert "batch_size=24 with gradient_accumulation_steps=20, which are the same 480" in said
    few = TrainConfig(batch_size=3, gradient_accumulation_steps=1)
    assert "a multiple of 8 sequences an update" in _does_not_divide(few, 8)


def test_a_process_that_nobody_waits_for_says_so():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    config = TrainConfig(processes=2, process=1, coordinator=address, dist_timeout_s=1)
    with pytest.raises(preflight.TrainError, match=f"process 1 of 2: no meeting at .*{address}"):
        join(config)


def test_process_0_says_who_did_not_come():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = TrainConfig(processes=4, process=0, coordinator=f"localhost:{port}", dist_timeout_s=1)

    def come() -> None:
        for said in (b"GET / HTTP/1.1\r\n", b"flaxmill process 2\n"):
            while True:
                try:
                    caller = socket.create_connection(("localhost", port), timeout=1)
                    break
                except OSError:
                    time.sleep(0.01)
            caller.sendall(said)
            callers.append(caller)

    callers: list[socket.socket] = []
    thread = threading.Thread(target=come)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(
        preflight.TrainError, match=r"no meeting at .*=1: 2 processes \(1, 3\) did not come"
    ):
        join(config)
    assert time.monotonic() - begun < 4
    thread.join()
    for caller in callers:
        assert caller.recv(9) == b""  # nobody was told to go on
        caller.close()


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        config = TrainConfig(processes=2, coordinator=address, dist_timeout_s=1)
        with pytest.raises(preflight.TrainError, match="cannot listen there"):
            join(config)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="does not make the 1 devices"):
        open_devices(TrainConfig(mesh="data=3", device="cpu"))


def test_moments_lie_where_their_parameters_do():
    config = TrainConfig(ema_decay=0.9)
    shape = GPT2Config(vocab_size=12, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    state = jax.eval_shape(lambda: step.initial_state(build(shape).init(jax.random.key(0)), config))
    mesh: Any = AbstractMesh((1, 2, 1, 2), sharding.AXES)
    places = Devices(mesh).shardings(shape, state)
    assert places.params["wte"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    specs = jax.tree.map(lambda place: place.spec, places)
    moments = specs.opt_state[0]
    assert moments.mu == moments.nu == specs.ema == specs.params
    assert moments.count == PartitionSpec()


GPT2, OSS = GPT2Config(n_head=4, n_embd=256), GptOssConfig()


@pytest.mark.parametrize(
    ("settings", "shape", "platform", "expected"),
    [
        ({}, GPT2, "cpu", "xla"),
        ({}, GPT2, "gpu", "cudnn"),
        ({}, GPT2, "tpu", "splash"),
        ({"dtype": "float32"}, GPT2, "gpu", "xla"),
        ({"dropout": 0.1}, GPT2, "gpu", "xla"),
        ({"attention": "xla"}, GPT2, "gpu", "xla"),
        ({}, OSS, "gpu", "xla"),
    ],
)
def test_attention_auto_is_the_fused_one_where_it_can_be(
    settings: dict[str, Any], shape: Any, platform: str, expected: str
):
    assert compute.attention_for(TrainConfig(**settings), shape, platform) == expected


@pytest.mark.parametrize(
    ("settings", "shape", "platform", "message"),
    [
        ({"attention": "cudnn"}, GPT2, "cpu", "needs a gpu, this is a cpu"),
        ({"attention": "splash"}, GPT2, "gpu", "needs a tpu"),
        ({"attention": "cudnn", "dropout": 0.1}, GPT2, "gpu", "cannot drop attention weights"),
        ({"attention": "cudnn", "dtype": "float32"}, GPT2, "gpu", "half precision"),
        ({"attention": "cudnn"}, OSS, "gpu", "knows no sinks"),
        ({"attention": "cudnn"}, GPT2Config(n_embd=36, n_head=3), "gpu", "heads of 12"),
    ],
)
def test_an_attention_that_cannot_be_had_is_refused(
    settings: dict[str, Any], shape: Any, platform: str, message: str
):
    with pytest.raises(preflight.TrainError, match=message):
        compute.attention_for(TrainConfig(**settings), shape, platform)
