"""Checks that a model folder is what its manifest says and, with --against, what its source holds.

python -m convert.verify --model=DIR [--against=SOURCE]
"""

if __name__ != "__main__":
    raise ImportError("convert.verify is a function; this file is its command line")

from absl import flags

import convert
from core import door

_MODEL = flags.DEFINE_string("model", None, "The model folder to check.")
_AGAINST = flags.DEFINE_string("against", None, "A checkpoint to derive every tensor from again.")


def main() -> None:
    if not _MODEL.value:
        raise door.Usage("give --model=DIR")
    print(convert.verify(_MODEL.value, against=_AGAINST.value))


door.run(main)
