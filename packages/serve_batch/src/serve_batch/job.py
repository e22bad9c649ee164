"""A batch job from its arguments to its manifest: lock, plan or resume, run, verify, publish."""

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm

from core.config import PRECISIONS
from serve_batch import output as output_lib
from serve_batch import plan as plan_lib
from serve_batch import records
from serve_batch.output import OutputFolder, Receipt
from serve_batch.plan import Input, JobError, Plan, Scalar, UsageError
from serve_batch.records import RowError

if TYPE_CHECKING:
    from core import Sampling
    from serve_batch.shards import Job

_PROGRESS_S = 0.5
_LOCAL_RUNNERS = ("local", "FnApiRunner", "DirectRunner")
_REFUSED_RUNNERS = {
    "DaskRunner": "Beam's DaskRunner loses rows and reports success; use --runner=local",
    **{
        name: f"{name} is not supported yet; use --runner=local"
        for name in (
            "FlinkRunner",
            "SparkRunner",
            "DataflowRunner",
            "PortableRunner",
            "PrismRunner",
        )
    },
}


def run(
    *,
    model: str | Path,
    input: str | Path | Sequence[str | Path],
    output: str | Path,
    sampling: "Sampling | None" = None,
    slots: int = 16,
    precision: str | None = None,
    shard_size: int = 1024,
    workers: int = 1,
    runner: str = "local",
    beam_options: Sequence[str] = (),
    dry_run: bool = False,
    max_error_rate: float = 1.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turns prompt files into completions and returns the manifest, with what this run did of it.

    To the manifest's keys it adds `elapsed_s`, `shards_done`, `rows_done` and `tokens_done`.

    An interrupted job resumes when it is called again with the same arguments: what is finished is kept.

    Args:
      model: a model folder.
      input: a glob, or several, of .jsonl and .txt files.
      output: the folder for the parts; new, or of the same job.
      sampling: the defaults for rows that do not say otherwise.
      slots: rows that decode together.
      precision: one of `core.config.PRECISIONS`; by default what the model is stored in.
      shard_size: rows a part; an output folder that has a plan keeps its own.
      workers: processes; more than 1 is refused.
      runner: "local"; others are refused.
      beam_options: further flags for Beam.
      dry_run: reads and checks every row, and returns the counts; neither loads the model nor writes.
      max_error_rate: the share of error rows above which the job fails; what it wrote is kept.
      overwrite: starts anew where another job's output is.

    Raises:
      UsageError: arguments that cannot be.
      JobError: the job cannot start, or could not finish.
      core.CheckpointError: `model` is no whole model folder.
    """
    import core

    started = time.monotonic()
    sampling = sampling or core.Sampling()
    patterns = [input] if isinstance(input, str | Path) else list(input)
    _check(
        patterns,
        output,
        sampling,
        slots=slots,
        precision=precision,
        shard_size=shard_size,
        workers=workers,
        runner=runner,
        beam_options=beam_options,
        max_error_rate=max_error_rate,
    )
    folder = OutputFolder(plan_lib.absolute_path(output))
    root, inputs = plan_lib.find_inputs(patterns, output=folder.path)
    fingerprint = plan_lib.fingerprint(
        plan_lib.absolute_path(model), sampling, slots=slots, precision=precision
    )
    if dry_run:
        plan = plan_lib.make(root, inputs, shard_size=shard_size, fingerprint=fingerprint)
        return _inspect(plan, sampling)
    folder.check_ours()
    with folder.lock():
        plan = _settle(folder, root, inputs, shard_size, fingerprint, overwrite=overwrite)
        left = [shard for shard in plan.shards if folder.receipt(plan, shard) is None]
        if left:
            from serve_batch.shards import Job

            job = Job(
                model=plan_lib.absolute_path(model),
                output=folder,
                sampling=sampling,
                slots=slots,
                precision=precision,
                reports_progress=sys.stderr.isatty(),
            )
            with _progress(folder, plan.rows, done=plan.rows - sum(s.rows for s in left)):
                _generate(job, beam_options)
            now = plan_lib.find_inputs(patterns, output=folder.path)
            _expect_unchanged(folder, plan, *now, fingerprint)
        manifest = _publish(folder, plan, max_error_rate)
        receipts = [receipt for shard in left if (receipt := folder.receipt(plan, shard))]
    return manifest | {
        "elapsed_s": time.monotonic() - started,
        "shards_done": len(left),
        "rows_done": sum(receipt.rows for receipt in receipts),
        "tokens_done": sum(receipt.completion_tokens for receipt in receipts),
    }


def _check(
    patterns: Sequence[str | Path],
    output: str | Path,
    sampling: "Sampling",
    *,
    slots: int,
    precision: str | None,
    shard_size: int,
    workers: int,
    runner: str,
    beam_options: Sequence[str],
    max_error_rate: float,
) -> None:
    """Raises UsageError for arguments that cannot be, before anything is read."""
    if not patterns or not all([*patterns, output]):
        raise UsageError("give --input=GLOB and --output=DIR")
    for name, value in {"slots": slots, "shard_size": shard_size, "workers": workers}.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if workers > 1:
        raise UsageError(
            f"workers is {workers}; one process is what is supported yet, and it uses every core: Beam's local "
            "runner waits without end for a worker process that was killed"
        )
    if not 0 <= max_error_rate <= 1:
        raise UsageError(f"max_error_rate is {max_error_rate}; expected a share between 0 and 1")
    if sampling.logprobs is not None:
        raise UsageError("log-probabilities are not supported in batch output yet")
    if runner not in _LOCAL_RUNNERS:
        raise UsageError(_REFUSED_RUNNERS.get(runner, f"there is no runner {runner!r}; use local"))
    if beam_options:
        from serve_batch import runners

        runners.pipeline_options(beam_options)


def _settle(
    folder: OutputFolder,
    root: Path,
    inputs: Sequence[Input],
    shard_size: int,
    fingerprint: Mapping[str, Scalar],
    *,
    overwrite: bool,
) -> Plan:
    """Returns the plan to carry out: the one that is there, if it is this job's, else a new one, written down."""
    plan = None if overwrite else folder.read_plan()
    if plan is None:
        plan = plan_lib.make(root, inputs, shard_size=shard_size, fingerprint=fingerprint)
        if overwrite:
            folder.clear()
        with output_lib.committing(folder.plan_file) as file:
            file.write(plan.to_json())
    _expect_unchanged(folder, plan, root, inputs, fingerprint)
    folder.remove_leftovers()
    return plan


def _expect_unchanged(
    folder: OutputFolder,
    plan: Plan,
    root: Path,
    inputs: Sequence[Input],
    fingerprint: Mapping[str, Scalar],
) -> None:
    if changes := plan_lib.changes(plan, root, inputs, fingerprint):
        raise JobError(
            f"{folder.path} belongs to another job: {'; '.join(changes[:4])}; "
            "choose another output folder, or start anew with --overwrite"
        )


def _generate(job: "Job", beam_options: Sequence[str]) -> None:
    from serve_batch import runners

    with runners.quiet():
        try:
            runners.run(job, *runners.local(beam_options))
        except Exception as error:
            what = runners.cause(error)
            if what == KeyboardInterrupt.__name__:  # Beam makes a RuntimeError of it
                raise KeyboardInterrupt from error
            raise JobError(
                f"{what}; finished shards are kept: run the same command again to go on"
            ) from error


def _publish(folder: OutputFolder, plan: Plan, max_error_rate: float) -> dict[str, Any]:
    """Returns the manifest, written once every part has been verified, and `_SUCCESS` after it."""
    manifest = _manifest(plan, output_lib.verified(folder, plan))
    folder.write_json("manifest.json", manifest)
    rows, errors = manifest["rows"], manifest["errors"]
    if errors > max_error_rate * rows:
        raise JobError(
            f"{errors} of {rows} rows are errors ({errors / rows:.1%}), more than --max_error_rate="
            f"{max_error_rate}; most often {max(manifest['errors_by_code'].items(), key=_count)[0]}. "
            f"The parts are kept in {folder.path}, without _SUCCESS; see its errors folder"
        )
    folder.write_json("_SUCCESS", {})
    return manifest


def _count(item: tuple[str, int]) -> int:
    return item[1]


def _manifest(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Returns what the parts hold; the same for the same job, whoever did it and however often it was resumed."""
    by_code = sum((Counter(receipt.errors) for receipt in receipts), Counter())
    parts = [
        {"file": plan.part_name(shard), "rows": r.rows, "bytes": r.bytes, "sha256": r.sha256}
        for shard, r in zip(plan.shards, receipts, strict=True)
    ]
    rows = sum(receipt.rows for receipt in receipts)
    assert rows == plan.rows
    return {
        "schema_version": records.SCHEMA_VERSION,
        "fingerprint": dict(plan.fingerprint),
        "date": plan.date,
        "inputs": [i._asdict() for i in plan.inputs],
        "rows": rows,
        "ok": rows - by_code.total(),
        "errors": by_code.total(),
        "errors_by_code": dict(sorted(by_code.items())),
        "duplicate_ids": _duplicates(receipts),
        "prompt_tokens": sum(receipt.prompt_tokens for receipt in receipts),
        "completion_tokens": sum(receipt.completion_tokens for receipt in receipts),
        "devices": sorted({receipt.device for receipt in receipts}),
        "parts": parts,
    }


def _duplicates(receipts: Sequence[Receipt]) -> int:
    """How many rows brought an id that a row before them had brought."""
    ids = np.frombuffer(bytes.fromhex("".join(receipt.ids for receipt in receipts)), np.uint64)
    return len(ids) - len(np.unique(ids))


def _inspect(plan: Plan, sampling: "Sampling") -> dict[str, Any]:
    """Returns what a dry run can tell: the rows, and those that are none."""
    from serve_batch import shards

    by_code: Counter[str] = Counter()
    progress = tqdm.tqdm(total=plan.rows, unit=" prompts", unit_scale=True, disable=None)
    with progress:
        for shard in plan.shards:
            rows = shards.read(plan, shard, sampling)
            by_code.update(row.content.code for row in rows if isinstance(row.content, RowError))
            progress.update(shard.rows)
    return {
        "inputs": [i._asdict() for i in plan.inputs],
        "shards": len(plan.shards),
        "rows": plan.rows,
        "errors": by_code.total(),
        "errors_by_code": dict(sorted(by_code.items())),
    }


@contextlib.contextmanager
def _progress(folder: OutputFolder, total: int, done: int) -> Iterator[None]:
    """Shows on a terminal what the workers report, in this process or others."""
    bar = tqdm.tqdm(total=total, initial=done, unit=" prompts", disable=None)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder.progress_file, bar, ended), daemon=True)
    with bar:
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            folder.progress_file.unlink(missing_ok=True)


def _watch(path: Path, bar: tqdm.tqdm, ended: threading.Event) -> None:
    """Adds up what is appended to `path` until `ended`."""
    position = tokens = errors = 0
    started = time.monotonic()
    is_last = False
    while not is_last:
        is_last = ended.wait(_PROGRESS_S)
        try:
            with path.open("rb") as file:
                file.seek(position)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            continue
        for line in lines:
            position += len(line)
            rows, more_tokens, more_errors = map(int, line.split())
            bar.update(rows)
            tokens, errors = tokens + more_tokens, errors + more_errors
        rate = tokens / (time.monotonic() - started)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s, {errors} errors")
