"""The whole pipeline on real text, offline: about two minutes on two cores.

    python -m bench.demo [--out=out/demo] [--iters=300] [--prompts=300]

Takes the reference text that every CPython ships (`pydoc_data.topics`), trains a tokenizer and a small GPT-2 on it,
exports the model to a Hugging Face folder, converts that back and proves it identical, and continues a few hundred
prompts cut from text that the training has not seen, as a Beam job.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from core import door
from core.errors import FlaxmillError

_OUT = flags.DEFINE_string("out", "out/demo", "Where everything goes; emptied first.")
_ITERS = flags.DEFINE_integer("iters", 300, "Training iterations.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 300, "Prompts for the Beam job.", lower_bound=3)

HELD_OUT = 0.1  # of the text, at its end
VOCAB_SIZE = 1024
PROMPT_WORDS = 12
NEW_TOKENS = 48
SHOWN = 3


class DemoError(FlaxmillError):
    """The demo cannot go on."""


@dataclass
class Stages:
    """What each stage took and made, for the table at the end."""

    console: Console
    rows: list[tuple[str, float, str]] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[list[str]]:
        """Times the body; what it appends to the list is told in the table."""
        self.console.print(f"[bold]{len(self.rows) + 1}. {name}")
        results: list[str] = []
        start = time.perf_counter()
        yield results
        self.rows.append((name, time.perf_counter() - start, "; ".join(results)))

    def table(self) -> Table:
        table = Table("stage", "seconds", "result", box=None, pad_edge=False, header_style="bold")
        for name, seconds, result in self.rows:
            table.add_row(name, f"{seconds:.1f}", result)
        table.add_row("in all", f"{sum(row[1] for row in self.rows):.1f}", "", style="bold")
        return table


def main() -> None:
    out = Path(_OUT.value)
    _make_empty(out)
    progress = Console(stderr=True)
    stages = Stages(progress)
    with stages("text and tokenizer") as results:
        held_out = _prepare(out / "data", results)
    with stages("train a small GPT-2") as results:
        model = _train(out, _ITERS.value, results)
    with stages("export to Hugging Face, convert back, compare") as results:
        _round_trip(model, out, results)
    prompts = _prompts(held_out, _PROMPTS.value)
    with stages(f"continue {len(prompts)} prompts as a Beam job") as results:
        records = _generate(out, prompts, results)
    shown = Console(highlight=False)
    shown.print()
    shown.print(stages.table())
    shown.print(
        f"\nThree prompts of {len(prompts)} and their continuations (all: {out}/completions):"
    )
    for record in records[:: max(1, len(records) // SHOWN)][:SHOWN]:
        prompt = Text(prompts[record["index"]], style="dim") + Text(record["text"], style="bold")
        shown.print(Padding(prompt, (1, 4, 0, 2)))
    shown.print(
        f'\nYour own: .venv/bin/python -m core.generate --model={model} --prompt="The class"'
    )


def _make_empty(out: Path) -> None:
    """Empties the folder of an earlier demo, and no other."""
    marker = out / ".flaxmill-demo"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise DemoError(f"{out} exists and is not an earlier demo's; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _prepare(data: Path, results: list[str]) -> str:
    """Writes the token files; returns the text that is held out."""
    from pydoc_data.topics import topics

    from core import Tokenizer
    from train.prepare import prepare, split

    texts = [topics[name] for name in sorted(topics)]
    training, held_out = split(texts, HELD_OUT)
    tokenizer = Tokenizer.train(training, VOCAB_SIZE)
    meta = prepare(
        texts, data, tokenizer=tokenizer, val_fraction=HELD_OUT, source="pydoc_data.topics"
    )
    tokens = meta.train_tokens + meta.val_tokens
    results.append(f"{sum(map(len, texts)):,} characters, {tokens:,} tokens of {meta.vocab_size}")
    return "\n\n".join(held_out)


def _train(out: Path, iters: int, results: list[str]) -> Path:
    from train import TrainConfig, run

    config = TrainConfig(
        out_dir=str(out / "run"),
        data_dir=str(out),
        dataset="data",
        n_layer=4,
        n_head=4,
        n_embd=160,
        block_size=128,
        batch_size=12,
        gradient_accumulation_steps=1,
        dropout=0.0,
        bias=True,
        learning_rate=2e-3,
        min_lr=2e-4,
        beta2=0.99,
        max_iters=iters,
        lr_decay_iters=iters,
        warmup_iters=iters // 10,
        eval_interval=math.ceil(iters / 4),
        eval_iters=10,
    )
    result = run(config)
    rows = result.rows()
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    speeds = sorted(row["tokens_per_s"] for row in rows if row.get("tokens_per_s"))
    results.append(f"held-out loss {losses[0]:.2f} -> {min(losses):.2f} nats a token")
    results.append(f"{speeds[len(speeds) // 2]:,.0f} tokens/s")
    return result.model_dir


def _round_trip(model: Path, out: Path, results: list[str]) -> None:
    import convert
    from core import checkpoint

    exported = convert.export(model, to="hf", out=out / "huggingface")
    converted = convert.convert(exported, out=out / "converted")
    convert.verify(converted, against=exported)
    mine, theirs = (checkpoint.open(path).manifest["tensors"] for path in (model, converted))
    if {n: t["sha256"] for n, t in mine.items()} != {n: t["sha256"] for n, t in theirs.items()}:
        raise DemoError(f"{converted} is not bit for bit {model}")
    results.append(f"{len(mine)} tensors, bit for bit the same")


def _prompts(held_out: str, count: int) -> list[str]:
    """Returns the first words of `count` sentences, spread evenly over the text."""
    starts = [match.start(1) for match in re.finditer(r"(?:\n\n|[.:]\s+)([A-Z][a-z]+ )", held_out)]
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    first_words = re.compile(rf"(?:\S+\s+){{{PROMPT_WORDS}}}")
    found = [first_words.match(held_out, start) for start in chosen]
    return [match.group().rstrip() for match in found if match is not None]


def _generate(out: Path, prompts: list[str], results: list[str]) -> list[dict[str, Any]]:
    import serve_batch
    from core import Sampling

    rows = (json.dumps({"prompt": prompt}) for prompt in prompts)
    (out / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    sampling = Sampling(temperature=0.7, top_p=0.95, max_new_tokens=NEW_TOKENS)
    start = time.perf_counter()
    serve_batch.run(
        model=out / "converted",
        input=str(out / "prompts.jsonl"),
        output=out / "completions",
        sampling=sampling,
    )
    seconds = time.perf_counter() - start
    parts = sorted((out / "completions").glob("part-*.jsonl"))
    records = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    done = [record for record in records if record["status"] == "ok"]
    tokens = sum(record["completion_tokens"] for record in done)
    results.append(f"{len(records)} rows, {len(records) - len(done)} errors")
    results.append(f"{tokens / seconds:,.0f} tokens/s, compilation included")
    return done


if __name__ == "__main__":
    door.run(main)
