"""The commands as a user types them: what they print, how they exit, and what survives a kill."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hf_checkpoints
import train
from core.tokenizer import Tokenizer
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.metrics import read_rows
from training_runs import different_arrays, timeless_rows

ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
ROOT = Path(__file__).parents[2]
GPT2 = f"--config={ROOT / 'configs' / 'gpt2.py'}"
SHAKESPEARE = f"--config={ROOT / 'configs' / 'shakespeare_char.py'}"


def command(*arguments: str, module: str = "train") -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def call(
    *arguments: str, module: str = "train", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, module=module),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT,
    )


def assert_one_line(error: str, *parts: str) -> None:
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def overrides(config: TrainConfig) -> list[str]:
    """All keys, so that nothing is left to the file."""
    return [f"--config.{key}={value}" for key, value in config.to_dict().items()]


def test_the_literal_command_without_data_says_how_to_get_it():
    done = call("--config=configs/gpt2.py")
    assert done.returncode == 1
    assert_one_line(
        done.stderr, "data/openwebtext", "python -m train.prepare --dataset=openwebtext"
    )
    assert done.stdout == ""


def test_an_unknown_key_is_answered_with_the_nearest():
    done = call(GPT2, "--config.max_iter=3")
    assert done.returncode == 2
    assert_one_line(done.stderr, 'unknown config key "max_iter". Did you mean "max_iters"?')


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config is required"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py", "No such file"]),
        ([GPT2, "--config.max_iters=many"], ["--config.max_iters=many", "int"]),
        ([GPT2, "--config.bias=perhaps"], ["--config.bias=perhaps"]),
        ([GPT2, "--config.frob.x=3"], ['unknown config key "frob.x": keys have no dots']),
        ([GPT2, "--config.n_layer.x=3"], ['unknown config key "n_layer.x"']),
        ([GPT2, "--noconfig.frob.x"], ['unknown config key "frob.x"']),
        ([GPT2, "--config.n_head=5"], ["n_embd=768 is not divisible by n_head=5"]),
        ([GPT2, "--max_iters=3"], ["max_iters"]),
        ([GPT2, "max_iters=3"], ["unexpected argument 'max_iters=3'"]),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(arguments: list[str], parts: list[str]):
    done = call(*arguments)
    assert done.returncode == 2
    assert_one_line(done.stderr, *parts)


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("x = 1\ndef get_config(:\n", ["c.py, line 2: SyntaxError: invalid syntax;"]),
        ("x = 1\nimport nothere\n", ["c.py, line 2: ModuleNotFoundError", "'nothere'"]),
        ("def get_config():\n    return x\n", ["c.py, line 2: NameError: name 'x'"]),
        ("import json\njson.loads('')\n", ["c.py, line 2: JSONDecodeError"]),
        ("x = 1\n", ["c.py: get_config() is missing; expected"]),
        ("def get_config():\n    return {}\n", ["c.py: get_config() returns dict; expected"]),
        ("def get_config():\n    pass\n", ["c.py: get_config() returns NoneType; expected"]),
    ],
)
def test_a_config_file_that_is_wrong_is_named_with_line_and_cause(
    code: str, parts: list[str], tmp_path: Path
):
    (tmp_path / "c.py").write_text(code)
    done = call("--config=c.py", "--config.max_iters=3", cwd=tmp_path)
    assert done.returncode == 2
    assert_one_line(done.stderr, *parts)


@pytest.mark.parametrize("module", ["train", "train.prepare", "train.hellaswag"])
def test_help_does_not_wait_for_jax(module: str):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_every_key_can_be_set_from_the_command_line():
    """The values survive to the point where the data is missing: parsing and checking took them."""
    named = {
        "device": "cpu",
        "dtype": "bfloat16",
        "backend": "gloo",
        "family": "gpt_oss",
        "eval_mode": "full",
        "data_order": "epoch",
        "lr_schedule": "wsd",
        "attention": "xla",
        "optimizer": "muon",
        "remat": "full",
    }
    # What needs an extra, another process or another family.
    apart = {"wandb_log", "tensorboard", "mesh", "coordinator", "processes", "process", "bias"}
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - named.keys() - apart
    values = {name: changed(getattr(TrainConfig(), name)) for name in fields}
    config = TrainConfig(**named, **values)
    done = call(GPT2, *overrides(config))
    assert done.returncode == 1
    assert_one_line(done.stderr, "datax/openwebtextx: no such folder")


def changed(value: Any) -> Any:
    """Another value of the same type that any key takes."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return value * 2 or 1 if isinstance(value, int) else value / 2 or 0.25


@pytest.mark.slow
def test_prepare_and_train_from_the_command_line(testdata: Path, tmp_path: Path):
    text = str(testdata / "tinyshakespeare.txt")
    made = call(
        "--dataset=shakespeare_char", f"--text={text}", module="train.prepare", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    assert "1,003,854 training and 111,540 validation tokens, vocabulary 65" in made.stdout
    small = ["--config.max_iters=2", "--config.n_layer=1", "--config.eval_iters=1"]
    done = call(SHAKESPEARE, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out-shakespeare-char/model: best validation loss" in done.stdout
    looked = call(
        SHAKESPEARE,
        *small,
        "--config.eval_only",
        "--config.init_from=out-shakespeare-char/model",
        cwd=tmp_path,
    )
    assert looked.returncode == 0, looked.stderr
    shown = {"iter", "val_loss", "train_eval_loss", "val_bits_per_byte"}
    assert json.loads(looked.stdout).keys() == shown


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "give --dataset=NAME, or --text=GLOB with --out=DIR"),
        (["--text=a.txt", "--out="], 2, "give --dataset=NAME, or --text=GLOB with --out=DIR"),
        (["--dataset=openwebtext"], 2, "give its text with --text=GLOB"),
        (["--text=*.md", "--out=x"], 1, "--text=*.md: no such file"),
        (
            ["--text=*.txt", "--out=x", "--tokenizer=char", "--val_fraction=2"],
            1,
            "val_fraction=2.0",
        ),
        (["--text=*.txt", "--out=x", "--tokenizer=gpt2"], 1, "python -m convert --model=gpt2"),
        (["--text=*.txt", "--out=x", "--tokenizer=nowhere"], 1, "nowhere holds no tokenizer"),
    ],
)
def test_prepare_refuses_in_one_line(arguments: list[str], code: int, part: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text")
    done = call(*arguments, module="train.prepare", cwd=tmp_path)
    assert done.returncode == code
    assert_one_line(done.stderr, part)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143(config: TrainConfig):
    process = start(dataclasses.replace(config, n_layer=1, max_iters=10**6, eval_interval=10**6))
    wait_for(lambda: lines(config) >= 5, process)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: stopped at iteration" in error
    with Checkpoints(Path(config.out_dir) / "checkpoints") as checkpoints:
        assert f"stopped at iteration {checkpoints.latest()}, saved" in error


@pytest.mark.slow
def test_a_run_killed_while_saving_ends_with_the_same_parameters(
    config: TrainConfig, tmp_path: Path
):
    long = dataclasses.replace(config, eval_interval=5, eval_iters=1)
    folder = Path(config.out_dir) / "checkpoints"

    def saving_the_second() -> bool:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return any(map(str.isdigit, names)) and any(name.endswith("tmp") for name in names)

    process = start(long)
    wait_for(saving_the_second, process, every_s=0.0005)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_ends_as_an_uninterrupted_run(long, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 21, 34])
def test_a_run_killed_anywhere_ends_with_the_same_parameters(
    config: TrainConfig, tmp_path: Path, rows: int
):
    long = dataclasses.replace(config, eval_interval=5, eval_iters=1)
    process = start(long)
    wait_for(lambda: lines(config) >= rows, process, every_s=0.0005)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_ends_as_an_uninterrupted_run(long, tmp_path / "whole")


def assert_ends_as_an_uninterrupted_run(config: TrainConfig, whole_dir: Path) -> None:
    again = train.run(dataclasses.replace(config, init_from="auto"), progress=False)
    whole = train.run(dataclasses.replace(config, out_dir=str(whole_dir)), progress=False)
    assert different_arrays(again.out_dir, whole.out_dir) == []
    assert timeless_rows(again.out_dir) == timeless_rows(whole.out_dir)


def start(config: TrainConfig) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(GPT2, *overrides(config)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for(condition, process: subprocess.Popen[str], every_s: float = 0.01) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(every_s)


def lines(config: TrainConfig) -> int:
    path = Path(config.out_dir) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_converted_checkpoint_is_fine_tuned_from_the_command_line(tmp_path: Path):
    """Hugging Face's files, nanoGPT's recipe, a block size cropped from 32 to 16."""
    tokenizer = Tokenizer.utf8()
    shape = hf_checkpoints.CONFIG | {"vocab_size": 257, "n_positions": 32, "eos_token_id": 256}
    small = {
        name: 0.1 * x for name, x in hf_checkpoints.tensors(config=shape).items()
    }  # of unit variance, a random model's loss is 50 nats
    source = hf_checkpoints.write(
        tmp_path / "source",
        hf_checkpoints.prefixed(small),
        config=shape | {"bos_token_id": 256},
        files=tokenizer.files(),
    )
    (tmp_path / "input.txt").write_text("Once more unto the breach, dear friends. " * 200)
    made = [
        call(f"--source={source}", "--out=models/gpt2-xl", module="convert", cwd=tmp_path),
        call(
            "--dataset=shakespeare",
            "--text=input.txt",
            "--tokenizer=models/gpt2-xl",
            module="train.prepare",
            cwd=tmp_path,
        ),
        call(
            f"--config={ROOT / 'configs' / 'finetune_shakespeare.py'}",
            "--config.block_size=16",
            "--config.learning_rate=0.01",
            "--config.gradient_accumulation_steps=4",
            cwd=tmp_path,
        ),
        call(
            "--model=out-shakespeare/model",
            "--prompt=Once",
            "--max_new_tokens=4",
            module="core.generate",
            cwd=tmp_path,
        ),
    ]
    assert [done.returncode for done in made] == [0] * 4, [done.stderr for done in made]
    rows = read_rows(tmp_path / "out-shakespeare" / "metrics.jsonl")
    losses = {row["iter"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(losses) == [0, 5, 10, 15, 20]
    assert losses[20] < losses[0] - 0.5
    config = json.loads((tmp_path / "out-shakespeare" / "model" / "config.json").read_text())
    assert (config["n_positions"], config["activation_function"]) == (16, "gelu_new")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda folder: (folder / "val.bin").write_bytes(b"\1\0\2"), "3 bytes are not a whole"),
        (lambda folder: (folder / "val.bin").write_bytes(b""), "val.bin: empty; write it again"),
        (
            lambda folder: (folder / "val.bin").write_bytes(b"\xff" * 9000),
            "token id 65535 is outside",
        ),
        (
            lambda folder: (folder / "meta.pkl").write_bytes(b"cos\nsystem\n"),
            "opcode GLOBAL at byte 0",
        ),
        (
            lambda folder: (folder / "val.bin").write_bytes(bytes(64)),
            "block_size=1024 needs at least",
        ),
    ],
)
def test_bad_data_is_refused_before_jax_starts(tmp_path: Path, damage, part: str):
    folder = tmp_path / "data" / "openwebtext"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.zeros(2000, np.uint16).tofile(folder / name)
    damage(folder)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train', {GPT2!r}]\n"
        "try: runpy.run_module('train', run_name='__main__')\n"
        "finally: assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert_one_line(done.stderr, part)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["eval_only", "dry_run"])
def test_of_two_processes_one_says_what_was_found(config: TrainConfig, tmp_path: Path, key: str):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # A batch of 6 divides over two devices.
    common = dataclasses.replace(config, batch_size=6, processes=2, coordinator=address)
    common = dataclasses.replace(common, **{key: True})
    processes = [
        subprocess.Popen(
            command(GPT2, *overrides(dataclasses.replace(common, process=number))),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
        )
        for number in (0, 1)
    ]
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    first, second = (out for out, _ in found)
    if key == "eval_only":
        assert json.loads(first).keys() >= {"iter", "val_loss"}
    else:
        assert first.startswith("model ")
    assert second == ""  # nor what Gloo has to say
