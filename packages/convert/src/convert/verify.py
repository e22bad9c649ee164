"""Checks that a model folder is what its manifest says and, with --against, what its source holds.

    python -m convert.verify --model=DIR [--against=SOURCE] [--logits]

--logits needs torch and transformers. Exit code 1 on any difference.
"""

if __name__ != "__main__":
    raise ImportError("convert.verify is a function; this file is its command line")

import sys

from absl import flags

from convert import sources
from core import door

_MODEL = flags.DEFINE_string("model", None, "The model folder to check.")
_AGAINST = flags.DEFINE_string(
    "against", None, "A checkpoint, in any format that can be converted, to derive all from again."
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "auto",
    ["auto", *sources.READERS],
    "The format of --against, which its content tells.",
)
_LOGITS = flags.DEFINE_bool(
    "logits", False, "Compares the logits with torch's, and names the first layer that differs."
)


def main() -> None:
    if not _MODEL.value:
        raise door.Usage("give --model=DIR")
    if _FORMAT.value != "auto" and _AGAINST.value is None:
        raise door.Usage("--format is that of --against=SOURCE")
    from convert import verifier

    report = verifier.verify(
        _MODEL.value, against=_AGAINST.value, format=_FORMAT.value, logits=_LOGITS.value
    )
    for note in report.notes:
        sys.stderr.write(f"note: {note}\n")
    if report.problems and report.logits is not None:
        print(report.logits)
    report.check()
    print(report)


door.run(main)
