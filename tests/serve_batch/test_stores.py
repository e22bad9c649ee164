"""Output below a URL: in fsspec's own stores here, and in an S3 server of this machine."""

import contextlib
import io
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

import serve_batch
from serve_batch import inputs, stores
from serve_batch import plan as plan_lib
from serve_batch.errors import JobError, Unreachable
from serve_batch.output import OutputFolder


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture(params=["memory", "local"])
def store(request, memory, tmp_path) -> stores.Store:
    places = {"memory": "memory://out", "local": f"file://{tmp_path}/out"}
    return stores.at(places[request.param])


def test_a_name_that_exists_is_whole_in_every_store(store):
    with store.writing("deep/a") as file:
        file.write(b"all of it")
        assert store.sizes("deep").get("deep/a") is None
    assert store.read("deep/a") == b"all of it"
    for name in ("deep/a", "deep/b"):
        with contextlib.suppress(ZeroDivisionError), store.writing(name) as file:
            file.write(b"half")
            raise ZeroDivisionError
    assert store.read("deep/a") == b"all of it"
    assert store.sizes("deep") == {"deep/a": 9}
    with store.writing("deep/a") as file:
        file.write(b"another")
    assert (store.read("deep/a"), store.stat("deep/a").size) == (b"another", 7)


def test_every_store_lists_reads_and_removes(store):
    assert store.sizes() == store.sizes("none") == {}
    for i in range(3):
        with store.writing(f"x/{i}") as file:
            file.write(b"%d" % i)
    assert store.sizes("x") == {"x/0": 1, "x/1": 1, "x/2": 1}
    assert list(store.read_each(["x/2", "x/0"])) == [b"2", b"0"]
    for name in ("x/1", "x/1", "y"):
        store.remove(name)
    assert sorted(store.sizes("x")) == ["x/0", "x/2"]
    with pytest.raises(FileNotFoundError):
        store.read("x/1")


def test_a_lock_has_one_holder_in_every_store(store):
    with (
        store.holding("_lock"),
        pytest.raises(JobError, match=r"another job \(process \d+ on .*\) is writing to"),
        stores.at(store.place).holding("_lock"),
    ):
        pass
    with store.holding("_lock"):
        pass
    assert store.sizes() == {}


def test_a_lock_is_seen_in_a_store_that_creates_what_is_there(memory, monkeypatch):
    """Stores that speak S3, and do not know the condition, ignore it."""
    pipe_file = type(memory).pipe_file
    monkeypatch.setattr(
        type(memory), "pipe_file", lambda self, path, value, mode: pipe_file(self, path, value)
    )
    store = stores.at("memory://out")
    with (
        store.holding("_lock"),
        pytest.raises(JobError, match="another job"),
        store.holding("_lock"),
    ):
        pass


def test_the_lock_of_a_killed_job_says_how_to_go_on(memory):
    memory.pipe_file("/out/_lock", b"process 7 on elsewhere")
    with (
        pytest.raises(JobError, match=r"process 7 on elsewhere.*remove memory:///out/_lock"),
        stores.at("memory://out").holding("_lock"),
    ):
        pass


@pytest.mark.parametrize(
    ("fails", "asked", "place"),
    [
        ("ls", lambda store: store.sizes(), "/out"),
        ("open", lambda store: store.open("a"), "/out/a"),
        ("info", lambda store: store.stat("a"), "/out/a"),
        ("cat_file", lambda store: store.read("a"), "/out/a"),
        ("cat", lambda store: list(store.read_each(["a"])), "/out"),
        ("pipe_file", lambda store: store.write("a", b""), "/out/a"),
        ("rm_file", lambda store: store.remove("a"), "/out/a"),
    ],
)
def test_a_store_that_fails_is_one_line(memory, monkeypatch, fails, asked, place):
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("no\ncredentials")

    monkeypatch.setattr(type(memory), fails, fail)
    expected = rf"^cannot reach memory://{place}: PermissionError: no credentials$"
    with pytest.raises(JobError, match=expected):
        asked(stores.at("memory://out"))


class Torn(io.RawIOBase):
    """A connection that breaks off."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise TimeoutError("no answer")


def test_a_part_that_breaks_off_is_one_line(run, write_jsonl, memory, monkeypatch):
    write_jsonl(rows(1))
    run(output="memory://out")
    folder = OutputFolder("memory://out")
    plan = folder.read_plan()
    assert plan is not None
    (receipt,) = folder.receipts(plan)
    assert receipt is not None
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: Torn())
    for read in (
        lambda: list(folder.read_part(plan, plan.shards[0])),
        lambda: folder.expect_whole(plan, plan.shards[0], receipt),
    ):
        with pytest.raises(Unreachable, match=r"^cannot reach .*part-.*TimeoutError: no answer$"):
            read()


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("place", ["memory", "local"])
def test_a_part_that_holds_no_records_is_not_one_that_cannot_be_reached(
    memory, tmp_path, write_jsonl, format, place
):
    path = write_jsonl(rows(1))
    root, found = inputs.find([path], output=tmp_path / "out")
    plan = plan_lib.make(root, found, shard_size=1, fingerprint={"output_format": format})
    folder = OutputFolder({"memory": "memory://out", "local": tmp_path / "out"}[place])
    folder.store.write(plan.part_name(plan.shards[0]), b"no record\n")
    with pytest.raises(JobError, match=r"part-.* holds what is no record \(.*remove it") as raised:
        list(folder.read_part(plan, plan.shards[0]))
    assert not isinstance(raised.value, Unreachable)


def test_a_disk_that_cannot_be_read_is_one_that_cannot_be_reached():
    """`/proc/self/mem` has nothing where it begins."""
    store = stores.at("/proc/self")
    with (
        store.open("mem") as file,
        pytest.raises(Unreachable, match=r"^cannot reach /proc/self/mem"),
    ):
        file.read(1)


def rows(count: int) -> list[Any]:
    return [{"prompt": f"Prompt {i}"} for i in range(count)]


def parts_of(fs: Any, folder: str) -> dict[str, bytes]:
    return {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.glob(f"{folder}/part-*")}


def test_a_job_below_a_url_is_the_job_in_a_folder(run, write_jsonl, memory, tmp_path):
    path = write_jsonl([*rows(40), b"bad"])
    memory.pipe_file("/in/prompts.jsonl", path.read_bytes())
    run()
    here = {part.name: part.read_bytes() for part in (tmp_path / "out").glob("part-*")}
    manifest = run(input="memory://in", output="memory://out")
    assert parts_of(memory, "/out") == here
    assert run(input="memory://in", output="memory://out")["shards_done"] == 0
    memory.rm_file("/out/_receipts/00001.json")
    memory.rm_file("/out/part-00002-of-00003.jsonl")
    assert run(input="memory://in", output="memory://out")["shards_done"] == 2
    assert parts_of(memory, "/out") == here
    assert json.loads(memory.cat_file("/out/manifest.json"))["parts"] == manifest["parts"]
    names = {name.rpartition("/")[2] for name in memory.find("/out")}
    assert "_SUCCESS" in names
    assert not [name for name in names if "tmp" in name or name == "_lock"]
    with pytest.raises(JobError, match="slots was 4, is 8"):
        run(input="memory://in", output="memory://out", slots=8)
    again = run(
        input="memory://in", output="memory://out", retry_errors=True, long_prompts="truncate_left"
    )
    assert (again["shards_done"], parts_of(memory, "/out")) == (1, here)
    assert run(input="memory://in", output="memory://out", slots=8, overwrite=True)["rows"] == 41


def test_a_job_that_fails_leaves_no_part_below_a_url(run, write_jsonl, memory, monkeypatch):
    write_jsonl(rows(40))
    write_errors, calls = OutputFolder.write_errors, []

    def full(self: OutputFolder, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write_errors(self, *arguments)

    monkeypatch.setattr(OutputFolder, "write_errors", full)
    with pytest.raises(JobError, match="No space left"):
        run(output="memory://out")
    assert list(parts_of(memory, "/out")) == ["part-00000-of-00003.jsonl"]
    with contextlib.suppress(FileNotFoundError):
        assert not memory.exists("/out/_SUCCESS")
    assert run(output="memory://out")["shards_done"] == 2


def forget_stores() -> None:
    """Lets the next one read its environment."""
    stores._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    server_lib = pytest.importorskip("moto.server", reason="there is no S3 server to start")
    pytest.importorskip("s3fs")
    server = server_lib.ThreadedMotoServer(port=0, verbose=False)
    server.start()  # what is in it belongs to the process
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    forget_stores()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    fsspec.filesystem("s3").mkdir("flax")
    yield "s3://flax"
    server.stop()
    forget_stores()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow")
def test_a_job_from_s3_to_s3_is_the_job_in_a_folder(run, write_jsonl, bucket, tmp_path):
    path = write_jsonl([*rows(40), b"bad"])
    s3 = fsspec.filesystem("s3")
    s3.pipe_file("flax/in/prompts.jsonl", path.read_bytes())
    run()
    here = {part.name: part.read_bytes() for part in (tmp_path / "out").glob("part-*")}
    for source in ("in", "in/*.jsonl", "in/prompts.jsonl"):
        run(input=f"{bucket}/{source}", output=f"{bucket}/out")
    s3.invalidate_cache()
    assert parts_of(s3, "flax/out") == here
    s3.rm_file("flax/out/_receipts/00001.json")
    assert run(input=f"{bucket}/in", output=f"{bucket}/out")["shards_done"] == 1
    s3.invalidate_cache()
    assert parts_of(s3, "flax/out") == here
    assert s3.exists("flax/out/_SUCCESS")
    with (
        stores.at(f"{bucket}/out").holding("_lock"),
        pytest.raises(JobError, match="another job"),
    ):
        run(input=f"{bucket}/in", output=f"{bucket}/out")
    parquet = run(input=f"{bucket}/in", output=f"{bucket}/p", output_format="parquet")
    assert parquet["rows"] == 41


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow")
def test_an_upload_of_several_parts_appears_at_its_end_and_not_if_it_fails(bucket):
    store = stores.at(f"{bucket}/big")
    block = bytes(range(256)) * (1 << 14)
    with contextlib.suppress(ZeroDivisionError), store.writing("a") as file:
        for _ in range(16):  # 64 MiB, more than s3fs sends at once
            file.write(block)
        raise ZeroDivisionError
    assert store.sizes() == {}
    with store.writing("a") as file:
        for _ in range(16):
            file.write(block)
        assert store.sizes() == {}
    assert store.sizes() == {"a": 16 * len(block)}
    s3 = fsspec.filesystem("s3")
    assert not s3.call_s3("list_multipart_uploads", Bucket="flax").get("Uploads")


def test_a_bucket_that_cannot_be_reached_ends_the_job_with_one_line(run, write_jsonl, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_stores()
    write_jsonl(rows(2))
    with pytest.raises(serve_batch.JobError, match=r"^cannot reach s3://nowhere"):
        run(output="s3://nowhere/out")
    forget_stores()
