"""The output folder of a job: who may write to it, how a file comes to be in it, and when it is complete.

    _plan.json                     what the job does, written first
    part-00000-of-00042.jsonl      one record per input row, in input order
    errors/part-00000-of-...       the error records alone, where a part has any
    _receipts/00000.json           written after its part: this shard is done
    manifest.json, _SUCCESS        written last, once every row is accounted for

A name that exists is whole (`serve_batch.stores`). A receipt is the commit: killed before it, a shard is done again and
comes out the same; killed after it, it is skipped.

A part that takes the place of another is announced by a receipt that holds the old one's: new receipt, new part, new
errors, then the receipt alone. Killed in between, whichever of the two parts is there has its receipt, and `settle`
does what is left.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from serve_batch import parts, stores
from serve_batch.errors import JobError, Unreachable
from serve_batch.plan import Plan, Shard
from serve_batch.stores import Store

_LOCK, _PLAN, _SUCCESS, _MANIFEST = "_lock", "_plan.json", "_SUCCESS", "manifest.json"
_RECEIPTS, _ERRORS = "_receipts", "errors"
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of one shard; `ids` holds 8 bytes of hash, in hex, for each id that the input brought."""

    plan: str
    """The digest of the plan whose shard it is."""
    shard: int
    rows: int
    errors: Mapping[str, int]
    truncated: int
    prompt_tokens: int
    completion_tokens: int
    nbytes: int
    sha256: str
    device: str
    ids: str
    retried_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What of the job's fingerprint was another when error rows were done again."""
    previous: "Receipt | None" = None
    """Of the part that is there until this one's takes its place."""

    def selected(self, codes: frozenset[str] | None) -> int:
        """Returns how many error rows have one of `codes`: all of them if it is empty, none if it is None."""
        if codes is None:
            return 0
        return sum(count for code, count in self.errors.items() if not codes or code in codes)

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Receipt":
        """Raises ValueError where `content` is no receipt."""
        try:
            fields = json.loads(content)
            previous = fields.pop("previous")
            old = None if previous is None else cls(**previous)
            receipt = cls(**fields, previous=old)
            is_one = receipt._is_one() and (old is None or (old._is_one() and old.previous is None))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no receipt: {error!r}") from error
        if not is_one:
            raise ValueError("it is no receipt")
        return receipt

    def _is_one(self) -> bool:
        """Whether its fields are of their types, and agree; what JSON gave may be anything."""
        counts = [self.shard, self.rows, self.truncated, self.nbytes]
        counts += [self.prompt_tokens, self.completion_tokens, *self.errors.values()]
        texts = (self.plan, self.sha256, self.device, self.ids)
        if not all(type(count) is int and count >= 0 for count in counts):
            return False
        if not (
            all(isinstance(text, str) for text in texts) and isinstance(self.retried_with, dict)
        ):
            return False
        ids = len(bytes.fromhex(self.ids))
        return ids % 8 == 0 and ids <= 8 * self.rows and sum(self.errors.values()) <= self.rows


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    place: Path | str
    """A path, or a URL."""

    @functools.cached_property
    def store(self) -> Store:
        return stores.at(self.place)

    @property
    def path(self) -> Path:
        """Of a folder on this machine."""
        assert not stores.is_remote(self.place)
        return Path(self.place)

    @property
    def progress_file(self) -> Path:
        """Workers append a line per chunk of rows here while somebody watches; gone when the job ends."""
        if not stores.is_remote(self.place):
            return self.path / "_progress"
        digest = hashlib.sha256(str(self.place).encode()).hexdigest()
        return Path(tempfile.gettempdir(), f"flaxmill-{os.getuid()}-{digest[:16]}")

    def check_ours(self) -> None:
        """Makes sure that writing here, or clearing, touches nothing that a batch job did not write.

        Raises:
          JobError: the folder holds something, and no plan says that it is a job's.
        """
        if not stores.is_remote(self.place) and self.path.exists() and not self.path.is_dir():
            raise JobError(f"output {self.place} is not a folder")
        names = sorted(self.store.sizes())
        if not stores.is_remote(self.place) and self.path.exists():
            names = sorted(path.name for path in self.path.iterdir())  # and folders
        # What a job leaves that is killed as it writes its plan.
        held = [name for name in names if name != _LOCK and not name.startswith(f"{_PLAN}.tmp.")]
        if held and _PLAN not in held:
            raise JobError(
                f"output folder {self.place} holds {held[0]!r} but no {_PLAN}: "
                "it is not a batch job's; choose a new or empty folder"
            )

    def read_plan(self) -> Plan | None:
        """Returns the plan of the job that this folder belongs to, None if it belongs to none yet.

        Raises:
          JobError: the plan is another version's.
        """
        try:
            content = self.store.read(_PLAN)
        except FileNotFoundError:
            return None
        try:
            return Plan.from_json(content)
        except ValueError as error:
            raise JobError(
                f"{self.place}/{_PLAN} is not a plan that this version can read ({error}); "
                "choose another output folder, or start anew with --overwrite"
            ) from error

    def write_plan(self, plan: Plan) -> None:
        self.store.write(_PLAN, plan.to_json())

    def expect_plan(self, plan: Plan) -> None:
        """Makes sure, before something is written, that the folder is still of the job that `plan` is of.

        Raises:
          JobError: another job has taken it over.
        """
        try:
            content = self.store.read(_PLAN)
        except FileNotFoundError:
            content = b""
        # Parsed only where it differs: a large job's plan is read once a shard.
        if hashlib.sha256(content).hexdigest() == plan.digest:
            return
        now = self.read_plan()
        if now is None or now.digest != plan.digest:
            raise JobError(
                f"{self.place} has become another job's; nothing more of this one is written there"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder, which is made if need be, for this process.

        Raises:
          JobError: another job holds it, or the folder cannot be written.
        """
        with self.store.holding(_LOCK):
            yield

    def clear(self) -> None:
        """Removes what an earlier job wrote here, `_SUCCESS` first; nothing else is touched.

        The plan stays until another takes its name, so the folder is a job's at every moment.
        """
        for name in (_SUCCESS, _MANIFEST):
            self.store.remove(name)
        is_part = re.compile(r"(errors/)?part-[^/]*-of-[^/]*\.(jsonl|parquet)")
        for folder in ("", _ERRORS):
            for name in filter(is_part.fullmatch, self.store.sizes(folder)):
                self.store.remove(name)
        for name in self.store.sizes(_RECEIPTS):
            if name.endswith(".json"):
                self.store.remove(name)

    def remove_leftovers(self) -> None:
        """Removes what a killed job left half-done; a worker that outlived it loses its work, not ours."""
        self.store.remove(_SUCCESS)
        self.progress_file.unlink(missing_ok=True)
        for folder in ("", _ERRORS, _RECEIPTS):
            for name in self.store.sizes(folder):
                if ".tmp." in name:
                    self.store.remove(name)

    def receipts(self, plan: Plan) -> list[Receipt | None]:
        """Returns the receipt of each shard that is done: its part is there, in the size that the receipt says."""
        sizes = self.store.sizes()
        found: list[Receipt | None] = [None] * len(plan.shards)
        for shard, content in self._receipts(plan):
            size = sizes.get(plan.part_name(shard))
            found[shard.number] = self._valid(content, size, plan, shard)
        return found

    def _receipts(self, plan: Plan) -> Iterator[tuple[Shard, bytes]]:
        """Yields the receipts that there are, whatever they say."""
        there = self.store.sizes(_RECEIPTS).keys()
        shards = [shard for shard in plan.shards if _receipt_name(shard) in there]
        contents = self.store.read_each(map(_receipt_name, shards))
        return zip(shards, contents, strict=True)

    def receipt(self, plan: Plan, shard: Shard) -> Receipt | None:
        """Returns the receipt of a shard that is done.

        Raises:
          JobError: whether it is done cannot be read.
        """
        try:
            content = self.store.read(_receipt_name(shard))
            size = self.store.stat(plan.part_name(shard)).size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unreachable(
                f"cannot read {plan.part_name(shard)} of {self.place} or its receipt: "
                f"{error.strerror or error}"
            ) from error
        return self._valid(content, size, plan, shard)

    def _valid(self, content: bytes, size: int | None, plan: Plan, shard: Shard) -> Receipt | None:
        """Returns what a receipt says of the part that is there, if it says anything of it."""
        try:
            receipt = Receipt.from_json(content)
        except ValueError:
            return None
        expected = (plan.digest, shard.number, shard.rows, size)
        candidates = [
            c
            for c in (receipt, receipt.previous)
            if c is not None and (c.plan, c.shard, c.rows, c.nbytes) == expected
        ]
        if receipt.previous is None or not candidates:
            return candidates[0] if candidates else None
        found = self._sha256(plan.part_name(shard))
        return next((c for c in candidates if c.sha256 == found), None)

    def write_receipt(self, shard: Shard, receipt: Receipt) -> None:
        self.store.write(_receipt_name(shard), receipt.to_json())

    def write_errors(self, plan: Plan, shard: Shard, failed: Sequence[Any]) -> None:
        """Writes the error records of a part, as `parts.Writer.write` returned them."""
        name = f"{_ERRORS}/{plan.part_name(shard)}"
        if not failed:
            self.store.remove(name)
            return
        with self.store.writing(name) as file, parts.Writer(file, plan.output_format) as errors:
            for record in failed:
                errors.keep(record)

    def expect_whole(self, plan: Plan, shard: Shard, receipt: Receipt) -> None:
        """Makes sure that a part is what its receipt says, before records of it are kept in another.

        Raises:
          JobError: it was changed.
        """
        if self._sha256(plan.part_name(shard)) != receipt.sha256:
            raise JobError(
                f"{self.place}/{plan.part_name(shard)} was changed after it was written; "
                "run the job without --retry_errors first, which does that shard again"
            )

    def read_part(self, plan: Plan, shard: Shard) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields a part's records, each as it is kept and as it reads.

        Raises:
          JobError: it cannot be read, or holds no records.
        """
        name = plan.part_name(shard)
        with self._open(name) as file:
            try:
                yield from parts.read(file, plan.output_format)
            except JobError:
                raise
            except Exception as error:  # whatever JSON, Arrow and Parquet raise
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise JobError(
                    f"{self.place}/{name} holds what is no record ({what}); "
                    "remove it, and run the same command again to redo it"
                ) from error

    def settle(self, plan: Plan) -> None:
        """Ends what was being replaced when a job was killed, or takes it back."""
        for shard, content in self._receipts(plan):
            receipt = self.receipt(plan, shard) if b'"previous": {' in content else None
            if receipt is None:
                continue
            if receipt.previous is not None:
                self.commit_replacement(plan, shard, receipt)
            else:
                self.write_receipt(shard, receipt)

    def commit_replacement(self, plan: Plan, shard: Shard, receipt: Receipt) -> None:
        """Makes errors and receipt those of the part that is there."""
        rows = self.read_part(plan, shard)
        failed = [kept for kept, record in rows if record["status"] == "error"]
        self.write_errors(plan, shard, failed)
        self.write_receipt(shard, dataclasses.replace(receipt, previous=None))

    def publish(self, manifest: Mapping[str, Any]) -> None:
        self._write_json(_MANIFEST, manifest)

    def is_complete(self) -> bool:
        return _SUCCESS in self.store.sizes()

    def succeed(self) -> None:
        self._write_json(_SUCCESS, {})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.store.write(name, json.dumps(content, indent=2).encode() + b"\n")

    def verified(self, plan: Plan) -> list[Receipt]:
        """Returns the receipts of all shards, once every part has been found to be what was written.

        On this machine each part is read again; an object store vouches for what it took, so there sizes are compared.

        Raises:
          JobError: a part is missing or was changed. The next run does those shards again.
        """
        is_remote = stores.is_remote(self.place)
        found = self.receipts(plan)
        broken = [
            shard
            for shard, receipt in zip(plan.shards, found, strict=True)
            if receipt is None
            or not (is_remote or self._sha256(plan.part_name(shard)) == receipt.sha256)
        ]
        for shard in broken:
            self.store.remove(_receipt_name(shard))
        if broken:
            raise JobError(
                f"{len(broken)} of {len(plan.shards)} parts are missing or were changed after they were written, "
                f"first {plan.part_name(broken[0])}; run the same command again to redo them"
            )
        return [receipt for receipt in found if receipt is not None]

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._open(name) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _open(self, name: str) -> BinaryIO:
        with stores.reached(f"{self.place}/{name}"):
            return self.store.open(name)


def _receipt_name(shard: Shard) -> str:
    return f"{_RECEIPTS}/{shard.number:05d}.json"
