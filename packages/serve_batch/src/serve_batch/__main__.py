"""python -m serve_batch: prompt files to completions.

    python -m serve_batch --model=models/gpt2 --input='prompts/*.jsonl' --output=completions --temperature=0

Give the same command again to resume a job that was interrupted. Options of Beam's follow after `--`.
"""

import signal
import sys
from typing import Any

from absl import flags, logging

from core import door, sampling_flags
from core.config import PRECISIONS

_MODEL = flags.DEFINE_string("model", None, "Model folder.", required=True)
_INPUT = flags.DEFINE_multi_string(
    "input",
    None,
    "File, glob or folder: .jsonl or .txt, also compressed, or .parquet. Repeatable.",
    required=True,
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the parts.", required=True)

# What a row says for itself goes before these.
flags.adopt_module_key_flags(sampling_flags)

_SLOTS = flags.DEFINE_integer("slots", 16, "Rows that decode together.")
_PRECISION = flags.DEFINE_enum(
    "precision", None, PRECISIONS, "What to compute in; by default what the model is stored in."
)
_LOGPROBS = flags.DEFINE_integer(
    "logprobs",
    None,
    "Log-probabilities of the tokens, and of so many likeliest ones; a row may ask for fewer.",
    lower_bound=0,
)
_LONG_PROMPTS: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "long_prompts",
    "error",
    ["error", "truncate_left", "truncate_right"],
    "What to do with prompts that do not fit; see docs/batch.md.",
)
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 1024, "Rows in a part, and lost by a crash.")
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Processes, each with an accelerator if there are any."
)
_RUNNER = flags.DEFINE_string("runner", "local", "local, or a runner of Beam's; see docs/batch.md.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Checks every row; generates and writes nothing.")
_MAX_ERROR_RATE = flags.DEFINE_float(
    "max_error_rate", 1.0, "Share of error rows that still passes."
)
_OUTPUT_FORMAT: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "output_format", "jsonl", ["jsonl", "parquet"], "Of the parts."
)
_RETRY_ERRORS = flags.DEFINE_boolean(
    "retry_errors", False, "Does the error rows of finished shards again, and keeps all others."
)
_RETRY_CODES = flags.DEFINE_list(
    "retry_codes", [], "With --retry_errors: those with these codes only, as a,b."
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Starts anew over another job's output.")


def main(beam_options: list[str]) -> None:
    import serve_batch

    # What was started for the job ends with it.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    if _RETRY_CODES.value and not _RETRY_ERRORS.value:
        raise door.Usage("--retry_codes needs --retry_errors")
    try:
        result = serve_batch.run(
            model=_MODEL.value,
            input=_INPUT.value,
            output=_OUTPUT.value,
            sampling=sampling_flags.sampling(logprobs=_LOGPROBS.value),
            slots=_SLOTS.value,
            precision=_PRECISION.value,
            shard_size=_SHARD_SIZE.value,
            workers=_WORKERS.value,
            runner=_RUNNER.value,
            beam_options=beam_options,
            dry_run=_DRY_RUN.value,
            max_error_rate=_MAX_ERROR_RATE.value,
            overwrite=_OVERWRITE.value,
            long_prompts=_LONG_PROMPTS.value,
            output_format=_OUTPUT_FORMAT.value,
            retry_errors=_RETRY_ERRORS.value and (_RETRY_CODES.value or True),
        )
    except serve_batch.UsageError as error:
        raise door.Usage(str(error)) from error
    except serve_batch.JobError:
        logging.debug("the job failed", exc_info=True)  # shown with --verbosity=1
        raise
    if _RUNNER.value == "DirectRunner":
        print(_DIRECT_RUNNER, file=sys.stderr)
    print(_summary(result), file=sys.stderr)
    if len(devices := result.get("devices", [])) > 1:
        print(f"note: {_MIXED} ({', '.join(devices)})", file=sys.stderr)


_DIRECT_RUNNER = "note: --runner=DirectRunner ran as --runner=local: Beam's own would first try to download Prism"


_MIXED = "parts come from different kinds of device, which differ in the last bits"


def _summary(result: dict) -> str:
    """Returns the last line of a run."""
    errors = ", ".join(f"{code} {count:,}" for code, count in result["errors_by_code"].items())
    rows = f"{result['rows']:,} rows, {result['errors']:,} errors" + (
        f" ({errors})" if errors else ""
    )
    if _DRY_RUN.value:
        return f"dry run: {rows}; {len(result['inputs']):,} files, {result['shards']:,} shards"
    seconds, shards = result["elapsed_s"], result["shards_done"]
    if not shards:
        return f"{_OUTPUT.value}: {rows}; it was complete before"
    done = f"{shards:,} of {len(result['parts']):,} shards in {seconds:,.1f} s"
    return (
        f"{_OUTPUT.value}: {rows}; {done}, {result['rows_done'] / seconds:,.1f} prompts/s, "
        f"{result['tokens_done'] / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    door.run(main, passes_on=True)
