"""How a run shows itself on stderr: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from train.metrics import Row

LINE_EVERY_S = 10.0


class Terminal:
    """Tells people what metrics.jsonl tells programs."""

    def __init__(self, *, first: int, total: int, shown: bool):
        self._shown, self._first, self._total = shown, first, total
        self._start = time.monotonic()
        self._bar = tqdm(
            initial=first,
            total=total,
            unit="it",
            dynamic_ncols=True,
            disable=None if shown else True,
        )
        self._line_due = time.monotonic() + LINE_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        if self._shown:
            tqdm.write(line, file=sys.stderr)

    def row(self, row: Row) -> None:
        """Shows a row; training rows move the bar, or where there is none are written every ten seconds."""
        if "val_loss" in row:
            bits = row.get("val_bits_per_byte")
            self.say(
                f"iter {row['iter']}: val loss {row['val_loss']:.4f}, "
                f"train loss {row['train_eval_loss']:.4f}"
                f"{'' if bits is None else f', {bits:.4f} bits per byte'}"
            )
            return
        self._bar.update(row["iter"] + 1 - self._bar.n)
        self._bar.set_postfix_str(_numbers(row), refresh=False)
        if self._bar.disable and time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_EVERY_S
            left = self._remaining(row["iter"])
            self.say(f"iter {row['iter']}/{self._total - 1}: {_numbers(row)}, {left} left")

    def _remaining(self, iteration: int) -> str:
        """The time to the end at the speed of this run so far, evaluations and all."""
        done = iteration + 1 - self._first
        seconds = (time.monotonic() - self._start) / done * (self._total - 1 - iteration)
        return tqdm.format_interval(seconds)


def _numbers(row: Row) -> str:
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    norm = "overflow" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    return (
        f"loss {row['train_loss']:.4f}, lr {row['lr']:.2e}, norm {norm}, "
        f"{row['tokens_per_s']:,.0f} tok/s, mfu {mfu}"
    )
