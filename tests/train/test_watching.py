"""What a run shows of itself: trackers, samples, traces, the dry run, the line on a terminal."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import train
from core.errors import ConfigError
from recorder import Recorder
from train import environment, metrics, progress
from train.config import TrainConfig


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    found = {name: Recorder(name) for name in ("wandb", "tensorboardX")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return found


@pytest.fixture
def watched(smallest_config: TrainConfig, recorders, tmp_path: Path) -> TrainConfig:
    assert recorders  # before the config, which looks for them
    return dataclasses.replace(
        smallest_config,
        out_dir=str(tmp_path / "out"),
        wandb_log=True,
        wandb_project="mill",
        wandb_run_name="first",
        tensorboard=True,
        sample_tokens=5,
        sample_prompt="the",
        profile_start=1,
        profile_steps=2,
    )


@pytest.mark.slow
def test_everything_that_can_be_watched_is(
    watched: TrainConfig, recorders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train.run(watched, progress=False)
    wandb, board = recorders["wandb"], recorders["tensorboardX"]
    (start,) = wandb.calls("init")
    assert (start["project"], start["name"], start["mode"]) == ("mill", "first", "offline")
    assert start["config"]["n_embd"] == 8
    rows = metrics.read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [row for (row,) in wandb.calls("log") if "val_loss" in row] == [
        row for row in rows if "val_loss" in row
    ]
    scalars = {(name, i): x for name, x, i in board.calls("add_scalar")}
    assert scalars["train_loss", 2] == next(
        row["train_loss"] for row in rows if row["iter"] == 2 and "train_loss" in row
    )
    samples = [row["sample"] for row in rows if "sample" in row]
    assert len(samples) == 3
    assert all(len(text) == 5 for text in samples)
    assert len(list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))) == 1

    train.run(dataclasses.replace(watched, init_from="resume", max_iters=4))
    # The iterations to trace are past: those that come are traced, and it is said.
    assert len(list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))) == 2
    assert "profile_start=1 is past: iterations 4 and on are traced" in capsys.readouterr().err
    again = wandb.calls("init")[1]
    assert (again["id"], again["resume"]) == (start["id"], "allow")
    assert board.calls("SummaryWriter")[1]["purge_step"] == 4


def test_what_made_the_run_is_written_beside_it():
    facts = environment.facts()
    assert facts["jax"] == jax.__version__
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", facts["commit"])


def test_an_extra_that_is_missing_is_a_usage_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key, extra in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        with pytest.raises(ConfigError, match=rf"pip install 'flaxmill-train\[{extra}\]'"):
            TrainConfig.from_dict({key: True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_prompt": "\N{SNOWMAN}"}, "sample_prompt='☃': .* has no '☃'"),
        ({"sample_prompt": ""}, "sample_prompt has 0 tokens"),
        ({"sample_tokens": 12}, "has 1 tokens, and sample_tokens=12 more; .* block_size=12"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_at_once(
    smallest_config: TrainConfig, tmp_path: Path, change: dict[str, Any], message: str
):
    config = dataclasses.replace(
        smallest_config,
        out_dir=str(tmp_path / "out"),
        **({"sample_tokens": 3, "sample_prompt": "a"} | change),
    )
    with pytest.raises(train.TrainError, match=message):
        train.run(config, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    smallest_config: TrainConfig, tmp_path: Path
):
    config = dataclasses.replace(smallest_config, out_dir=str(tmp_path / "out"), dry_run=True)
    report = train.run(config, progress=False).report
    assert not (tmp_path / "out").exists()
    lines = dict(line.split(maxsplit=1) for line in report.splitlines())
    assert "1 layers, 2 heads, 8 wide" in lines["model"]
    assert lines["parts"].startswith("blocks 7")
    assert "wpe 96" in lines["parts"]
    assert "1 x 3 sequences of 12 = 36 tokens" in lines["update"]
    assert "4 updates see 144" in lines["data"]
    assert "GB on the device" in lines["memory"]


def test_the_line_has_loss_rate_norm_speed_share_and_the_time_left(capsys):
    row = {
        "iter": 1,
        "train_loss": 2.5,
        "lr": 3e-4,
        "grad_norm": 0.75,
        "tokens_per_s": 1234.5,
        "mfu": None,
    }
    with progress.Terminal(first=0, total=4, shown=True) as terminal:
        terminal._line_due = 0.0
        terminal.row(row)
        terminal._line_due = 0.0
        terminal.row(row | {"mfu": 0.4, "grad_norm": None})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("iter 1/3: loss 2.5000, lr 3.00e-04, norm 0.75, 1,23")
    assert "tok/s, mfu n/a, 00:0" in first
    assert first.endswith(" left")
    assert "norm overflow" in second
    assert "mfu 40.0%" in second


def test_operations_are_counted_as_nanogpt_counts_them():
    from core.config import GPT2Config, GptOssConfig

    shape = GPT2Config(use_bias=False, vocab_size=50304)
    parameters = 124_373_760  # nanoGPT prints 124.34M for its own; without wpe 123.59M
    expected = 6 * (parameters - 1024 * 768) + 12 * 12 * 12 * 64 * 1024
    assert shape.parameter_count == parameters
    assert metrics.flops_per_token(shape, 1024) == expected
    experts = GptOssConfig(num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2)
    fewer = dataclasses.replace(experts, num_experts_per_tok=1)
    per_expert = 3 * 2880 * 2880 + 3 * 2880
    assert metrics.flops_per_token(experts, 64) - metrics.flops_per_token(fewer, 64) == (
        6 * 2 * per_expert
    )


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("cpu", None)],
)
def test_the_peak_is_known_or_said_to_be_unknown(kind: str, peak: float | None):
    assert metrics.peak_flops(kind) == peak
