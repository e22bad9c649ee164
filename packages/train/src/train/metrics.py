"""What a run says about itself: rows of metrics.jsonl, throughput, and the loss curve."""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.config import Config, GptOssConfig
from train.preflight import TrainError

# Dense bfloat16 peaks in FLOP/s by jax's device_kind (vendors' data sheets; the sparse figures are twice these).
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}

Row = Mapping[str, Any]


class MetricsLog:
    """The file metrics.jsonl, one JSON object a line, in the order of the iterations."""

    def __init__(self, path: Path, *, resume_at: int | None = None, writes: bool = True):
        """Opens `path` for appending; `resume_at` drops the rows that the resumed run will write again.

        Without `writes` nothing is written: another process does.
        """
        self.path, self._file = path, None
        if not writes:
            return
        kept = [] if resume_at is None else [r for r in read_rows(path) if r["iter"] < resume_at]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(_line(row) for row in kept))
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], 1)]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrainError(f"{where}: not JSON ({error}); remove the line") from error
    if not isinstance(row, dict) or type(row.get("iter")) is not int:
        raise TrainError(f"{where}: expected an object with a whole number 'iter'; remove the line")
    return row


def _line(row: Row) -> str:
    """A number that is not finite has no place in JSON: whoever writes a row says what it is."""
    return json.dumps(row, allow_nan=False) + "\n"


def flops_per_token(model: Config, block_size: int) -> int:
    """The count of nanoGPT: 6 a parameter, positions aside, and 12*L*N*H*T for attention, not halved for the mask.

    Of a mixture of experts the parameters that a token meets.
    """
    heads = model.axes["N"] * model.axes["H"]
    if isinstance(model, GptOssConfig):
        parameters = model.active_parameter_count
    else:
        parameters = model.parameter_count - model.context_length * model.axes["D"]
    return 6 * parameters + 12 * model.axes["L"] * heads * block_size


def peak_flops(device_kind: str) -> float | None:
    """The device's dense bfloat16 peak, or None for a device we have no figure for."""
    return next((f for name, f in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


class Clock:
    """Where the wall time of a run goes, in seconds: what is neither named nor in an update is "other"."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        names = "updates", "compiling", "evaluating", "saving"
        self._spent: dict[str, float] = dict.fromkeys(names, 0.0)
        self.reading = 0.0
        """Batches, while the device computes: beside the others, not one of them."""

    def add(self, name: str, seconds: float) -> None:
        self._spent[name] += seconds

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def goodput(self) -> float:
        """The share of the time so far that went into updates."""
        return self._spent["updates"] / (time.perf_counter() - self._start)

    def __str__(self) -> str:
        total = time.perf_counter() - self._start
        parts = self._spent | {"other": max(0.0, total - sum(self._spent.values()))}
        told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        return (
            f"goodput {self.goodput():.1%} of {total:.1f} s: {told}; "
            f"reading batches {self.reading:.1f} meanwhile"
        )


class Throughput:
    """A stopwatch for updates of a known size."""

    def __init__(self, tokens_per_step: int, flops_per_token: int, peak: float | None):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak
        self.seconds = 0.0
        """Of the last lap."""
        self.restart()

    def restart(self) -> None:
        """Starts the lap anew, after something that is not an update."""
        self._start = time.perf_counter()

    def lap(self) -> dict[str, float | None]:
        """Ends a lap of one update; mfu is the share of the device's peak, None where that is unknown."""
        now = time.perf_counter()
        self.seconds, self._start = now - self._start, now
        tokens_per_s = self._tokens / self.seconds
        mfu = None if self._peak is None else tokens_per_s * self._flops / self._peak
        return {"tokens_per_s": tokens_per_s, "mfu": mfu}


def plot(rows: Iterable[Row], path: Path) -> None:
    """Writes the loss curve as a PNG."""
    from matplotlib.figure import Figure

    rows = list(rows)
    axes = (figure := Figure(figsize=(8, 5), layout="tight")).subplots()
    for key, style in (("train_loss", "-"), ("train_eval_loss", ".--"), ("val_loss", "o-")):
        points = [(row["iter"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            faint = 0.4 if key == "train_loss" else 1.0
            axes.plot(*zip(*points, strict=True), style, label=key, alpha=faint)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
