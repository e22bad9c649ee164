"""The whole job in this process: real engine, real Beam."""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tqdm

import core
import serve_batch
from serve_batch import host, records, runners
from serve_batch import inputs as inputs_lib
from serve_batch import job as job_lib
from serve_batch import plan as plan_lib
from serve_batch.output import OutputFolder
from serve_batch.shards import Job

SAMPLED = core.Sampling(max_new_tokens=6, temperature=0.9, top_k=40, seed=3)
DIRTY = [
    b'{"prompt": "cut of',
    b'["not", "an", "object"]',
    b'{"text": "no prompt"}',
    b'{"prompt": 17}',
    b"\xff\xfe",
]
DIRTY_CODES = ["bad_json", "not_an_object", "prompt_missing", "prompt_wrong_type", "invalid_utf8"]


@pytest.fixture
def engine(model):
    return core.Engine(*core.load(model), slots=4)


def prompts(count: int) -> list[Any]:
    return [{"prompt": f"Prompt {i * 7919 % 1000}, {'and on ' * (i % 5)}"} for i in range(count)]


def test_a_thousand_rows_of_which_one_in_twenty_is_bad_come_out_as_a_thousand_in_order(
    run, write_jsonl, read_parts, tmp_path
):
    rows = prompts(1000)
    codes = ["ok"] * 1000
    for turn, i in enumerate(range(11, 1000, 20)):
        rows[i], codes[i] = DIRTY[turn % 5], DIRTY_CODES[turn % 5]
    path = write_jsonl(rows)
    manifest = run(shard_size=300)
    records_out = read_parts(tmp_path / "out")
    assert [r["index"] for r in records_out] == list(range(1000))
    assert [(r["error"] or {"code": "ok"})["code"] for r in records_out] == codes
    assert [r["status"] for r in records_out] == ["ok" if c == "ok" else "error" for c in codes]
    content = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(content) if byte == ord("\n"))][:-1]
    assert [r["source"]["offset"] for r in records_out] == starts
    assert (manifest["rows"], manifest["ok"], manifest["errors"]) == (1000, 950, 50)
    assert manifest["errors_by_code"] == dict.fromkeys(sorted(DIRTY_CODES), 10)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    errors = sorted((tmp_path / "out" / "errors").iterdir())
    failed = [json.loads(line) for path in errors for line in path.read_bytes().splitlines()]
    assert failed == [r for r in records_out if r["status"] == "error"]


def test_a_record_says_what_the_engine_says(run, engine, write_jsonl, read_parts, tmp_path):
    rows = [
        {"prompt": "The flax", "id": "x"},
        {"prompt": "The flax", "id": "x", "temperature": 0},
        {"prompt": "The flax", "id": 7, "seed": 4, "max_new_tokens": 3},
        {"token_ids": [84, 104, 101]},
        {"prompt": "The flax", "stop": ["e", " "], "max_new_tokens": 20, "id": "stops"},
        {"prompt": "", "id": "empty"},
        {"token_ids": [3, 257], "id": "beyond"},
    ]
    write_jsonl(rows)
    run()
    sampled: Any = {"temperature": 0.9, "top_k": 40, "seed": 3, "max_new_tokens": 6}
    fourth = sum(len(json.dumps(row)) + 1 for row in rows[:3])
    expected = engine.complete(
        [
            core.Request("The flax", core.Sampling(**sampled), "x"),
            core.Request("The flax", core.Sampling(**sampled | {"temperature": 0}), "x"),
            core.Request(
                "The flax", core.Sampling(**sampled | {"seed": 4, "max_new_tokens": 3}), "7"
            ),
            core.Request([84, 104, 101], core.Sampling(**sampled), f"prompts.jsonl:{fourth}"),
            core.Request(
                "The flax",
                core.Sampling(**sampled | {"stop": ("e", " "), "max_new_tokens": 20}),
                "stops",
            ),
        ]
    )
    found = read_parts(tmp_path / "out")
    for record, completion in zip(found[:5], expected, strict=True):
        assert isinstance(completion, core.Completion)
        assert record["text"] == completion.text
        assert record["token_ids"] == list(completion.tokens)
        assert record["finish_reason"] == completion.finish_reason
        assert record["prompt_tokens"] == len(completion.prompt_tokens)
        assert record["completion_tokens"] == len(completion.tokens)
    assert [r["seed"] for r in found] == [3, 3, 4, 3, 3, 3, 3]
    assert [r["error"]["code"] for r in found[5:]] == ["prompt_empty", "token_out_of_range"]


def test_dirty_files_come_out_row_for_row(run, read_parts, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "after a mark"}\r\n'
        b"\r\n"
        b'{"prompt": "a\\u0000b"}\n'
        b'{"prompt": "\xff"}\n'
        + b'{"prompt": "'
        + b"x" * (5 << 20)
        + b'"}\n'
        + b'{"prompt": "\xe2\x80\xa8 is no line end"}\n'
        b'{"prompt": "no end of line"}'
    )
    (folder / "b.txt").write_bytes(b"one\r\n\n\xfftwo\n \nthree")
    (folder / "empty.jsonl").write_bytes(b"")
    manifest = run(shard_size=4)
    codes = [(r["error"] or {"code": "ok"})["code"] for r in read_parts(tmp_path / "out")]
    assert codes == [
        *("ok", "blank_line", "ok", "invalid_utf8", "line_too_long", "ok", "ok"),
        *("ok", "blank_line", "invalid_utf8", "ok", "ok"),
    ]
    assert manifest["rows"] == 12


def test_a_prompt_that_does_not_fit_leaves_its_neighbours_as_they_are(
    run, write_jsonl, read_parts, tmp_path
):
    fine = [row | {"id": str(i)} for i, row in enumerate(prompts(9))]
    poison = [{"prompt": "x" * 62}, {"prompt": ""}, {"prompt": "y" * 1000}]
    write_jsonl(fine, "alone/a.jsonl")
    write_jsonl([r for i in range(3) for r in (poison[i], *fine[3 * i : 3 * i + 3])])
    run(input=tmp_path / "alone" / "*", output=tmp_path / "alone_out")
    run()
    alone, among = read_parts(tmp_path / "alone_out"), read_parts(tmp_path / "out")
    bad = [r for r in among if r["status"] == "error"]
    assert [r["error"]["code"] for r in bad] == [
        "prompt_too_long",
        "prompt_empty",
        "prompt_too_long",
    ]
    assert [r["token_ids"] for r in among if r["status"] == "ok"] == [r["token_ids"] for r in alone]


def test_a_prompt_as_long_as_the_context_and_a_limit_of_nothing_are_served(
    run, write_jsonl, read_parts, tmp_path
):
    write_jsonl([{"prompt": "x" * 61, "max_new_tokens": 9}, {"prompt": "x", "max_new_tokens": 0}])
    run()
    longest, none = read_parts(tmp_path / "out")
    assert (longest["completion_tokens"], longest["finish_reason"]) == (1, "length")
    assert (none["completion_tokens"], none["text"], none["status"]) == (0, "", "ok")


def test_ids_are_kept_as_they_are_and_never_merge_rows(run, write_jsonl, read_parts, tmp_path):
    ids = ["a", 7, "7", "a", "i" * 1000, None, "a", -(2**70)]
    write_jsonl([{"prompt": f"prompt {i}", "id": id_} for i, id_ in enumerate(ids)])
    manifest = run(shard_size=2)
    found = [r["id"] for r in read_parts(tmp_path / "out")]
    assert found == [*ids[:5], found[5], *ids[6:]]
    assert found[5].startswith("prompts.jsonl:")
    assert manifest["duplicate_ids"] == 2


def test_unknown_fields_come_back_as_they_were(run, write_jsonl, read_parts, tmp_path):
    odd = ["👩‍👩‍👧", "שלום", "e\u0301", "\u2028\x85", "nul\x00", ""]
    line = json.dumps({"prompt": "a", "odd": odd, "surrogate": "\ud83d", "deep": {"n": [1, 2.5]}})
    write_jsonl(
        [line.encode(), json.dumps({"prompt": "b", "odd": odd}, ensure_ascii=False).encode()]
    )
    run()
    first, second = read_parts(tmp_path / "out")
    assert first["input"] == {"odd": odd, "surrogate": "\ud83d", "deep": {"n": [1, 2.5]}}
    assert second["input"] == {"odd": odd}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_bytes_do_not_depend_on_shards_or_on_the_order_of_files(
    run, write_jsonl, join_parts, tmp_path, temperature
):
    sampling = core.Sampling(max_new_tokens=6, temperature=temperature, seed=3)
    rows = prompts(60)
    files = [
        write_jsonl(rows[:7], "input/a.jsonl"),
        write_jsonl([*rows[7:30], b"bad"], "input/b.jsonl"),
        write_jsonl(rows[30:], "input/c.jsonl"),
    ]
    outputs = []
    for number, (shard_size, inputs) in enumerate([(5, files), (23, files[::-1]), (100, files)]):
        where = {"input": inputs, "output": tmp_path / str(number)}
        run(shard_size=shard_size, sampling=sampling, **where)
        outputs.append(join_parts(tmp_path / str(number)))
    assert len(outputs[0].splitlines()) == 61
    assert outputs[0] == outputs[1] == outputs[2]


def test_another_runner_writes_the_same_bytes(run, model, write_jsonl, join_parts, tmp_path):
    write_jsonl(prompts(40))
    run(output=tmp_path / "ours")
    # A job of which nothing is done yet, on Beam's other in-process runner.
    folder = OutputFolder(tmp_path / "theirs")
    folder.path.mkdir()
    plan = (tmp_path / "ours" / "_plan.json").read_bytes()
    (folder.path / "_plan.json").write_bytes(plan)
    job = Job(model=model, output=folder, sampling=SAMPLED, slots=4, reports_progress=False)
    with runners.quiet():
        runners.run(job, "BundleBasedDirectRunner", runners.pipeline_options([]))
    assert join_parts(folder.path) == join_parts(tmp_path / "ours")


def test_an_engine_that_fails_ends_the_job_and_the_next_run_goes_on(
    run, write_jsonl, join_parts, tmp_path, monkeypatch
):
    write_jsonl(prompts(48))
    run(output=tmp_path / "clean")
    advance = core.Engine._advance

    def fail_in_the_third_shard(self, steps):
        if len(list((tmp_path / "out").glob("part-*.jsonl"))) == 2:
            raise MemoryError("out of\ndevice memory")
        return advance(self, steps)

    with monkeypatch.context() as patch:
        patch.setattr(core.Engine, "_advance", fail_in_the_third_shard)
        started = time.monotonic()
        with pytest.raises(serve_batch.JobError, match="MemoryError: out of device memory; fin"):
            run()
        assert time.monotonic() - started < 10
    left = {p.name for p in (tmp_path / "out").iterdir()} - {"_plan.json", "_receipts"}
    assert len(left) == 2
    assert all(name.startswith("part-") and name.endswith(".jsonl") for name in left)
    manifest = run()
    assert manifest["shards_done"] == 1
    assert join_parts(tmp_path / "out") == join_parts(tmp_path / "clean")
    ours, clean = (
        json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in ("out", "clean")
    )
    assert ours == clean


def test_a_disk_that_fills_up_leaves_no_half_part(run, write_jsonl, tmp_path, monkeypatch):
    write_jsonl(prompts(20))
    to_line = records.to_line

    def full(fields):
        if fields["index"] == 17:
            raise OSError(28, "No space left on device")
        return to_line(fields)

    monkeypatch.setattr(records, "to_line", full)
    with pytest.raises(serve_batch.JobError, match=r"shard 1 failed: OSError.*No space left"):
        run()
    assert [p.name for p in (tmp_path / "out").glob("part*")] == ["part-00000-of-00002.jsonl"]


def test_a_second_run_finds_everything_done(run, write_jsonl, tmp_path):
    write_jsonl(prompts(20))
    first = run()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("part-*")}
    second = run(shard_size=5)  # the plan's stays
    assert (first["shards_done"], second["shards_done"]) == (2, 0)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("part-*")} == before
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_another_job_is_refused_by_name_until_told_to_overwrite(run, write_jsonl, tmp_path):
    path = write_jsonl(prompts(20))
    run()
    hotter = core.Sampling(max_new_tokens=6, temperature=1.5, top_k=40, seed=3)
    with pytest.raises(serve_batch.JobError, match=r"temperature was 0\.9, is 1\.5; choose"):
        run(sampling=hotter)
    with pytest.raises(serve_batch.JobError, match="slots was 4, is 8"):
        run(slots=8)
    path.write_bytes(path.read_bytes() + b'{"prompt": "one more"}\n')
    with pytest.raises(serve_batch.JobError, match=r"prompts.jsonl was modified"):
        run()
    assert (tmp_path / "out" / "_SUCCESS").exists()
    manifest = run(sampling=hotter, overwrite=True)
    assert (manifest["rows"], manifest["fingerprint"]["temperature"]) == (21, 1.5)


def test_overwriting_with_an_input_that_cannot_be_planned_leaves_the_old_job_complete(
    run, write_jsonl, tmp_path, monkeypatch
):
    write_jsonl(prompts(20))
    run()
    before = contents(tmp_path / "out")
    growing = write_jsonl(prompts(5), "other/prompts.jsonl")
    find = inputs_lib.find

    def find_and_grow(*arguments, **options):
        found = find(*arguments, **options)
        growing.write_bytes(growing.read_bytes() + b"more\n")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(inputs_lib, "find", find_and_grow)
        with pytest.raises(serve_batch.JobError, match="is being written to"):
            run(input=growing, overwrite=True)
    assert contents(tmp_path / "out") == before
    assert run()["shards_done"] == 0


@pytest.mark.parametrize("interrupted", [0, 1, 2, 4, 6, "plan"])
def test_an_overwrite_that_is_killed_can_be_given_again_and_taken_back(
    run, write_jsonl, join_parts, tmp_path, monkeypatch, interrupted
):
    write_jsonl([*prompts(20), b"bad"])
    run()
    clean = join_parts(tmp_path / "out")
    hotter = core.Sampling(max_new_tokens=6, temperature=1.5, top_k=40, seed=3)
    with monkeypatch.context() as patch:
        die_at(patch, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(sampling=hotter, overwrite=True)
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert "_SUCCESS" not in held or len([name for name in held if name.startswith("part-")]) == 2
    shutil.copytree(tmp_path / "out", tmp_path / "taken_back")
    run(output=tmp_path / "taken_back")
    assert join_parts(tmp_path / "taken_back") == clean
    manifest = run(sampling=hotter, overwrite=True)
    assert (manifest["rows"], manifest["fingerprint"]["temperature"]) == (21, 1.5)


def die_at(patch: pytest.MonkeyPatch, moment: int | str) -> None:
    """Kills at the removal of that number, or where the new plan would take its name."""
    unlink, rename, files = Path.unlink, Path.rename, itertools.count()

    def unlink_or_die(path, missing_ok=False):
        if ".tmp." not in path.name and path.name != "_lock" and next(files) == moment:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    def rename_or_die(path, target):
        if moment == "plan" and target.name == "_plan.json":
            raise KeyboardInterrupt
        return rename(path, target)

    patch.setattr(Path, "unlink", unlink_or_die)
    patch.setattr(Path, "rename", rename_or_die)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("becomes", "told"),
    [
        (b"prompt ", "jsonl was modified"),
        (b"Prompt\n", "shard 0 was planned with 20 rows, now has"),
        (b"", "it is shorter than it was"),
    ],
)
def test_an_input_that_changes_while_the_job_runs_is_found(
    run, write_jsonl, tmp_path, monkeypatch, becomes, told
):
    path = write_jsonl(prompts(20))
    serve = host.EngineHost.complete

    def touch_and_serve(self, requests):
        path.write_bytes(path.read_bytes().replace(b"Prompt ", becomes))
        return serve(self, requests)

    monkeypatch.setattr(host.EngineHost, "complete", touch_and_serve)
    with pytest.raises(serve_batch.JobError, match=told):
        run(shard_size=100)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_what_a_record_passes_through_is_part_of_the_fingerprint(model):
    found = plan_lib.fingerprint(model, core.Sampling(), slots=4)
    ours, others = {"core", "serve_batch"}, {"jax", "jaxlib", "jinja2", "msgspec", "pyarrow"}
    assert ours | others | {"tokenizers"} <= found.keys()


def test_weights_and_tokenizer_are_part_of_the_fingerprint(model, tmp_path):
    other = tmp_path / "tiny"
    shutil.copytree(model, other)
    before = plan_lib.fingerprint(other, SAMPLED, slots=4)
    assert before == plan_lib.fingerprint(model, SAMPLED, slots=4)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tensors"]["ln_f.bias"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    after = plan_lib.fingerprint(other, SAMPLED, slots=4)
    assert {k for k in before if before[k] != after[k]} == {"revision", "tokenizer"}


@pytest.mark.slow
def test_a_precision_is_the_engine_s_and_the_job_s(run, model, write_jsonl, read_parts, tmp_path):
    rows = prompts(9)
    write_jsonl([row | {"id": i} for i, row in enumerate(rows)])
    assert run(precision="int8")["fingerprint"]["precision"] == "int8"
    engine = core.Engine(*core.load(model), slots=4, precision="int8")
    requests = [core.Request(row["prompt"], SAMPLED, id=str(i)) for i, row in enumerate(rows)]
    completions = engine.complete(requests)
    expected = [list(c.tokens) for c in completions if isinstance(c, core.Completion)]
    assert [record["token_ids"] for record in read_parts(tmp_path / "out")] == expected
    with pytest.raises(serve_batch.JobError, match="precision was 'int8', is 'bfloat16'"):
        run(precision="bfloat16")


def test_a_part_that_was_changed_is_found_and_done_again(run, write_jsonl, join_parts, tmp_path):
    write_jsonl(prompts(40))
    run()
    clean = join_parts(tmp_path / "out")
    part = tmp_path / "out" / "part-00001-of-00003.jsonl"
    part.write_bytes(part.read_bytes().replace(b'"ok"', b'"OK"'))
    with pytest.raises(serve_batch.JobError, match="1 of 3 parts are missing or were changed"):
        run()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert run()["shards_done"] == 1
    part.unlink()
    assert run()["shards_done"] == 1
    assert join_parts(tmp_path / "out") == clean


def test_too_many_errors_fail_the_job_and_keep_what_it_wrote(run, write_jsonl, tmp_path):
    write_jsonl([*prompts(18), b"bad", b"bad"])
    with pytest.raises(serve_batch.JobError, match=r"2 of 20 rows are errors \(10\.0%\).*bad_json"):
        run(max_error_rate=0.09)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert run(max_error_rate=0.1)["shards_done"] == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_dry_run_counts_the_bad_rows_and_writes_nothing(run, write_jsonl, tmp_path):
    write_jsonl([*prompts(18), b"bad", {"prompt": None}])
    found = run(dry_run=True, shard_size=6)
    assert (found["rows"], found["shards"], found["errors"]) == (20, 4, 2)
    assert found["errors_by_code"] == {"bad_json": 1, "prompt_missing": 1}
    assert not (tmp_path / "out").exists()


def test_no_rows_at_all_are_a_job_that_succeeds(run, write_jsonl, tmp_path):
    write_jsonl([])
    assert run()["rows"] == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_the_manifest_names_what_is_there(run, write_jsonl, tmp_path):
    write_jsonl(prompts(20))
    returned = run()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert returned | manifest == returned
    for part in manifest["parts"]:
        content = (tmp_path / "out" / part["file"]).read_bytes()
        assert part["sha256"] == hashlib.sha256(content).hexdigest()
        assert (part["bytes"], part["rows"]) == (len(content), content.count(b"\n"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("_SUCCESS", "_plan.json", "_receipts", "manifest.json"),
        *(part["file"] for part in manifest["parts"]),
    ]


def test_a_worker_with_another_core_or_another_model_refuses(model):
    with pytest.raises(serve_batch.JobError, match=r"planned with core 9\.9\.9; this worker"):
        host.check_code("9.9.9")
    with pytest.raises(serve_batch.JobError, match="planned for revision 0000"):
        host.shared(model, slots=4, revision="0" * 64)


def test_a_worker_with_other_versions_another_tokenizer_or_other_settings_says_what_differs(
    run, model, write_jsonl, tmp_path
):
    write_jsonl(prompts(3))
    run()
    folder = OutputFolder(tmp_path / "out")
    job = Job(model=model, output=folder, sampling=SAMPLED, slots=4, reports_progress=False)
    other = shutil.copytree(model, tmp_path / model.name)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    hotter = dataclasses.replace(SAMPLED, temperature=1.5)
    path = folder.path / "_plan.json"
    plan = json.loads(path.read_text())
    for changes, versions, told in [
        ({"model": other}, {}, "planned with: tokenizer was '.*', is '.*'; install"),
        ({"sampling": hotter}, {}, r"temperature was 0\.9, is 1\.5"),
        ({"slots": 2}, {}, "slots was 4, is 2"),
        (
            {},
            {"jax": "0.0.1", "serve_batch": "0"},
            r"serve_batch was '0', is .*; jax was '0\.0\.1'",
        ),
    ]:
        path.write_text(json.dumps(plan | {"fingerprint": plan["fingerprint"] | versions}))
        with pytest.raises(serve_batch.JobError, match=told):
            dataclasses.replace(job, **changes).start()


def test_progress_is_what_whole_lines_say_and_a_torn_one_waits_for_its_end(tmp_path):
    path = tmp_path / "_progress"
    path.write_bytes(b"5 40 1\n5 4\nnonsense\n\n-1 2 3\n\xff\n64 9")
    bar, ended = tqdm.tqdm(total=100, file=io.StringIO()), threading.Event()
    watcher = threading.Thread(target=job_lib._watch, args=(path, bar, ended))
    watcher.start()
    wait = time.monotonic() + 10
    while bar.n < 5 and time.monotonic() < wait:
        time.sleep(0.01)
    with path.open("ab") as file:
        file.write(b"0 2\n7 3 0")
    ended.set()
    watcher.join()
    assert bar.n == 5 + 64
    assert bar.postfix.endswith("3 errors")
    bar.close()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"runner": "DaskRunner"}, "loses rows"),
        ({"runner": "Nonsense"}, "there is no runner 'Nonsense'"),
        ({"input": ""}, "give --input=GLOB and --output=DIR"),
        ({"input": []}, "give --input=GLOB and --output=DIR"),
        ({"output": ""}, "give --input=GLOB and --output=DIR"),
        ({"slots": 0}, "slots is 0"),
        ({"precision": "fp8"}, "'fp8' is not one of float32, bfloat16, int8"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"max_error_rate": 1.5}, r"max_error_rate is 1\.5"),
        ({"long_prompts": "shorten"}, "long_prompts 'shorten' is not one of error, truncate_left"),
        ({"output_format": "csv"}, "output_format 'csv' is not one of jsonl, parquet"),
        ({"overwrite": True, "retry_errors": True}, "not both"),
        ({"retry_errors": "bad_json"}, "retry_errors is 'bad_json'; expected True .* or a list"),
        ({"retry_errors": []}, r"retry_errors is \[\]; expected True"),
        ({"beam_options": ["--nonsense=1"]}, "has no option --nonsense"),
        ({"beam_options": ["--runner=FlinkRunner"]}, "--runner after `--`"),
        ({"beam_options": ["--direct_num_workers=2"]}, "--direct_num_workers after `--`"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_read(run, arguments, told):
    with pytest.raises(serve_batch.UsageError, match=told):
        run(**arguments)


def test_the_direct_runner_is_ours(run, write_jsonl, tmp_path):
    write_jsonl(prompts(3))
    assert run(runner="DirectRunner")["ok"] == 3


def test_logging_is_left_as_it_was(run, write_jsonl, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    level = logging.getLogger("apache_beam").level
    write_jsonl(prompts(3))
    run()
    assert logging.getLogger().handlers == []
    assert logging.getLogger("apache_beam").level == level


def test_receipts_are_the_commit(run, write_jsonl, join_parts, tmp_path):
    """Killed between the part and its receipt, a shard is done again and comes out the same."""
    write_jsonl(prompts(40))
    run()
    clean = join_parts(tmp_path / "out")
    (tmp_path / "out" / "_receipts" / "00001.json").unlink()
    (tmp_path / "out" / "part-00002-of-00003.jsonl.tmp.1234").write_bytes(b"half")
    assert run()["shards_done"] == 1
    assert join_parts(tmp_path / "out") == clean
    assert not list((tmp_path / "out").rglob("*.tmp.*"))
    assert (tmp_path / "out" / "_SUCCESS").exists()
