"""The input files: formats, compression, Parquet, and what is wrong with them."""

import bz2
import datetime
import decimal
import gzip
import importlib.util
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from core import Sampling
from serve_batch import inputs, shards, stores
from serve_batch import plan as plan_lib
from serve_batch.errors import JobError, Unreachable, UsageError
from serve_batch.plan import Plan
from serve_batch.records import Conversation, Prompt, RowError
from serve_batch.shards import Row

DEFAULTS = Sampling()
CHECKED = {"write_page_checksum": True, "write_statistics": False}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
LINES = b"".join(b'{"prompt": "line %d"}\n' % i for i in range(999)) + b'{"prompt": "the last"}'


def plan_of(place: Path | str, shard_size: int = 100, output: Path | str = "/nowhere/out") -> Plan:
    root, found = inputs.find([place], output=output)
    return plan_lib.make(root, found, shard_size=shard_size, fingerprint={"output_format": "jsonl"})


def rows_of(plan: Plan) -> list[Row]:
    return [row for shard in plan.shards for row in shards.read(plan, shard, DEFAULTS)]


def prompts_of(plan: Plan) -> list[Any]:
    contents = [row.content for row in rows_of(plan)]
    return [c.prompt if isinstance(c, Prompt) else c.code for c in contents]


@pytest.fixture
def write_table(tmp_path) -> Callable[..., Path]:
    def write(columns: Any, **options: Any) -> Path:
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(table, tmp_path / "a.parquet", **options)
        return tmp_path / "a.parquet"

    return write


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_compressed_file_has_the_rows_of_what_it_holds(tmp_path, codec):
    for name, content in (("plain", LINES), ("packed", COMPRESS[codec](LINES))):
        (tmp_path / name).mkdir()
        (tmp_path / name / (f"a.jsonl.{codec}" if name == "packed" else "a.jsonl")).write_bytes(
            content
        )
    plain, packed = (plan_of(tmp_path / name) for name in ("plain", "packed"))
    assert plain.shards == packed.shards
    assert [row.content for row in rows_of(packed)] == [row.content for row in rows_of(plain)]
    assert [row.source[1:] for row in rows_of(packed)] == [row.source[1:] for row in rows_of(plain)]


def test_several_members_one_after_the_other_are_one_file(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntw") + gzip.compress(b"o\nthree\n"))
    assert prompts_of(plan_of(tmp_path)) == ["one", "two", "three"]


@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("damage", ["cut off", "not compressed", "goes on", "flipped"])
def test_a_damaged_stream_is_found_before_there_is_work_to_lose(tmp_path, codec, damage):
    whole = COMPRESS[codec](LINES)
    middle = len(whole) // 2
    content = {
        "cut off": whole[:-3],
        "not compressed": LINES,
        "goes on": whole + b"and more",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
    }[damage]
    if (codec, damage) == ("xz", "goes on"):
        pytest.skip("the format allows what follows")
    (tmp_path / f"a.txt.{codec}").write_bytes(content)
    with pytest.raises(JobError, match=rf"cannot read input .*a\.txt\.{codec}: \w+"):
        plan_of(tmp_path)


def test_a_job_reads_a_compressed_file_once_and_not_once_a_shard(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    plan = plan_of(tmp_path, shard_size=10)
    opened: list[str] = []
    open_ = stores.Local.open
    monkeypatch.setattr(
        stores.Local, "open", lambda self, name: opened.append(name) or open_(self, name)
    )
    in_order = rows_of(plan)
    assert (len(plan.shards), len(in_order), len(opened)) == (100, 1000, 1)
    backwards = [list(shards.read(plan, shard, DEFAULTS)) for shard in plan.shards[::-1]]
    assert [row for rows in backwards[::-1] for row in rows] == in_order
    inputs.idle.close()


def test_of_files_that_are_open_between_shards_there_are_few(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt.gz").write_bytes(gzip.compress(b"a\nb\n"))
    plan = plan_of(tmp_path, shard_size=1)
    assert len(rows_of(plan)) == 40
    assert len(inputs.idle._cursors) == inputs._IDLE
    inputs.idle.close()
    assert inputs.idle._cursors == []


def test_a_folder_stands_for_the_files_in_it_that_can_be_read(tmp_path):
    (tmp_path / "deeper").mkdir()
    for name in ("b.txt", "a.jsonl", "_SUCCESS", ".a.txt", "_b.txt", "notes.md", "deeper/c.txt"):
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"y\n"))
    root, found = inputs.find([tmp_path], output=tmp_path / "out")
    assert (root, [i.name for i in found]) == (str(tmp_path), ["a.jsonl", "b.txt", "c.txt.gz"])


@pytest.mark.slow
def test_ten_thousand_tiny_files_are_one_job(tmp_path):
    for i in range(10_000):
        (tmp_path / f"{i:05d}.txt").write_bytes(b"prompt %d\n" % i)
    plan = plan_of(tmp_path, shard_size=1024)
    assert (len(plan.inputs), len(plan.shards), plan.rows) == (10_000, 10, 10_000)
    assert prompts_of(plan) == [f"prompt {i}" for i in range(10_000)]


def test_empty_files_have_no_rows(tmp_path, write_table):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    write_table({"prompt": pa.array([], pa.string())})
    assert plan_of(tmp_path).rows == 0


def test_a_row_of_parquet_is_the_row_of_json_with_the_same_fields(tmp_path, write_table):
    rows = [
        {"id": 7, "prompt": "a", "temperature": 0.5, "stop": ["x", "y"], "label": {"gold": [1.5]}},
        {"id": 8, "prompt": "b", "temperature": None, "stop": None, "label": None},
    ]
    path = write_table(pa.Table.from_pylist(rows))
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet, jsonl = plan_of(path), plan_of(lines)
    assert [r.content for r in rows_of(parquet)] == [r.content for r in rows_of(jsonl)]
    assert [tuple(r.source) for r in rows_of(parquet)] == [("a.parquet", 0, 1), ("a.parquet", 1, 2)]


def test_conversations_lose_the_nulls_that_parquet_had_to_write(write_table):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "name": "b"}]
    tools = [{"name": "f", "strict": True}, {"name": "g", "parameters": {"type": "object"}}]
    (row,) = rows_of(
        plan_of(write_table(pa.Table.from_pylist([{"messages": talk, "tools": tools}])))
    )
    assert isinstance(row.content, Prompt)
    assert row.content.prompt == Conversation(talk, tools)


def test_types_that_json_has_not_are_spelled_out(write_table):
    noon = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
    path = write_table(
        {
            "prompt": pa.array([b"bytes"], pa.binary()),
            "day": [noon.date()],
            "noon": pa.array([noon], pa.timestamp("ns", "UTC")),
            "price": [decimal.Decimal("1.10")],
            "kind": pa.array(["k"]).dictionary_encode(),
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
            "times": pa.array([[noon]], pa.list_(pa.timestamp("s"))),
            "large": pa.array([2**64 - 1], pa.uint64()),
            "nothing": pa.nulls(1),
        }
    )
    (row,) = rows_of(plan_of(path))
    assert row.content == Prompt(
        prompt="bytes",
        sampling=DEFAULTS,
        input={
            "day": "2026-01-02",
            "noon": "2026-01-02 12:00:00.000000000Z",
            "price": "1.10",
            "kind": "k",
            "map": {"a": 1},
            "times": ["2026-01-02 12:00:00.000"],
            "large": 2**64 - 1,
            "nothing": None,
        },
    )


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([b"\xff", None, b"ok"]), "bytes that are not UTF-8"),
        (pa.array([float("nan"), None, 1.5]), "nan is not a JSON number"),
        (pa.array([[1.0, float("inf")], None, []]), "inf is not a JSON number"),
        (pa.array([[(1, 2)], None, []], pa.map_(pa.int64(), pa.int64())), "keys that are strings"),
        (pa.array([{"x": b"\xff"}, None, {"x": b""}]), "bytes that are not UTF-8"),
        (pa.array([b"\xff", None, b"ok"], pa.binary_view()), "bytes that are not UTF-8"),
        (pa.array([[float("nan")], None, []], pa.list_view(pa.float64())), "nan is not a JSON"),
    ],
)
def test_a_value_that_cannot_be_json_makes_an_error_of_its_row_alone(write_table, column, told):
    path = write_table({"id": ["a", "b", "c"], "prompt": ["x", "y", "z"], "odd": column})
    bad, *good = (row.content for row in rows_of(plan_of(path)))
    assert isinstance(bad, RowError)
    assert (bad.code, bad.id) == ("bad_column", "a")
    assert f"column 'odd': {told}" in bad.message or told in bad.message
    assert all(isinstance(content, Prompt) for content in good)


def test_a_parquet_file_is_read_by_rows_wherever_its_groups_end(write_table):
    path = write_table({"prompt": [f"row {i}" for i in range(1000)]}, row_group_size=70)
    plan = plan_of(path, shard_size=33)
    assert prompts_of(plan) == [f"row {i}" for i in range(1000)]
    for shard in (plan.shards[20], plan.shards[3], plan.shards[29]):
        first, *_ = rows = list(shards.read(plan, shard, DEFAULTS))
        assert first.content == Prompt(f"row {shard.first_row}", DEFAULTS)
        assert len(rows) == shard.rows
    inputs.idle.close()


def test_parquet_files_that_cannot_be_used_are_found_at_planning(tmp_path, write_table):
    prompts = [f"{i * 7919}" for i in range(5000)]
    path = write_table({"prompt": prompts}, compression="none", use_dictionary=False, **CHECKED)
    plain = path.read_bytes()
    path = write_table({"prompt": prompts}, **CHECKED)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    five_thousand, one_more = b"\x90\x4e", b"\x92\x4e"  # as Thrift spells them
    assert five_thousand in whole[footer:]
    half = len(whole) // 3
    for content in (
        b"PAR1",
        b"no Parquet at all",
        plain.replace(b"15838000", b"15838001"),
        whole[:footer] + whole[footer:].replace(five_thousand, one_more, 1),
        whole[:-9],
        whole[:half] + bytes(255 - byte for byte in whole[half : half + 99]) + whole[half + 99 :],
    ):
        path.write_bytes(content)
        with pytest.raises(JobError, match=r"cannot read input .*a\.parquet: "):
            plan_of(path)
    write_table({"text": ["a"], "label": [1]})
    with pytest.raises(
        JobError, match="none of the columns prompt, messages, token_ids; it has text"
    ):
        plan_of(path)
    write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"]))
    with pytest.raises(JobError, match="two columns 'prompt'"):
        plan_of(path)


def test_inputs_of_two_stores_are_refused(tmp_path):
    with pytest.raises(UsageError, match="different stores"):
        inputs.find([tmp_path / "*.txt", "memory://in/*.txt"], output="/nowhere")


def test_a_store_that_nothing_installed_speaks_is_named_with_its_extra():
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed here")
    with pytest.raises(UsageError, match=r"gs:// needs .*flaxmill-serve-batch\[gcs\]'$"):
        inputs.find(["gs://bucket/*.jsonl"], output="/nowhere")
    with pytest.raises(UsageError, match="there is no nonsense://"):
        inputs.find(["nonsense://bucket/*.jsonl"], output="/nowhere")


@pytest.mark.parametrize("place", ["memory://in", "memory://in/*", "memory://in/**"])
def test_inputs_may_lie_in_an_object_store(place):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["three"]}), buffer)
    files = {"a.jsonl": b'{"prompt": "one"}\n', "b.txt.gz": gzip.compress(b"two\n")}
    for name, content in {**files, "c.parquet": buffer.getvalue()}.items():
        memory.pipe_file(f"/in/{name}", content)
    plan = plan_of(place)
    assert (plan.root, [i.name for i in plan.inputs]) == (
        "memory:///in",
        ["a.jsonl", "b.txt.gz", "c.parquet"],
    )
    assert prompts_of(plan) == ["one", "two", "three"]
    with pytest.raises(JobError, match="would match the input"):
        inputs.find([place], output="memory://in")
    with pytest.raises(JobError, match="no file matches memory:///other"):
        inputs.find(["memory://other/*.txt"], output="/nowhere")
    inputs.idle.close()


def test_a_column_that_is_nested_too_deeply_makes_an_error_of_a_row(write_table):
    type_, value = pa.int64(), 1
    for _ in range(600):
        type_, value = pa.struct([("a", type_)]), {"a": value}
    deep = pa.array([value, None], type_)
    path = write_table({"prompt": ["x", "y"], "z": deep}, store_schema=False)
    bad, good = (row.content for row in rows_of(plan_of(path)))
    assert isinstance(bad, RowError)
    assert bad.code == "bad_column"
    assert "nested deeper than 100" in bad.message
    assert isinstance(good, Prompt)


def as_file(suffix: str) -> bytes:
    if suffix == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["a", "b"]}), buffer)
        return buffer.getvalue()
    return LINES if suffix == "txt" else COMPRESS[suffix.removeprefix("txt.")](LINES)


class Breaking(io.BytesIO):
    """A connection that breaks off when the file was read once, from its beginning to its end."""

    breaks = False

    def readinto(self, buffer: Any) -> int:
        if Breaking.breaks:
            raise TimeoutError("no answer")
        return super().readinto(buffer)


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.xz", "parquet"])
def test_a_connection_that_breaks_is_told_from_a_file_that_is_damaged(suffix, monkeypatch):
    fs = fsspec.filesystem("memory")
    content = as_file(suffix)
    fs.pipe_file(f"/broken/a.{suffix}", content)
    monkeypatch.setattr(Breaking, "breaks", False)
    monkeypatch.setattr(type(fs), "open", lambda *_, **__: Breaking(content))
    plan = plan_of(f"memory://broken/a.{suffix}")
    monkeypatch.setattr(Breaking, "breaks", True)
    with pytest.raises(
        Unreachable, match=r"^cannot reach memory://.*/a.*: TimeoutError: no answer$"
    ):
        list(rows_of(plan))


def test_a_file_that_cannot_be_opened_may_be_the_next_time_but_not_one_that_is_gone(tmp_path):
    (tmp_path / "odd.txt").mkdir()
    for name, kind in {"odd.txt": Unreachable, "gone.txt": JobError}.items():
        with pytest.raises(JobError, match=rf"^cannot read input .*{name}: \w+") as raised:
            list(inputs.rows(stores.at(tmp_path), inputs.Input(name, 1, 0), 0, 1))
        assert type(raised.value) is kind
