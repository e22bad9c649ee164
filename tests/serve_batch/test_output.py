import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve_batch import inputs
from serve_batch import plan as plan_lib
from serve_batch.errors import JobError
from serve_batch.output import OutputFolder, Receipt
from serve_batch.plan import Plan
from serve_batch.stores import committing


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "part.jsonl"
    with committing(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    failing = committing(path)
    failing.__enter__().write(b"half")
    assert not failing.__exit__(OSError, OSError("disk full"), None)
    assert path.read_bytes() == b"all of it"
    assert [p.name for p in path.parent.iterdir()] == ["part.jsonl"]


def test_a_folder_has_one_job_at_a_time(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    with (
        folder.lock(),
        pytest.raises(JobError, match=r"another job \(process \d+ on .*\) is writing"),
    ):
        folder.lock().__enter__()
    with folder.lock():
        pass
    assert list(folder.path.iterdir()) == []


def test_a_folder_that_is_not_a_jobs_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(JobError, match=r"holds 'thesis.tex' but no _plan.json"):
        OutputFolder(tmp_path).check_ours()
    with pytest.raises(JobError, match="is not a folder"):
        OutputFolder(tmp_path / "thesis.tex").check_ours()


def test_clearing_leaves_the_plan_and_what_no_job_wrote(tmp_path):
    folder = OutputFolder(tmp_path)
    for name in ["_plan.json", "_SUCCESS", "part-00000-of-00001.jsonl", "manifest.json", "notes"]:
        (tmp_path / name).write_text("x")
    folder.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_plan.json", "notes"]


def test_a_job_killed_before_it_had_a_plan_can_be_started_again(tmp_path):
    folder = OutputFolder(tmp_path)
    with folder.lock(), committing(tmp_path / "_plan.json"):
        shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    killed = OutputFolder(tmp_path.with_name("killed"))
    assert len(list(killed.path.iterdir())) == 2
    killed.check_ours()


def test_a_plan_of_another_version_is_refused(tmp_path):
    (tmp_path / "_plan.json").write_text('{"version": 2}')
    with pytest.raises(JobError, match="not a plan that this version can read"):
        OutputFolder(tmp_path).read_plan()


PART = b"one\ntwo\n"


@pytest.fixture
def planned(tmp_path) -> tuple[OutputFolder, Plan]:
    """A folder with a plan of 3 rows in shards of 2."""
    (tmp_path / "a.txt").write_text("1\n2\n3\n")
    root, found = inputs.find([tmp_path / "a.txt"], output=tmp_path / "out")
    fingerprint = {"seed": 3, "output_format": "jsonl"}
    folder = OutputFolder(tmp_path / "out")
    folder.write_plan(plan_lib.make(root, found, shard_size=2, fingerprint=fingerprint))
    plan = folder.read_plan()
    assert plan is not None
    return folder, plan


def receipt(of: Plan, **changes: Any) -> bytes:
    made = Receipt(
        plan=of.digest,
        shard=0,
        rows=2,
        errors={"bad_json": 1},
        truncated=0,
        prompt_tokens=5,
        completion_tokens=6,
        nbytes=len(PART),
        sha256="0" * 64,
        device="cpu",
        ids="00" * 16,
    )
    return json.dumps(json.loads(made.to_json()) | changes).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"errors": 5},
        {"errors": {"a": "b"}},
        {"errors": {"bad_json": 3}},
        {"errors": {"bad_json": -1}},
        {"completion_tokens": "x"},
        {"rows": True},
        {"ids": "zz"},
        {"ids": "00"},
        {"ids": "00" * 24},
        {"device": None},
        {"retried_with": []},
        {"previous": 5},
        {"previous": {"shard": 0}},
        {"plan": "0" * 64},
        {"shard": 1},
        {"more": 1},
    ],
)
def test_a_receipt_that_says_what_none_says_is_none(planned, changes):
    folder, plan = planned
    (folder.path / "part-00000-of-00002.jsonl").write_bytes(PART)
    place = folder.path / "_receipts" / "00000.json"
    place.parent.mkdir()
    place.write_bytes(receipt(plan))
    assert folder.receipt(plan, plan.shards[0]) == folder.receipts(plan)[0] is not None
    place.write_bytes(receipt(plan, **changes))
    assert folder.receipt(plan, plan.shards[0]) is folder.receipts(plan)[0] is None


@pytest.mark.parametrize("content", [b"", b"5", b"[]", b'{"plan', b"[" * 9999, b"\xff", b"null"])
def test_what_is_no_receipt_at_all_is_none(planned, content):
    folder, plan = planned
    (folder.path / "part-00000-of-00002.jsonl").write_bytes(PART)
    (folder.path / "_receipts").mkdir()
    (folder.path / "_receipts" / "00000.json").write_bytes(content)
    assert folder.receipts(plan) == [None, None]


def test_a_receipt_that_cannot_be_read_is_an_error_and_one_that_is_not_there_is_none(planned):
    folder, plan = planned
    assert folder.receipt(plan, plan.shards[0]) is None
    (folder.path / "_receipts" / "00000.json").mkdir(parents=True)
    with pytest.raises(JobError, match=r"cannot read part-00000-of-00002\.jsonl .*Is a directory"):
        folder.receipt(plan, plan.shards[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": [1]},
        {"fingerprint": {}},
        {"fingerprint": {"output_format": "csv"}},
        {"fingerprint": {"output_format": "jsonl", "seed": [3]}},
        {"shards": []},
        {"shards": [[0, 0, 2, [[0, 0, 4, 1]]]]},
        {"shards": [[0, 0, 2, [[0, 0, 4, 1]]], [1, 2, 1, [[1, 4, 6, 3]]]]},
        {"shards": [[0, 0, 2, [[0, 0, 4, 1]]], [1, 3, 1, [[0, 4, 6, 3]]]]},
        {"shards": [[0, 0, 2, [[0, 0, 4, 1]]], [1, 2, 1, [[0, 4, "6", 3]]]]},
        {"shards": [[0, 0, 2, [[0, 0, 4, 1]]], [1, 2, 1, [[-1, 4, 6, 3]]]]},
        {"shards": 5},
        {"inputs": [["a.txt", "6", 0]]},
        {"inputs": [[None, 6, 0]]},
        {"inputs": {"a": 1}},
        {"root": None},
        {"date": 20260304},
        {"date": "today"},
    ],
)
def test_a_plan_that_no_job_wrote_is_refused(planned, changes):
    folder, _ = planned
    path = folder.path / "_plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(JobError, match="not a plan that this version can read"):
        folder.read_plan()


@pytest.mark.parametrize("content", [b"", b"5", b"[]", b'{"root', b"[" * 9999, b"\xff"])
def test_what_is_no_plan_at_all_is_refused(tmp_path: Path, content):
    (tmp_path / "_plan.json").write_bytes(content)
    with pytest.raises(JobError, match="not a plan that this version can read"):
        OutputFolder(tmp_path).read_plan()
