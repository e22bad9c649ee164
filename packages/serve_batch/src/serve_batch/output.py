"""The output folder of a job: who may write to it, how a file comes to be in it, and when it is complete.

    _plan.json                     what the job does, written first
    part-00000-of-00042.jsonl      one record per input row, in input order
    errors/part-00000-of-...       the error records alone, where a part has any
    _receipts/00000.json           written after its part: this shard is done
    manifest.json, _SUCCESS        written last, once every row is accounted for

A file is written under a temporary name, synced and renamed, so a name that exists is whole. A receipt is the commit:
killed before it, a shard is done again and comes out the same; killed after it, it is skipped.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from serve_batch.plan import JobError, Plan, Shard

_LOCK = "_lock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of one shard; `ids` holds 8 bytes of hash, in hex, for each id that the input brought."""

    shard: int
    rows: int
    errors: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    bytes: int
    sha256: str
    device: str
    ids: str


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    path: Path

    @property
    def plan_file(self) -> Path:
        return self.path / "_plan.json"

    @property
    def progress_file(self) -> Path:
        """Workers append a line per chunk of rows here while somebody watches; gone when the job ends."""
        return self.path / "_progress"

    def receipt_file(self, shard: Shard) -> Path:
        return self.path / "_receipts" / f"{shard.number:05d}.json"

    def part_file(self, plan: Plan, shard: Shard) -> Path:
        return self.path / plan.part_name(shard)

    def errors_file(self, plan: Plan, shard: Shard) -> Path:
        return self.path / "errors" / plan.part_name(shard)

    def check_ours(self) -> None:
        """Makes sure that writing here, or clearing, touches nothing that a batch job did not write.

        Raises:
          JobError: the folder holds something, and no plan says that it is a job's.
        """
        if self.plan_file.exists() or not self.path.exists():
            return
        if not self.path.is_dir():
            raise JobError(f"output {self.path} is not a folder")
        # What a job leaves that is killed as it writes its plan.
        unfinished_plan = f"{self.plan_file.name}.tmp."
        names = sorted(path.name for path in self.path.iterdir())
        held = [name for name in names if name != _LOCK and not name.startswith(unfinished_plan)]
        if held:
            raise JobError(
                f"output folder {self.path} holds {held[0]!r} but no {self.plan_file.name}: "
                "it is not a batch job's; choose a new or empty folder"
            )

    def read_plan(self) -> Plan | None:
        """Returns the plan of the job that this folder belongs to, None if it belongs to none yet.

        Raises:
          JobError: the plan is another version's.
        """
        if not self.plan_file.exists():
            return None
        try:
            return Plan.from_json(self.plan_file.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{self.plan_file} is not a plan that this version can read ({error!r}); "
                "choose another output folder, or start anew with --overwrite"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder, which is made if need be, for this process; the system lets go when the process dies.

        Raises:
          JobError: another job holds it, or the folder cannot be written.
        """
        path = self.path / _LOCK
        descriptor = self._open_lock(path)
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def _open_lock(self, path: Path) -> int:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise JobError(f"cannot write to {self.path}: {error.strerror}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                os.close(descriptor)
                raise JobError(
                    f"another job ({holder}) is writing to {self.path}; "
                    "wait for it, or choose another output"
                ) from None
            # A job that ended in between has removed the file that was opened.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)

    def clear(self) -> None:
        """Removes what an earlier job wrote here, `_SUCCESS` first; nothing else is touched.

        The plan stays until another takes its name, so the folder is a job's at every moment.
        """
        parts = ["part-*-of-*.jsonl", "errors/part-*-of-*.jsonl"]
        for pattern in ["_SUCCESS", "manifest.json", *parts, "_receipts/*.json"]:
            for path in self.path.glob(pattern):
                path.unlink()

    def remove_leftovers(self) -> None:
        """Removes what a killed job left half-done; a worker that outlived it loses its work, not ours."""
        leftovers = ["_SUCCESS", "_progress", "*.tmp.*", "errors/*.tmp.*", "_receipts/*.tmp.*"]
        for pattern in leftovers:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def receipt(self, plan: Plan, shard: Shard) -> Receipt | None:
        """Returns the receipt of a shard that is done: its part is there, in the size that the receipt says."""
        try:
            receipt = Receipt(**json.loads(self.receipt_file(shard).read_bytes()))
            size = self.part_file(plan, shard).stat().st_size
        except (OSError, ValueError, TypeError):
            return None
        return receipt if receipt.bytes == size and receipt.rows == shard.rows else None

    def write_receipt(self, shard: Shard, receipt: Receipt) -> None:
        with committing(self.receipt_file(shard)) as file:
            file.write(json.dumps(dataclasses.asdict(receipt)).encode() + b"\n")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with committing(self.path / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


def verified(output: OutputFolder, plan: Plan) -> list[Receipt]:
    """Returns the receipts of all shards, after reading every part again: it is there, and it is what was written.

    Raises:
      JobError: a part is missing or was changed. The next run does those shards again.
    """
    from core import checkpoint  # imports jax

    receipts = []
    broken = []
    for shard in plan.shards:
        receipt = output.receipt(plan, shard)
        part = output.part_file(plan, shard)
        if receipt is None or checkpoint.sha256(part) != receipt.sha256:
            output.receipt_file(shard).unlink(missing_ok=True)
            broken.append(plan.part_name(shard))
        else:
            receipts.append(receipt)
    if broken:
        raise JobError(
            f"{len(broken)} of {len(plan.shards)} parts are missing or were changed after they were written, "
            f"first {broken[0]}; run the same command again to redo them"
        )
    return receipts


@contextlib.contextmanager
def committing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that appears as `path`, whole and synced, when the block ends, and not at all if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself, so that it survives a power cut
    finally:
        os.close(descriptor)
