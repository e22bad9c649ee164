"""The manners of every command line: flags in, an exit code out.

0 done (and for --help); 1 the data or the job failed; 2 wrong usage. A failure is one line on stderr that says what was
found, what was expected and what to do next; a traceback means a bug of ours.
"""

import io
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from core.errors import FlaxmillError


class Usage(Exception):
    """Flags that do not make sense together."""


def run(
    main: Callable[..., None],
    *,
    passes_on: bool = False,
    bad_flags: tuple[type[Exception], ...] = (),
) -> NoReturn:
    """Parses the flags, runs `main` and exits.

    Args:
      main: what to do; a FlaxmillError that it raises is a failure.
      passes_on: `main` takes a list of the arguments that follow a bare `--`.
      bad_flags: what parsing a flag may raise besides absl's own errors: exit code 2.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)[1:]
        except SystemExit as help_shown:
            raise SystemExit(0) from help_shown  # absl ends --help with 1
        except (flags.Error, *bad_flags) as error:
            _fail(f"{error}; --help lists the flags", 2)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = absl_logging.WARNING  # libraries narrate at INFO
        passed_on = list(argv[argv.index("--") + 1 :]) if passes_on and "--" in argv else []
        if rest != passed_on:
            _fail(f"unexpected argument {rest[0]!r}; every option is a --flag=value", 2)
        return passed_on

    interrupts: list[int] = []

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        """Raises KeyboardInterrupt, but not inside JAX's garbage-collection callback, where Python would drop it."""
        interrupts.append(number)
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            raise KeyboardInterrupt

    def guarded(passed_on: list[str]) -> None:
        signal.signal(signal.SIGINT, interrupt)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # a path is bytes, not always text
        try:
            main(passed_on) if passes_on else main()
            sys.stdout.flush()
        except Usage as error:
            _fail(f"{error}; --help lists the flags", 2)
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (FlaxmillError, OSError) as error:  # OSError: no permission, a full disk
            _fail(str(error), 1)
        except KeyboardInterrupt as error:  # its message, if it has one, tells how to go on
            _fail(str(error) or "interrupted", 128 + (interrupts or [signal.SIGINT])[-1])
        except Exception:
            if interrupts:  # an import that is interrupted fails in ways of its own
                _fail("interrupted", 130)
            raise

    app.run(guarded, flags_parser=parse)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(code)
