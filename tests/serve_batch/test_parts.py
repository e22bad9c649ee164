"""Parquet output: the same records, the same bytes; and error rows that are done again."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import core
import serve_batch
from serve_batch import parquet, parts, records, shards
from serve_batch.output import OutputFolder
from serve_batch.shards import Job

SAMPLED: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 40, "seed": 3}
ROWS = [
    {"id": "a", "prompt": "one", "n": 3, "label": {"gold": [1, 2.5, None], "x": "\u2028\ud83d"}},
    {"id": 7, "prompt": "two"},
    b"bad",
    {"prompt": "three", "logprobs": 1},
    {"prompt": "x" * 99},
    {"id": "e", "prompt": ""},
]
TALK = {
    "text": "B",
    "channels": {"final": "B", "analysis": "…"},
    "tool_calls": [{"recipient": "f", "content_type": None, "content": "{}"}],
}


def rows(count: int) -> list[Any]:
    return [{"id": i, "prompt": f"Prompt {i}"} for i in range(count)]


def read_parquet(output: Path) -> list[dict[str, Any]]:
    paths = sorted(output.glob("part-*.parquet"))
    files = (io.BytesIO(path.read_bytes()) for path in paths)
    return [record for file in files for _, record in parts.read(file, "parquet")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_parquet_holds_the_records_that_json_lines_hold(run, write_jsonl, read_parts, tmp_path):
    write_jsonl(ROWS)
    arguments = {"sampling": core.Sampling(**SAMPLED, logprobs=2), "shard_size": 4}
    run(**arguments)
    manifest = run(**arguments, output=tmp_path / "p", output_format="parquet")
    expected = [r | {"id": str(r["id"])} for r in read_parts(tmp_path / "out")]
    assert read_parquet(tmp_path / "p") == expected
    assert [part["file"] for part in manifest["parts"]] == [
        "part-00000-of-00002.parquet",
        "part-00001-of-00002.parquet",
    ]
    assert read_parquet(tmp_path / "p" / "errors") == [
        r for r in expected if r["status"] == "error"
    ]
    schema = pq.read_schema(tmp_path / "p" / "part-00000-of-00002.parquet")
    assert schema.names == list(expected[0])


def test_a_parquet_part_is_the_same_bytes_whenever_it_is_written_and_input_of_the_next_job(
    run, write_jsonl, read_parts, tmp_path
):
    write_jsonl(rows(40))
    outputs = [tmp_path / "once", tmp_path / "again"]
    for output in outputs:
        run(output=output, output_format="parquet")
    (outputs[1] / "_receipts" / "00001.json").unlink()
    assert run(output=outputs[1], output_format="parquet")["shards_done"] == 1
    assert contents(outputs[0]) == contents(outputs[1])
    with pytest.raises(serve_batch.JobError, match="output_format was 'parquet', is 'jsonl'"):
        run(output=outputs[0])
    run(output=tmp_path / "chained", input=outputs[0] / "part-*.parquet")
    chained = read_parts(tmp_path / "chained")
    # The token ids of a record are a prompt like any other.
    assert {r["status"] for r in chained} == {"ok"}


def test_an_overwrite_in_another_format_leaves_no_part_of_the_first(run, write_jsonl, tmp_path):
    write_jsonl([*rows(20), b"bad"])
    run(output_format="parquet")
    run(overwrite=True)
    names = {name.rpartition("/")[2] for name in contents(tmp_path / "out") if "part-" in name}
    assert names == {"part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_what_is_kept_of_a_part_is_written_again_to_the_byte(format):
    where: dict[str, Any] = {
        "index": 3,
        "source": records.Source("a.jsonl", 20, 2),
        "model": {"name": "m", "revision": "r"},
    }
    completion = core.Completion(
        text="b\u2028", tokens=(5, 6), finish_reason="eos", prompt_tokens=(1,)
    )
    prompt = records.Prompt("a", core.Sampling(), 2, "id", {"a": [1.0, 1e300, "\ud83d", {}]})
    error = records.RowError(code="bad_json", message="no", input={})
    made = [
        records.record(prompt, [completion] * 2, **where, answers=[TALK, TALK]),
        records.record(error, error, **where),
    ] * 700
    first, second = io.BytesIO(), io.BytesIO()
    with parts.Writer(first, format) as part:
        for record in made:
            part.write(record)
    with parts.Writer(second, format) as again:
        for kept, record in parts.read(io.BytesIO(first.getvalue()), format):
            assert record == made[record["status"] == "error"]
            again.keep(kept)
    assert first.getvalue() == second.getvalue()
    assert (part.nbytes, part.sha256) == (again.nbytes, again.sha256)
    assert part.nbytes == len(first.getvalue())


def test_a_parquet_part_is_written_by_groups_of_bounded_size():
    record = dict.fromkeys(parquet.SCHEMA.names) | {"id": "x", "samples": None}
    file = io.BytesIO()
    with parts.Writer(file, "parquet") as part:
        for _ in range(2 * parquet.ROW_GROUP_ROWS + 1):
            part.write(record)
    metadata = pq.ParquetFile(io.BytesIO(file.getvalue())).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [parquet.ROW_GROUP_ROWS, parquet.ROW_GROUP_ROWS, 1]


@pytest.fixture(params=["jsonl", "parquet"])
def failed(request, run, write_jsonl, tmp_path):
    """Runs a job of 5 shards, of which 1 and 3 have errors: of three kinds and of one."""
    given = rows(75)
    given[17] = given[50] = {"id": 17, "prompt": "x" * 99}
    given[18] = b"bad"
    given[20] = {"id": 20, "prompt": "x", "min_new_tokens": 8}  # of at most 6
    write_jsonl(given)
    arguments = {"output_format": request.param}
    run(**arguments)
    return lambda **more: run(**(arguments | more))


def test_error_rows_are_done_again_with_other_settings_and_nothing_else_is_touched(
    failed, tmp_path
):
    out = tmp_path / "out"
    before = contents(out)
    with pytest.raises(serve_batch.JobError, match="long_prompts was 'error'"):
        failed(long_prompts="truncate_left")
    manifest = failed(long_prompts="truncate_left", retry_errors=True)
    after = contents(out)
    assert (manifest["shards_done"], manifest["rows_done"], manifest["errors"]) == (2, 4, 2)
    assert manifest["errors_by_code"] == {"bad_json": 1, "bad_parameter": 1}
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in changed if "part-" in name} == {
        f"{folder}part-0000{i}-of-00005.{before_format(before)}"
        for i in (1, 3)
        for folder in ("", "errors/")
    }
    old, new = (records_of(x) for x in (before, after))
    retried = [i for i, record in enumerate(old) if record["status"] == "error"]
    assert [i for i in range(75) if old[i] != new[i]] == [17, 50]
    assert retried == [17, 18, 20, 50]
    assert {new[i]["truncated_tokens"] for i in (17, 50)} == {99 - 56}
    assert [part["retried_with"] for part in manifest["parts"]] == [
        {},
        {"long_prompts": "truncate_left"},
        {},
        {"long_prompts": "truncate_left"},
        {},
    ]
    assert sum("errors/" in name for name in after) == 1
    assert failed()["shards_done"] == 0  # the job is what it was, and complete


def before_format(files: dict[str, bytes]) -> str:
    return "parquet" if any(name.endswith(".parquet") for name in files) else "jsonl"


def records_of(files: dict[str, bytes]) -> list[dict[str, Any]]:
    names = sorted(name for name in files if name.startswith("part-"))
    return [
        record
        for name in names
        for _, record in parts.read(io.BytesIO(files[name]), name.rpartition(".")[2])
    ]


def test_errors_of_some_codes_are_done_again_and_those_of_others_kept(failed, tmp_path):
    before = contents(tmp_path / "out")
    same = failed(retry_errors=["prompt_too_long"])
    assert (same["shards_done"], same["rows_done"], same["errors"]) == (2, 2, 4)
    assert contents(tmp_path / "out") == before  # the same settings give the same errors
    with pytest.raises(
        serve_batch.JobError,
        match=r"has the code bad_jso or no_such; there are: bad_json 1, bad_parameter 1, prompt_too_long 2$",
    ):
        failed(retry_errors=["bad_jso", "no_such", "prompt_too_long"])
    assert (tmp_path / "out" / "_SUCCESS").exists()
    settings: dict[str, Any] = {
        "long_prompts": "truncate_right",
        "sampling": core.Sampling(**{**SAMPLED, "max_new_tokens": 9}),
    }
    some = failed(retry_errors=["prompt_too_long"], **settings)
    assert some["errors_by_code"] == {"bad_json": 1, "bad_parameter": 1}
    more = failed(retry_errors=True, **settings)
    assert (more["errors_by_code"], more["shards_done"]) == ({"bad_json": 1}, 1)
    # Killed after its last shard, the same command ends what is left to do.
    (tmp_path / "out" / "_SUCCESS").unlink()
    assert failed(retry_errors=["prompt_too_long"], **settings)["shards_done"] == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_another_model_or_an_unfinished_job_is_not_retried(failed, model, tmp_path):
    receipt = tmp_path / "out" / "_receipts" / "00002.json"
    content = receipt.read_bytes()
    receipt.unlink()
    with pytest.raises(serve_batch.JobError, match=r"1 of 5 shards .* are not done, and long_prom"):
        failed(long_prompts="truncate_left", retry_errors=True)
    receipt.write_bytes(content)
    other = "jsonl" if list((tmp_path / "out").glob("*.parquet")) else "parquet"
    with pytest.raises(serve_batch.JobError, match="output_format was"):
        failed(output_format=other, retry_errors=True)


def test_a_damaged_part_is_not_retried(failed, tmp_path):
    out = tmp_path / "out"
    path = next(out.glob("part-00003*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        serve_batch.JobError, match=r"part-00003-of-00005\.\w+ was changed after .* with"
    ):
        failed(long_prompts="truncate_left", retry_errors=True)
    assert path.read_bytes() == bytes(content)


def test_a_shard_that_is_no_longer_done_is_not_done_with_a_retry_s_settings(
    run, write_jsonl, model, tmp_path
):
    write_jsonl([*rows(20), b"bad"])
    run()
    out = tmp_path / "out"
    hotter = core.Sampling(**{**SAMPLED, "temperature": 1.5})
    work = Job(
        model=model,
        output=OutputFolder(out),
        sampling=hotter,
        slots=4,
        retried_codes=frozenset(),
        retried_with={"temperature": 1.5},
        reports_progress=False,
    ).start()
    (out / "_receipts" / "00001.json").unlink()
    before = contents(out)
    with pytest.raises(serve_batch.JobError, match=r"shard 1 is no longer done.*\(temperature\)"):
        shards.generate(work.plan.shards[1], work)
    assert contents(out) == before


def test_a_worker_that_outlives_its_job_writes_nothing_into_the_next_one_s_folder(
    run, write_jsonl, model, tmp_path
):
    write_jsonl([*rows(20), b"bad"])
    run()
    out = tmp_path / "out"
    folder = OutputFolder(out)
    job = Job(
        model=model,
        output=folder,
        sampling=core.Sampling(**SAMPLED),
        slots=4,
        reports_progress=False,
    )
    work = job.start()
    mine = (out / "_receipts" / "00001.json").read_bytes()
    run(sampling=core.Sampling(**{**SAMPLED, "temperature": 1.5}), overwrite=True)
    before = contents(out)
    with pytest.raises(serve_batch.JobError, match="has become another job's"):
        shards.generate(work.plan.shards[1], work)
    assert contents(out) == before
    # A receipt that it had written a moment earlier is not one of the job that is there.
    (out / "_receipts" / "00001.json").write_bytes(mine)
    plan = folder.read_plan()
    assert plan is not None
    assert [receipt is None for receipt in folder.receipts(plan)] == [False, True]


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up."""


@pytest.mark.parametrize("failed", ["jsonl"], indirect=True)
@pytest.mark.parametrize(
    "moment",
    [pytest.param(i, marks=[] if i in (1, 2) else pytest.mark.slow) for i in range(8)],
)
def test_a_retry_that_is_killed_anywhere_loses_nothing(failed, tmp_path, monkeypatch, moment):
    out = tmp_path / "out"
    old = records_of(contents(out))
    clean = tmp_path / "clean"
    failed(output=clean)
    failed(output=clean, long_prompts="truncate_left", retry_errors=True)
    expected = contents(clean)
    with monkeypatch.context() as patch:
        steps = die_at(patch, moment)
        with contextlib.suppress(BaseException):  # whatever Beam makes of it
            failed(long_prompts="truncate_left", retry_errors=True)
    assert len(steps) == moment + 1, "something went on, or the moment was never reached"
    new = records_of(expected)
    for record, before, after in zip(records_of(contents(out)), old, new, strict=True):
        assert record in (before, after)
    folder = OutputFolder(out)
    plan = folder.read_plan()
    assert plan is not None
    assert None not in folder.receipts(plan)  # no shard has to be done from its beginning
    assert failed()["shards_done"] == 0
    for shard in plan.shards:
        errors = out / "errors" / plan.part_name(shard)
        listed = errors.read_bytes() if errors.exists() else b""
        rows = folder.read_part(plan, shard)
        assert listed == b"".join(line for line, record in rows if record["status"] == "error")
    failed(long_prompts="truncate_left", retry_errors=True)
    assert contents(out) == expected


def die_at(patch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Kills where the rename or removal of that number of a part, its errors or its receipt would be."""
    rename, unlink = Path.rename, Path.unlink
    steps: list[str] = []

    def step(path: Path) -> None:
        if ".tmp." not in path.name and (path.name.startswith("part-") or path.stem.isdigit()):
            steps.append(f"{path.parent.name}/{path.name}")
            if len(steps) == moment + 1:
                raise Killed

    def rename_or_die(self: Path, target: Any) -> Any:
        step(Path(target))
        return rename(self, target)

    def unlink_or_die(self: Path, missing_ok: bool = False) -> None:
        step(self)
        unlink(self, missing_ok=missing_ok)

    patch.setattr(Path, "rename", rename_or_die)
    patch.setattr(Path, "unlink", unlink_or_die)
    return steps
