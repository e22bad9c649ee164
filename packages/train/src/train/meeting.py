"""Where the processes of a run come together before jax does: it ends a program that waits in vain with a trace in C++.

Process 0 listens at the coordinator's port, each of the others says its number there and waits for the word to go on;
then the port is jax's.
"""

import contextlib
import socket
import time

from train.config import TrainConfig
from train.preflight import TrainError

_HELLO, _GO = b"flaxmill process ", b"go\n"
_PATIENCE_S = 5.0  # with one who has connected and says nothing


def gather(config: TrainConfig) -> None:
    """Returns when every process of the run is there.

    Raises:
      TrainError: some have not come within dist_timeout_s; says which.
    """
    end = time.monotonic() + config.dist_timeout_s
    if config.process:
        _report(config, end)
    else:
        _await_others(config, end)


def _await_others(config: TrainConfig, end: float) -> None:
    missing = set(range(1, config.processes))
    port = int(config.coordinator.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise _failed(config, f"cannot listen there ({error.strerror})") from error
        come: list[socket.socket] = []
        while missing:
            left = end - time.monotonic()
            if left <= 0:
                raise _failed(config, f"{_listed(missing)} did not come")
            server.settimeout(left)
            with contextlib.suppress(OSError):
                caller = stack.enter_context(server.accept()[0])
                number = _number(caller)
                if number in missing:
                    missing.remove(number)
                    come.append(caller)
        for caller in come:
            with contextlib.suppress(OSError):  # gone again: jax will find out
                caller.sendall(_GO)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _number(caller: socket.socket) -> int | None:
    """What the caller says its number is; None for a stranger."""
    caller.settimeout(_PATIENCE_S)
    with caller.makefile("rb") as said:
        line = said.readline(len(_HELLO) + 10)
    digits = line.removeprefix(_HELLO).strip()
    return int(digits) if line.startswith(_HELLO) and digits.isdigit() else None


def _report(config: TrainConfig, end: float) -> None:
    host, _, port = config.coordinator.rpartition(":")
    why = "the others did not all come"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), min(left, 10)
            ) as process_0:
                process_0.sendall(_HELLO + b"%d\n" % config.process)
                process_0.settimeout(left)
                if process_0.recv(len(_GO)):
                    return
        except (OSError, UnicodeError) as error:
            why = f"{error}. Process 0 has to listen there, where the others reach it"
        time.sleep(min(0.2, left))
    raise _failed(config, why)


def _listed(numbers: set[int]) -> str:
    ordered = sorted(numbers)
    named = ", ".join(map(str, ordered[:8])) + (" and more" if len(ordered) > 8 else "")
    return f"process {named}" if len(ordered) == 1 else f"{len(ordered)} processes ({named})"


def _failed(config: TrainConfig, why: str) -> TrainError:
    return TrainError(
        f"process {config.process} of {config.processes}: no meeting at coordinator="
        f"{config.coordinator} within dist_timeout_s={config.dist_timeout_s}: {why}"
    )
