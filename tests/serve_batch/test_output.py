import shutil

import pytest

from serve_batch.output import OutputFolder, committing
from serve_batch.plan import JobError


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
    with folder.lock(), committing(folder.plan_file):
        shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    killed = OutputFolder(tmp_path.with_name("killed"))
    assert len(list(killed.path.iterdir())) == 2
    killed.check_ours()


def test_a_plan_of_another_version_is_refused(tmp_path):
    (tmp_path / "_plan.json").write_text('{"version": 2}')
    with pytest.raises(JobError, match="not a plan that this version can read"):
        OutputFolder(tmp_path).read_plan()
