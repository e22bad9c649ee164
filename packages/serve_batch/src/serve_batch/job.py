"""A batch job from its arguments to its manifest: lock, plan or resume, run, verify, publish."""

import contextlib
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm

from core.errors import FlaxmillError
from serve_batch import inputs as inputs_lib
from serve_batch import plan as plan_lib
from serve_batch import processes, records, stores
from serve_batch.errors import KEPT, JobError, Unreachable, UsageError
from serve_batch.inputs import Input
from serve_batch.output import OutputFolder, Receipt
from serve_batch.plan import Plan, Scalar
from serve_batch.records import RowError

if TYPE_CHECKING:
    from core import Sampling
    from serve_batch.shards import Job

_PROGRESS_S = 0.5
_LOCAL_RUNNERS = ("local", "FnApiRunner", "DirectRunner")
_CLUSTER_RUNNERS = ("FlinkRunner", "SparkRunner", "DataflowRunner", "PortableRunner", "PrismRunner")
_REFUSED_RUNNERS = {
    "DaskRunner": "Beam's DaskRunner loses rows and reports success; use --runner=local",
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
    long_prompts: records.LongPrompts = "error",
    output_format: plan_lib.OutputFormat = "jsonl",
    retry_errors: bool | Collection[str] = False,
) -> dict[str, Any]:
    """Turns prompt files into completions and returns the manifest, with what this run did of it.

    To the manifest's keys it adds `elapsed_s`, `shards_done`, `rows_done` and `tokens_done`.

    An interrupted job resumes when it is called again with the same arguments: what is finished is kept.

    Args:
      model: a model folder.
      input: a glob, a folder or a file, or several, of .jsonl, .txt and .parquet; here, or at gs:// or s3://.
      output: the folder for the parts; new, or of the same job; here, or at gs:// or s3://.
      sampling: the defaults for rows that do not say otherwise.
      slots: rows that decode together.
      precision: one of `core.config.PRECISIONS`; by default what the model is stored in.
      shard_size: rows a part; an output folder that has a plan keeps its own.
      workers: processes on this machine, each with an accelerator of its own if there are any; with one of Beam's
        runners, workers on the cluster.
      runner: "local", or one of Beam's for clusters; see docs/batch.md.
      beam_options: further flags for Beam.
      dry_run: reads and checks every row, and returns the counts; neither loads the model nor writes.
      max_error_rate: the share of error rows above which the job fails; what it wrote is kept.
      overwrite: starts anew where another job's output is.
      long_prompts: what is done with a prompt that the model's context does not hold, or that leaves no room for
        max_new_tokens: one of `records.LONG_PROMPTS`.
      output_format: one of `plan.OUTPUT_FORMATS`.
      retry_errors: does the error rows of finished shards again, all, or those with one of these codes; sampling and
        other settings may then differ from those of the job, the model may not.

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
        long_prompts=long_prompts,
        output_format=output_format,
        retry_errors=retry_errors,
        is_clear=not (overwrite and retry_errors),
    )
    codes = None if retry_errors is False else _codes(retry_errors)
    folder = OutputFolder(stores.absolute(output))
    root, inputs = inputs_lib.find(patterns, output=folder.place)
    fingerprint = plan_lib.fingerprint(
        plan_lib.absolute_path(model),
        sampling,
        slots=slots,
        precision=precision,
        long_prompts=long_prompts,
        output_format=output_format,
    )
    if dry_run:
        plan = plan_lib.make(root, inputs, shard_size=shard_size, fingerprint=fingerprint)
        return _inspect(plan, sampling)
    folder.check_ours()
    with folder.lock():
        plan = _settle(
            folder,
            root,
            inputs,
            shard_size,
            fingerprint,
            overwrite=overwrite,
            codes=codes,
        )
        before = folder.receipts(plan)
        others = _others(plan, fingerprint)
        _expect_finished(folder, before, others)
        left = [
            shard
            for shard, receipt in zip(plan.shards, before, strict=True)
            if receipt is None or receipt.selected(codes)
        ]
        if left:
            from serve_batch.shards import Job

            job = Job(
                model=plan_lib.absolute_path(model),
                output=folder,
                sampling=sampling,
                slots=slots,
                precision=precision,
                long_prompts=long_prompts,
                retried_codes=codes,
                retried_with=others,
                reports_progress=sys.stderr.isatty(),
            )
            done = plan.rows - sum(shard.rows for shard in left)
            with _progress(folder, plan.rows, done), contextlib.closing(inputs_lib.idle):
                _generate(job, [s.number for s in left], runner, beam_options, workers)
            now = inputs_lib.find(patterns, output=folder.place)
            _expect_unchanged(folder, plan, *now, fingerprint | _of_plan(plan, others))
        after = folder.verified(plan)
        manifest = _publish(folder, plan, after, max_error_rate)
    return manifest | {
        "elapsed_s": time.monotonic() - started,
        "shards_done": len(left),
        "rows_done": sum(
            shard.rows if (was := before[shard.number]) is None else was.selected(codes)
            for shard in left
        ),
        "tokens_done": sum(
            after[shard.number].completion_tokens
            - (was.completion_tokens if (was := before[shard.number]) else 0)
            for shard in left
        ),
    }


def _codes(retry_errors: bool | Collection[str]) -> frozenset[str]:
    """Returns the codes of errors to do again; none at all stands for every one."""
    return frozenset() if isinstance(retry_errors, bool) else frozenset(retry_errors)


_OF_EVERY_RECORD = ("schema_version", "model", "revision", "output_format")


def _others(plan: Plan, fingerprint: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Returns what may be, and is, another than in the plan when error rows are done again."""
    names = {**plan.fingerprint, **fingerprint}.keys() - _OF_EVERY_RECORD
    found = {name: fingerprint.get(name) for name in sorted(names)}
    return {name: value for name, value in found.items() if plan.fingerprint.get(name) != value}


def _of_plan(plan: Plan, names: Iterable[str]) -> dict[str, Scalar]:
    return {name: plan.fingerprint.get(name) for name in names}


def _expect_finished(
    folder: OutputFolder, receipts: Sequence[Receipt | None], others: Mapping[str, Scalar]
) -> None:
    """Raises JobError where rows that were never done would be done with other settings than the rest."""
    unfinished = receipts.count(None)
    if unfinished and others:
        raise JobError(
            f"{unfinished} of {len(receipts)} shards in {folder.place} are not done, and {', '.join(others)} "
            "differ from when the job was begun; end it with the same command first, then retry its errors"
        )


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
    long_prompts: str,
    output_format: str,
    retry_errors: bool | Collection[str],
    is_clear: bool,
) -> None:
    """Raises UsageError for arguments that cannot be, before anything is read."""
    if not patterns or not all([*patterns, output]):
        raise UsageError("give --input=GLOB and --output=DIR")
    plan_lib.check_settings(slots=slots, precision=precision, long_prompts=long_prompts)
    for name, value in {"shard_size": shard_size, "workers": workers}.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")
    if workers > 1 and runner in _LOCAL_RUNNERS:
        processes.check(workers)
    if not 0 <= max_error_rate <= 1:
        raise UsageError(f"max_error_rate is {max_error_rate}; expected a share between 0 and 1")
    if output_format not in plan_lib.OUTPUT_FORMATS:
        choices = ", ".join(plan_lib.OUTPUT_FORMATS)
        raise UsageError(f"output_format {output_format!r} is not one of {choices}")
    if isinstance(retry_errors, str) or not (isinstance(retry_errors, bool) or retry_errors):
        raise UsageError(
            f"retry_errors is {retry_errors!r}; expected True for every error row, or a list of codes"
        )
    if not is_clear:
        raise UsageError(
            "give --overwrite or --retry_errors, not both: one discards what the other keeps"
        )
    if runner in _CLUSTER_RUNNERS:
        from serve_batch import runners

        with runners.cluster(runner, beam_options, workers=workers, output=str(output)):
            pass  # nothing is started
    elif runner not in _LOCAL_RUNNERS:
        choices = ", ".join(("local", *_CLUSTER_RUNNERS))
        why = f"there is no runner {runner!r}; choose one of {choices}"
        raise UsageError(_REFUSED_RUNNERS.get(runner, why))
    elif beam_options:
        from serve_batch import runners

        runners.pipeline_options(beam_options)


def _settle(
    folder: OutputFolder,
    root: str,
    inputs: Sequence[Input],
    shard_size: int,
    fingerprint: Mapping[str, Scalar],
    *,
    overwrite: bool,
    codes: frozenset[str] | None,
) -> Plan:
    """Returns the plan to carry out: the one that is there, if it is this job's, else a new one, written down.

    Of an error row with one of `codes` the settings may be others, if there are codes.
    """
    plan = None if overwrite else folder.read_plan()
    if plan is None:
        plan = plan_lib.make(root, inputs, shard_size=shard_size, fingerprint=fingerprint)
        if overwrite:
            folder.clear()
        folder.write_plan(plan)
    same = _of_plan(plan, _others(plan, fingerprint)) if codes is not None else {}
    _expect_unchanged(folder, plan, root, inputs, {**fingerprint, **same})
    _expect_codes(folder, plan, codes or frozenset())
    folder.remove_leftovers()
    folder.settle(plan)
    return plan


def _expect_codes(folder: OutputFolder, plan: Plan, codes: frozenset[str]) -> None:
    """Raises JobError where a job that is complete has no error rows with one of `codes`.

    One that was killed as it did them again may have them behind it.
    """
    if not codes or not folder.is_complete():
        return
    there = sum((Counter(r.errors) for r in folder.receipts(plan) if r is not None), Counter())
    if missing := sorted(codes - there.keys()):
        told = ", ".join(f"{code} {count:,}" for code, count in sorted(there.items()))
        raise JobError(
            f"no error row in {folder.place} has the code {' or '.join(missing)}; "
            f"there are: {told or 'none'}"
        )


def _expect_unchanged(
    folder: OutputFolder,
    plan: Plan,
    root: str,
    inputs: Sequence[Input],
    fingerprint: Mapping[str, Scalar],
) -> None:
    if changes := plan_lib.changes(plan, root, inputs, fingerprint):
        raise JobError(
            f"{folder.place} belongs to another job: {'; '.join(changes[:4])}; "
            "choose another output folder, or start anew with --overwrite"
        )


def _generate(
    job: "Job", left: Sequence[int], runner: str, beam_options: Sequence[str], workers: int
) -> None:
    try:
        if workers > 1 and runner in _LOCAL_RUNNERS:
            processes.generate(job, left, workers)
        else:
            _generate_by_beam(job, runner, beam_options, workers)
    except Unreachable as error:
        raise Unreachable(f"{error}; {KEPT}") from error


def _generate_by_beam(job: "Job", runner: str, beam_options: Sequence[str], workers: int) -> None:
    from serve_batch import runners

    with runners.quiet():
        try:
            if runner in _LOCAL_RUNNERS:
                runners.run(job, *runners.local(beam_options))
            else:
                runners.run_on_cluster(job, runner, beam_options, workers=workers)
        except FlaxmillError:
            raise
        except Exception as error:
            what = runners.cause(error)
            if what == KeyboardInterrupt.__name__:  # Beam makes a RuntimeError of it
                raise KeyboardInterrupt from error
            raise JobError(what if runners.is_told(error) else f"{what}; {KEPT}") from error


def _publish(
    folder: OutputFolder, plan: Plan, receipts: Sequence[Receipt], max_error_rate: float
) -> dict[str, Any]:
    """Returns the manifest, written now that every part has been verified, and `_SUCCESS` after it."""
    manifest = _manifest(plan, receipts)
    folder.publish(manifest)
    rows, errors = manifest["rows"], manifest["errors"]
    if errors > max_error_rate * rows:
        raise JobError(
            f"{errors} of {rows} rows are errors ({errors / rows:.1%}), more than --max_error_rate="
            f"{max_error_rate}; most often {max(manifest['errors_by_code'].items(), key=_count)[0]}. "
            f"The parts are kept in {folder.place}, without _SUCCESS; see its errors folder"
        )
    folder.succeed()
    return manifest


def _count(item: tuple[str, int]) -> int:
    return item[1]


def _manifest(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Returns what the parts hold; the same for the same job, whoever did it and however often it was resumed."""
    by_code = sum((Counter(receipt.errors) for receipt in receipts), Counter())
    parts = [
        {
            "file": plan.part_name(shard),
            "rows": r.rows,
            "bytes": r.nbytes,
            "sha256": r.sha256,
            "retried_with": dict(r.retried_with),
        }
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
        "truncated": sum(receipt.truncated for receipt in receipts),
        "prompt_tokens": sum(receipt.prompt_tokens for receipt in receipts),
        "completion_tokens": sum(receipt.completion_tokens for receipt in receipts),
        "devices": sorted({receipt.device for receipt in receipts}),
        "parts": parts,
    }


def _duplicates(receipts: Sequence[Receipt]) -> int:
    """How many rows brought an id that a row before them had brought."""
    ids = np.concatenate(
        [np.frombuffer(bytes.fromhex(receipt.ids), np.uint64) for receipt in receipts]
        or [np.zeros(0, np.uint64)]
    )
    ids.sort()
    return int((ids[1:] == ids[:-1]).sum())


def _inspect(plan: Plan, sampling: "Sampling") -> dict[str, Any]:
    """Returns what a dry run can tell: the rows, and those that are none."""
    from serve_batch import shards

    by_code: Counter[str] = Counter()
    progress = tqdm.tqdm(total=plan.rows, unit=" prompts", unit_scale=True, disable=None)
    with progress, contextlib.closing(inputs_lib.idle):
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
            said, position = _said(path, position)
        except FileNotFoundError:
            continue
        for rows, more_tokens, more_errors in said:
            bar.update(rows)
            tokens, errors = tokens + more_tokens, errors + more_errors
        rate = tokens / (time.monotonic() - started)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s, {errors} errors")


def _said(path: Path, position: int) -> tuple[list[list[int]], int]:
    """Returns what the lines after `position` say that are whole, and where they end; torn ones say nothing."""
    with path.open("rb") as file:
        file.seek(position)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    numbers = [line.split() for line in whole.splitlines() if re.fullmatch(rb"\d+ \d+ \d+", line)]
    return [list(map(int, line)) for line in numbers], position + len(whole)
