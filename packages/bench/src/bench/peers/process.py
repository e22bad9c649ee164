"""The driver's side of the conversation: a contestant's process, and the reason when it fails.

Whatever a contestant does (crash, hang, answer nonsense) becomes a `WorkerError` whose text is fit for the report.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench

DEATH_S = 10.0  # from the end of its answers to the end of a process
BENCH = Path(bench.__file__).parent

# Workers run this very copy of `bench`, in whichever Python, without a path that would show them our other packages.
_BOOTSTRAP = """
import importlib.util, sys
folder, module, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("bench", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["bench"])
importlib.import_module(module).main(*arguments)
"""


def command(python: Path, module: str, *arguments: str) -> tuple[str, ...]:
    """Returns what runs a module of this very `bench` in `python`."""
    return (str(python), "-P", "-c", _BOOTSTRAP, str(BENCH), module, *arguments)


class WorkerError(Exception):
    """A contestant could not answer; the text says why.

    `lost` tells that its process is gone, `unable` that nothing broke: it has not got what was asked for; `late` that
    it was stopped because its time was over.
    """

    def __init__(
        self, reason: str, *, lost: bool, unable: bool = False, late: bool = False
    ) -> None:
        super().__init__(reason)
        self.lost, self.unable, self.late = lost, unable, late


class Worker:
    """A contestant's process. Use it as a context manager, so that no process outlives the run.

    Raises:
      WorkerError: the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self._log = log
        self._closed = False
        with log.open("ab") as stderr:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=dict(env),
                    cwd=cwd,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # so that a hanging compiler dies with the worker that started it
                )
            except OSError as error:
                raise WorkerError(f"cannot be started: {error}", lost=True) from error
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Sends one request and returns the answer.

        Raises:
          WorkerError: the worker answered with an error (and lives on), or is lost.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._lost(self._death()) from None
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            reason = f"no answer to {do!r} within {timeout_s:g} s; stopped"
            raise self._lost(reason, late=True) from None
        if line is None:
            raise self._lost(self._death())
        return self._understood(line)

    def _understood(self, line: str) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._lost(f"wrote {line.strip()[:80]!r} to stdout, which is for answers only")
        if "error" in answer:
            raise WorkerError(str(answer["error"]), lost=False)
        if "unable" in answer:
            raise WorkerError(str(answer["unable"]), lost=False, unable=True)
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _lost(self, reason: str, *, late: bool = False) -> WorkerError:
        self.close()
        return WorkerError(reason, lost=True, late=late)

    def _death(self) -> str:
        """Says how the process ended, with the last thing it wrote to stderr."""
        try:
            code = self._process.wait(timeout=DEATH_S)
        except subprocess.TimeoutExpired:
            return "closed its stdout without an answer; stopped"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last[:160]}" if last else how

    def close(self) -> None:
        """Ends the process and everything it started; harmless when done before."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=DEATH_S)
        streams = [self._process.stdin]
        if (
            not self._reader.is_alive()
        ):  # a descendant in a session of its own may hold the other end
            streams.append(self._process.stdout)
        for stream in streams:
            assert stream is not None
            with contextlib.suppress(OSError):  # unsent bytes for a process that is gone
                stream.close()
