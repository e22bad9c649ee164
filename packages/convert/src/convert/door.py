"""What the command lines of this package share: flags in, an exit code out.

0 done (and for --help), 1 the data or the job failed, told in one line, 2 wrong usage.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from convert.errors import ConvertError


class Usage(Exception):
    """Flags that do not make sense together."""


def run(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main` and exits."""
    app.run(lambda _: _exit(main), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except SystemExit as help_shown:
        raise SystemExit(0) from help_shown  # absl ends --help with 1
    except flags.Error as error:
        _fail(str(error), 2)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = (
            logging.WARNING
        )  # absl's own default lets libraries report every request
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; every option is a --flag=value", 2)
    return rest


def _exit(main: Callable[[], None]) -> None:
    try:
        main()
    except Usage as error:
        _fail(str(error), 2)
    except ConvertError as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> NoReturn:
    hint = "; --help lists the flags" if code == 2 else ""
    sys.stderr.write(f"error: {' '.join(message.split())}{hint}\n")
    sys.exit(code)
