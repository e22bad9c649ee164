import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import Sampling
from serve_batch import inputs as inputs_lib
from serve_batch import plan as plan_lib
from serve_batch import shards
from serve_batch.errors import JobError
from serve_batch.inputs import Input
from serve_batch.plan import Plan

DEFAULTS = Sampling()
FINGERPRINT = {
    "model": "tiny",
    "seed": 3,
    "stop": "[]",
    "logprobs": None,
    "output_format": "jsonl",
}


def write(folder: Path, **contents: bytes) -> None:
    for stem, content in contents.items():
        (folder / f"{stem}.txt").write_bytes(content)


def make(folder: Path, shard_size: int, pattern: str = "*.txt") -> Plan:
    root, inputs = inputs_lib.find([folder / pattern], output=folder / "out")
    return plan_lib.make(root, inputs, shard_size=shard_size, fingerprint=FINGERPRINT)


def lines_of(content: bytes) -> list[bytes]:
    """What `wc -l` counts, and a last line without an end."""
    *whole, rest = content.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


def spans_of(plan: Plan) -> list[bytes]:
    """The bytes of each shard."""
    return [
        b"".join(
            Path(plan.root, plan.inputs[span.input].name).read_bytes()[span.start : span.end]
            for span in shard.spans
        )
        for shard in plan.shards
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(
        st.lists(st.sampled_from([b"\n", b"a", b"\r\n", b"bc\n"])).map(b"".join),
        min_size=1,
        max_size=4,
    ),
    shard_size=st.integers(1, 7),
    block=st.integers(1, 5),
)
def test_shards_hold_every_line_once_and_in_order(contents, shard_size, block, tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    write(folder, **{f"file{i}": content for i, content in enumerate(contents)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_lib, "_BLOCK_BYTES", block)
        plan = make(folder, shard_size)
    expected = [line for content in contents for line in lines_of(content)]
    assert b"".join(spans_of(plan)) == b"".join(contents)
    assert [shard.rows for shard in plan.shards[:-1]] == [shard_size] * (len(plan.shards) - 1)
    assert plan.rows == len(expected)
    first_rows = [i * shard_size for i in range(len(plan.shards))]
    assert [shard.first_row for shard in plan.shards] == first_rows
    rows = [row for shard in plan.shards for row in shards.read(plan, shard, DEFAULTS)]
    assert [row.number for row in rows] == list(range(len(expected)))


def test_a_row_knows_its_file_its_offset_and_its_line(tmp_path):
    write(tmp_path, a=b"one\ntwo\n", b=b"three\nfour")
    plan = make(tmp_path, 3)
    rows = [row for shard in plan.shards for row in shards.read(plan, shard, DEFAULTS)]
    assert [tuple(row.source) for row in rows] == [
        ("a.txt", 0, 1),
        ("a.txt", 4, 2),
        ("b.txt", 0, 1),
        ("b.txt", 6, 2),
    ]


def test_a_line_that_is_too_long_takes_no_other_with_it(tmp_path):
    long = b"x" * (3 << 20)
    write(tmp_path, a=b"\xef\xbb\xbf" + long + b"\nshort\n" + long)
    plan = make(tmp_path, 10)
    rows = list(shards.read(plan, plan.shards[0], DEFAULTS))
    assert [getattr(row.content, "code", "ok") for row in rows] == [
        "line_too_long",
        "ok",
        "line_too_long",
    ]


def test_a_plan_reads_back_equal(tmp_path):
    write(tmp_path, a=b"1\n2\n3\n", b=b"", c=b"4")
    plan = make(tmp_path, 2)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_hundred_thousand_lines_are_planned_in_constant_memory(tmp_path):
    line = b'{"prompt": "' + b"x" * 180 + b'"}\n'
    write(tmp_path, small=line * 10_000)
    write(tmp_path, large=line * 100_000)
    peaks = []
    for stem, rows in (("small", 10_000), ("large", 100_000)):
        tracemalloc.start()
        assert make(tmp_path, 1024, f"{stem}.txt").rows == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)  # 19 MB of input more


def test_the_order_of_patterns_and_files_does_not_matter(tmp_path):
    write(tmp_path, b=b"2\n", a=b"1\n", c=b"3\n")
    found = [
        inputs_lib.find([tmp_path / name for name in names], output=tmp_path / "out")
        for names in (["c.txt", "a.txt", "b.txt"], ["*.txt"], ["b*", "*", "a.txt"])
    ]
    assert found[0] == found[1] == found[2]
    assert [i.name for i in found[0][1]] == ["a.txt", "b.txt", "c.txt"]


def test_names_are_below_the_fixed_part_of_the_pattern(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er", a=b"1\n")
    root, inputs = inputs_lib.find([tmp_path / "**" / "*.txt"], output=tmp_path.parent / "out")
    assert (root, [i.name for i in inputs]) == (str(tmp_path), ["deep/er/a.txt"])


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("nothing*.txt", "no file matches"),
        (
            "*",
            "1 of the inputs are in no known format: .*table.arrow; known are .parquet, and .jsonl",
        ),
        ("gone.txt", "cannot read input"),
        ("empty", "no file with a known suffix in"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(tmp_path, pattern, told):
    write(tmp_path, a=b"1\n")
    (tmp_path / "table.arrow").write_bytes(b"ARROW1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(JobError, match=told):
        inputs_lib.find([tmp_path / pattern], output=tmp_path / "out")


@pytest.mark.parametrize(
    ("pattern", "output"),
    [
        ("out/*.jsonl", "out"),
        ("*/*.jsonl", "out"),
        ("**/*.jsonl", "out"),
        ("**", "a/b/out"),
        ("out/errors/part*", "out"),
    ],
)
def test_an_output_among_the_inputs_is_refused(tmp_path, pattern, output):
    with pytest.raises(JobError, match="would match the input"):
        inputs_lib.find([tmp_path / pattern], output=tmp_path / output)


def test_an_output_beside_the_inputs_is_fine(tmp_path):
    write(tmp_path, a=b"1\n")
    inputs_lib.find([tmp_path / "*.txt"], output=tmp_path / "out")


def test_a_file_that_grows_meanwhile_is_refused(tmp_path):
    write(tmp_path, a=b"1\n2\n")
    with pytest.raises(JobError, match="being written to"):
        plan_lib.make(str(tmp_path), [Input("a.txt", 2, 0)], shard_size=1, fingerprint={})


def test_changes_are_named(tmp_path):
    write(tmp_path, a=b"1\n", b=b"2\n", c=b"3\n")
    plan = make(tmp_path, 2)
    a, _, c = plan.inputs
    assert plan_lib.changes(plan, str(tmp_path), plan.inputs, FINGERPRINT) == []
    now = [a._replace(version=1), c, Input("d.txt", 1, 1)]
    assert plan_lib.changes(plan, str(tmp_path), now, {**FINGERPRINT, "seed": 4}) == [
        "seed was 3, is 4",
        f"input {tmp_path / 'a.txt'} was modified",
        f"input {tmp_path / 'b.txt'} was removed",
        f"input {tmp_path / 'd.txt'} was added",
    ]
    assert plan_lib.changes(plan, str(tmp_path / "x"), plan.inputs, FINGERPRINT) == [
        f"the inputs' root was {tmp_path}, is {tmp_path / 'x'}"
    ]
