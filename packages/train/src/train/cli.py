"""How the commands of this package end: 0 done, 1 a failure of the data or the job, 2 wrong usage.

Either failure is one line on stderr that says what was found, what was expected and what to do next.
"""

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging


class UsageError(Exception):
    """The command line asks for something that cannot be."""


class Failure(Exception):
    """The data or the job failed, in a way that the message explains."""


def start(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main` under absl and exits with its code, or with that of the error it raises."""

    def guarded(argv: list[str]) -> int | None:
        try:
            if len(argv) > 1:
                raise UsageError(f"unexpected argument {argv[1]!r}; flags are written --flag=value")
            return main(argv)
        except UsageError as error:
            _fail(str(error), code=2)
        except Failure as error:
            _fail(str(error), code=1)

    app.run(guarded, flags_parser=_parse)
    raise AssertionError("app.run exits")


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except AttributeError as error:  # how ml_collections says that a config file has no such key
        _fail(f"unknown config key {_innermost(error)}", code=2)
    except (flags.Error, OSError, TypeError, ValueError) as error:
        _fail(str(error), code=2)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # Orbax and jax tell a lot at INFO
    return rest


def _innermost(error: BaseException) -> BaseException | str:
    """ml_collections wraps one exception in another; the first has the words."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return error.args[0] if error.args else error


def _fail(message: str, *, code: int) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(code)
