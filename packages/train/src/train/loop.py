"""The training loop: every effect of a run is here, around the pure `step.update`.

At the top of iteration i the state has seen i updates. There the run may stop, evaluate and save, so whatever is saved
continues with the very next update. `max_iters` counts as in nanoGPT, whose loop makes max_iters + 1 updates.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import checkpoint as model_folder
from core import compiled
from core.models import Params
from train import (
    compute,
    dry_run,
    environment,
    guards,
    metrics,
    optimizer,
    preflight,
    program,
    samples,
    step,
)
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.data import Dataset
from train.devices import Devices, any_process, is_first_process, join, open_devices, wait_for_all
from train.evaluate import Evaluate, evaluator
from train.metrics import Clock, MetricsLog, Throughput
from train.origin import Origin, TrainError, begin
from train.preflight import METRICS_FILE, RUN_FILES
from train.profiler import Profiler
from train.progress import Terminal
from train.trackers import Trackers


@dataclass(frozen=True)
class Result:
    """How a run ended: updates made, its last evaluation, and the signal that cut it short, if one did.

    `losses` has "val_loss" and "train_eval_loss", or nothing if a signal came before the first evaluation. Of a dry
    run there is the `report` and nothing else.
    """

    out_dir: Path
    iteration: int
    losses: dict[str, float]
    best_val_loss: float
    stopped_by: signal.Signals | None = None
    report: str = ""

    @property
    def model_dir(self) -> Path:
        """The model folder with the best weights by validation loss."""
        return self.out_dir / "model"

    def rows(self) -> list[dict[str, Any]]:
        """Every row of metrics.jsonl."""
        return metrics.read_rows(self.out_dir / METRICS_FILE)


def run(config: TrainConfig, *, progress: bool = True) -> Result:
    """Trains as `config` says, and returns how it ended; `progress` shows it on stderr.

    Raises:
      DataError: the data folder is missing or corrupt.
      TrainError: `out_dir` holds another run, the weights do not fit, or the loss is no longer finite.
      core.CheckpointError: the model folder to start from cannot be read.
    """
    plan = preflight.check(config)
    dataset, resumes, out_dir = plan.dataset, plan.resumes, Path(config.out_dir)
    join(config)
    devices = open_devices(config)
    dtype = compute.product_dtype(config, devices.platform)
    compiled.keep(config.compile_cache)
    if config.dry_run:
        with jax.set_mesh(devices.mesh):
            report = dry_run.report(config, plan, devices)
        return Result(out_dir, 0, {}, math.inf, report=report)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_device(devices.first))
        stack.enter_context(jax.set_mesh(devices.mesh))
        stack.enter_context(jax.disable_jit(not config.compile))
        open_checkpoints = functools.partial(
            Checkpoints,
            out_dir / "checkpoints",
            keep_last=config.keep_last,
            keep_every=config.keep_every,
        )
        checkpoints = stack.enter_context(open_checkpoints()) if resumes else None
        origin = begin(config, plan, checkpoints, key=init_key, devices=devices)
        model = compute.fitted(origin.model, config, devices)
        evaluate = evaluator(model, config, dataset, dtype)
        if config.eval_only:
            losses = evaluate(weights(origin.state))
            best = min(losses["val_loss"], origin.best_val_loss)
            return Result(out_dir, origin.iteration, losses, best)
        resume_at = origin.iteration if resumes else None
        log = _open_out_dir(config, out_dir, resume_at)
        stack.callback(log.close)
        trackers = stack.enter_context(
            Trackers(config, run_id=origin.progress.wandb_id, resume_at=resume_at)
        )
        trainer = _Trainer(
            config=config,
            dataset=dataset,
            devices=devices,
            origin=origin,
            dropout_key=dropout_key,
            evaluate=evaluate,
            update=program.update(
                model=model,
                config=config,
                dtype=dtype,
                platform=devices.platform,
                out_shardings=(devices.shardings(model.config, origin.state), devices.whole),
            ),
            checkpoints=checkpoints or stack.enter_context(open_checkpoints()),
            log=log,
            trackers=trackers,
            terminal=stack.enter_context(
                Terminal(
                    first=origin.iteration,
                    total=config.max_iters + 1,
                    shown=progress and is_first_process(),
                )
            ),
            throughput=_throughput(config, origin, devices),
        )
        trainer.say_facts(f"{devices}; {compute.described(model, dtype)}")
        return trainer.train()


@dataclass(kw_only=True)
class _Trainer:
    """A run under way: the state, the best loss so far, and the update whose numbers have not been read yet."""

    config: TrainConfig
    dataset: Dataset
    devices: Devices
    origin: Origin
    dropout_key: jax.Array
    evaluate: Evaluate
    update: Callable[..., tuple[step.State, dict[str, jax.Array]]]
    checkpoints: Checkpoints
    log: MetricsLog
    trackers: Trackers
    terminal: Terminal
    throughput: Throughput
    state: step.State = field(init=False)
    best_val_loss: float = field(init=False)
    losses: dict[str, float] = field(init=False)
    profiler: Profiler = field(init=False)
    clock: Clock = field(init=False, default_factory=Clock)
    pending: tuple[int, dict[str, jax.Array]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.state, self.best_val_loss = self.origin.state, self.origin.best_val_loss
        evaluations = [row for row in metrics.read_rows(self.log.path) if "val_loss" in row]
        last = evaluations[-1] if evaluations else {}
        self.losses = {name: x for name, x in last.items() if name not in ("iter", "goodput")}
        self.checkpoints.best = self.origin.progress.best_iteration
        self.profiler = Profiler(
            Path(self.config.out_dir) / "profile",
            self.config.profile_start,
            self.config.profile_steps,
            first=self.origin.iteration,
        )

    @property
    def weights(self) -> Params:
        return weights(self.state)

    def say_facts(self, computing: str) -> None:
        c, model = self.config, self.origin.model.config
        self.terminal.say(
            f"{self.dataset.path}: {len(self.dataset.tokens['train']):,} training and "
            f"{len(self.dataset.tokens['val']):,} validation tokens, vocabulary {model.vocab_size:,}"
        )
        self.terminal.say(
            f"{model.parameter_count / 1e6:.2f}M parameters from {self.origin.description}; {computing}"
        )
        for note in self.devices.notes(model):
            self.terminal.say(note)
        self.terminal.say(
            f"an update is {c.gradient_accumulation_steps} x {c.batch_size} sequences of "
            f"{c.block_size} = {c.tokens_per_step:,} tokens; out_dir {c.out_dir}"
        )
        if c.profile_steps and c.profile_start < self.origin.iteration:
            self.terminal.say(
                f"profile_start={c.profile_start} is past: iterations "
                f"{self.origin.iteration} and on are traced"
            )
        if not c.compile:
            self.terminal.say("operation by operation, without compiling: for debugging, and slow")

    def train(self) -> Result:
        first, last = self.origin.iteration, self.config.max_iters
        with _stop_signals() as stops, self.profiler:
            for iteration in range(first, last + 1):
                if self.is_told_to_stop(stops, iteration):
                    return self.end(iteration, stopped_by=stops[0] if stops else signal.SIGTERM)
                if iteration % self.config.eval_interval == 0 or iteration == last:
                    self.look(iteration)
                elif self.config.ckpt_interval and iteration % self.config.ckpt_interval == 0:
                    self.read_pending()
                    self.save(iteration)
                    self.throughput.restart()
                self.profiler.before(iteration, wait=self.read_pending)
                self.advance(iteration)
            return self.end(max(first, last + 1))

    def is_told_to_stop(self, stops: list[signal.Signals], iteration: int) -> bool:
        """Several processes agree at every log_interval, for they stop at the same iteration or wait for ever."""
        if jax.process_count() == 1:
            return bool(stops)
        return iteration % self.config.log_interval == 0 and any_process(bool(stops))

    def advance(self, iteration: int) -> None:
        """Starts update number `iteration`, then reads the one before: the device never waits for the host."""
        c = self.config
        read = functools.partial(
            self.dataset.batch,
            "train",
            seed=c.seed,
            step=0 if c.overfit_batch else iteration,
            rows=c.sequences_per_step,
            length=c.block_size + 1,
            order=c.data_order,
        )
        start = time.perf_counter()
        tokens_ABS = self.devices.tokens(
            (c.gradient_accumulation_steps, c.batch_size, c.block_size + 1),
            lambda rows: read(chosen=rows),
        )
        self.clock.reading += time.perf_counter() - start
        rate = np.float32(optimizer.learning_rate(c, iteration))
        key = jax.random.fold_in(self.dropout_key, iteration) if c.dropout else None
        self.state, numbers = self.update(self.state, tokens_ABS, rate, key)
        self.read_pending()
        self.pending = iteration, numbers

    def read_pending(self) -> None:
        """Waits for the update that was started last, stops the run if it went wrong, and logs it."""
        if self.pending is None:
            return
        (iteration, numbers), self.pending = self.pending, None
        losses = {name: float(numbers[name]) for name in ("train_loss", "grad_norm")}
        speed = self.throughput.lap()
        is_first = iteration == self.origin.iteration
        self.clock.add("compiling" if is_first else "updates", self.throughput.seconds)
        scale = {name: float(numbers[name]) for name in ("loss_scale",) if name in numbers}
        skipped = self.why_skipped(iteration, losses, numbers, scale.get("loss_scale", 0.0))
        row = {
            "iter": iteration,
            **{name: x if math.isfinite(x) else None for name, x in losses.items()},
            "lr": optimizer.learning_rate(self.config, iteration),
            **scale,
            **({"skipped": skipped} if skipped else {}),
            **speed,
        }
        if iteration % self.config.log_interval == 0:
            self.record(row)
        self.terminal.row({**row, **losses})

    def why_skipped(
        self, iteration: int, losses: dict[str, float], numbers: dict[str, jax.Array], scale: float
    ) -> str:
        """Tells why an update was left out, "" if it was made; stops the run if it went wrong.

        A scale below 1 is no longer to blame for a gradient that overflows.
        """
        if scale >= 1 and not math.isfinite(losses["grad_norm"]):
            self.terminal.say(f"iter {iteration}: skipped, the loss scale falls to {scale:g}")
            return "overflow"
        self.check_finite(iteration, losses, int(numbers["bad_leaf"]))
        if numbers["kept"]:
            return ""
        self.terminal.say(
            f"iter {iteration}: skipped, the gradient's norm {losses['grad_norm']:.3g} is more "
            f"than {self.config.skip_spikes:g} deviations above the last {guards.WINDOW}"
        )
        return "spike"

    def record(self, row: dict[str, Any]) -> None:
        self.log.write(row)
        self.trackers.write(row)

    def look(self, iteration: int) -> None:
        """Evaluates; keeps the model if it is the best so far, and the state if that is to be kept."""
        self.read_pending()
        with self.clock.during("evaluating"):
            losses = self.evaluate(self.weights)
        self.check_finite(iteration, losses)
        self.losses = losses
        row = {"iter": iteration, **losses}
        self.record(row | {"goodput": self.clock.goodput()})
        self.terminal.row(row)
        if self.config.sample_tokens:
            with self.clock.during("evaluating"):
                self.sample(iteration)
        improved = losses["val_loss"] < self.best_val_loss
        if improved:
            self.best_val_loss, self.checkpoints.best = losses["val_loss"], iteration
            self.save_model(row)
        if iteration > 0 and (improved or self.config.always_save_checkpoint):
            self.save(iteration)
        self.throughput.restart()

    def sample(self, iteration: int) -> None:
        """Shows what the model writes by now; the same draws each time, and none of the training's."""
        assert self.dataset.tokenizer is not None  # preflight has seen to it
        text = samples.continuation(
            self.origin.model, self.weights, self.dataset.tokenizer, self.config
        )
        self.record({"iter": iteration, "sample": text})
        self.terminal.say(f"iter {iteration}: {self.config.sample_prompt + text!r}")

    def save(self, iteration: int) -> None:
        progress = dataclasses.replace(
            self.origin.progress,
            best_val_loss=self.best_val_loss,
            best_iteration=self.checkpoints.best,
            wandb_id=self.trackers.run_id,
        )
        with self.clock.during("saving"):
            self.checkpoints.save(iteration, self.state, progress)

    def save_model(self, row: metrics.Row) -> None:
        """Writes the model folder, before the checkpoint of the same iteration: what is resumed from has its model."""
        with self.clock.during("saving"):
            weights = self.devices.gathered(self.weights)
            if not is_first_process():
                return
            model_folder.save(
                Path(self.config.out_dir) / "model",
                self.origin.model.config,
                weights,
                tokenizer=self.dataset.tokenizer,
                source={"trained_on": str(self.dataset.path), **row},
                overwrite=True,
            )

    def check_finite(self, iteration: int, numbers: dict[str, float], bad_leaf: int = -1) -> None:
        bad = [f"{name} is {x}" for name, x in numbers.items() if not math.isfinite(x)]
        if bad:
            latest = self.checkpoints.latest()
            good = "none was written yet" if latest is None else self.checkpoints.path(latest)
            raise TrainError(
                f"iteration {iteration}: {' and '.join(bad)}{self.culprit(bad_leaf)}; stopped. "
                f"Last good checkpoint: {good}. "
                "Try a lower learning_rate, a longer warmup_iters or grad_clip=1.0"
            )

    def culprit(self, bad_leaf: int) -> str:
        """Names the first weight that is not finite, or where the weights are the first such gradient."""
        names, weights = guards.names(self.state.params), jax.tree.leaves(self.state.params)
        for name, leaf in zip(names, weights, strict=True):
            if not jnp.isfinite(leaf).all():
                return f", {name} is not finite"
        return f", and so is the gradient of {names[bad_leaf]}" if bad_leaf >= 0 else ""

    def end(self, iteration: int, stopped_by: signal.Signals | None = None) -> Result:
        self.read_pending()
        if iteration > self.origin.iteration:
            self.save(iteration)
        out_dir = Path(self.config.out_dir)
        self.terminal.say(str(self.clock))
        if is_first_process():
            metrics.plot(metrics.read_rows(self.log.path), out_dir / "loss.png")
        return Result(out_dir, iteration, self.losses, self.best_val_loss, stopped_by)


def weights(state: step.State) -> Params:
    """What is evaluated and kept: the average of the weights if there is one."""
    return state.params if state.ema is None else state.ema


def _throughput(config: TrainConfig, origin: Origin, devices: Devices) -> Throughput:
    flops = metrics.flops_per_token(origin.model.config, config.block_size)
    peak = metrics.peak_flops(devices.first.device_kind)
    return Throughput(config.tokens_per_step, flops, None if peak is None else peak * devices.count)


def _open_out_dir(config: TrainConfig, out_dir: Path, resume_at: int | None) -> MetricsLog:
    """Makes `out_dir` ready, empty unless resuming; metrics.jsonl comes first, as the mark of a run."""
    wait_for_all("everyone has seen what is in out_dir")
    writes = is_first_process()
    if writes and resume_at is None:
        _clear(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(out_dir / METRICS_FILE, resume_at=resume_at, writes=writes)
    if writes:
        for name, content in {
            "config": config.to_dict(),
            "environment": environment.facts(),
        }.items():
            temporary = out_dir / f"{name}.json.tmp"
            temporary.write_text(json.dumps(content, indent=2) + "\n")
            temporary.replace(out_dir / f"{name}.json")
    wait_for_all("out_dir is ready")
    return log


def _clear(out_dir: Path) -> None:
    for path in (out_dir / name for name in RUN_FILES):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and SIGINT, so that the loop can save and leave; a second one takes effect at once."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        restore()

    for number in former:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
