"""`Generate` and `JaxModelHandler` in pipelines of one's own: what the engine says, whatever runs them."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import clusters
import core
import pipelines
import serve_batch
from serve_batch import host, runners

with runners.quiet():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.transforms.window import FixedWindows, TimestampedValue

SAMPLED = core.Sampling(max_new_tokens=6, temperature=0.9, top_k=40, seed=3)
DIRTY: list[Any] = [
    *({"prompt": ""}, {"text": "no prompt"}, {"prompt": "x" * 99, "id": "long"}, 17),
    {"prompt": "a", "temperature": -1},
]
ROWS: list[Any] = [
    DIRTY[i // 20 % 5]
    if i % 20 == 11
    else {"prompt": f"Prompt {i * 7919 % 1000}", "id": i, "kept": [i]}
    for i in range(120)
]


_WITH_TESTS = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[int, list[int]]:
    """The tokens of each row that can be served, from the engine itself."""
    engine = core.Engine(*core.load(model), slots=4)
    rows = [row for row in ROWS if isinstance(row, dict) and isinstance(row.get("id"), int)]
    requests = [core.Request(row["prompt"], SAMPLED, id=str(row["id"])) for row in rows]
    return {
        row["id"]: list(completion.tokens)
        for row, completion in zip(rows, engine.complete(requests), strict=True)
        if isinstance(completion, core.Completion)
    }


def generate(
    model: Path, folder: Path, runner: str | None = None, options: list[str] | None = None
) -> tuple[dict[str, list[list[Any]]], Any]:
    """Returns what comes out of `.ok` and `.failed`, each with its time and window, and the pipeline's result."""
    folder.mkdir()
    with runners.quiet():
        engine, settings = runners.local() if runner is None else (runner, PipelineOptions(options))
        with beam.Pipeline(runner=engine, options=settings) as pipeline:
            results: Any = (
                pipeline
                | beam.Create([(i, row) for i, row in enumerate(ROWS)])
                | beam.Map(lambda row: TimestampedValue(row, row[0]))
                | beam.WindowInto(FixedWindows(50))
                | serve_batch.Generate(model, sampling=SAMPLED, slots=4)
            )
            _ = results.ok | "ok" >> beam.ParDo(pipelines.Write(folder, "ok"))
            _ = results.failed | "failed" >> beam.ParDo(pipelines.Write(folder, "failed"))
    said: dict[str, list[list[Any]]] = {"ok": [], "failed": []}
    for name, *rest in pipelines.written(folder):
        said[name].append(rest)
    return said, pipeline.result


def check(said: dict[str, list[list[Any]]], expected: dict[int, list[int]]) -> None:
    """Every row came out once, on its side, at its time and in its window, with what the engine says."""
    ok = sorted(said["ok"])
    assert [key for (key, _), _, _ in ok] == sorted(expected)
    assert {key: record["token_ids"] for (key, record), _, _ in ok} == expected
    assert all(record["input"] == {"kept": [key]} for (key, record), _, _ in ok)
    failed = {key: record["error"]["code"] for (key, record), _, _ in said["failed"]}
    codes = ["prompt_empty", "prompt_missing", "prompt_too_long", "not_an_object", "bad_parameter"]
    assert failed == {11 + 20 * i: codes[i % 5] for i in range(6)}
    for (key, _), timestamp, window in [*ok, *said["failed"]]:
        assert (timestamp, window) == (key, key // 50 * 50)


def test_rows_go_on_with_their_time_and_window_and_are_counted(model, expected, tmp_path):
    said, result = generate(model, tmp_path / "out")
    check(said, expected)
    counters = result.metrics().query()["counters"]
    counted = {
        c.key.metric.name: c.committed for c in counters if c.key.metric.namespace == "serve_batch"
    }
    assert (counted["rows"], counted["errors"], counted["errors.prompt_empty"]) == (120, 6, 2)
    assert counted["completion_tokens"] == sum(map(len, expected.values()))
    (spread,) = result.metrics().query()["distributions"]
    assert (spread.committed.count, spread.committed.max) == (114, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "options"),
    [
        ("FnApiRunner", ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]),
        ("BundleBasedDirectRunner", []),
        ("PortableRunner", ["--job_endpoint=embed", "--environment_type=LOOPBACK"]),
    ],
)
def test_another_runner_gives_the_same(model, expected, tmp_path, runner, options):
    said, _ = generate(model, tmp_path / "out", runner, options)
    check(said, expected)


@pytest.mark.slow
def test_a_worker_pool_gives_the_same(model, expected, tmp_path):
    with clusters.worker_pool(tmp_path, PYTHONPATH=_WITH_TESTS) as address:
        options = ["--job_endpoint=embed", "--environment_type=EXTERNAL"]
        said, _ = generate(
            model, tmp_path / "out", "PortableRunner", [*options, f"--environment_config={address}"]
        )
    check(said, expected)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Any, list[Any]], list[Any]]:
    """Returns what the local runner makes of rows in one bundle."""

    def call(transform: Any, rows: list[Any]) -> list[Any]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        with runners.quiet():
            engine, options = runners.local()
            with beam.Pipeline(runner=engine, options=options) as pipeline:
                results: Any = pipeline | beam.Create(rows, reshuffle=False) | transform
                if isinstance(results, tuple):
                    results = results | beam.Flatten()
                _ = results | beam.ParDo(pipelines.Write(folder, "all"))
        return [element for _, element, _, _ in pipelines.written(folder)]

    return call


def test_a_prompt_may_be_a_text_and_draws_by_what_it_asks(run, model):
    one = run(
        serve_batch.Generate(model, sampling=SAMPLED, slots=4), ["The flax", "mill", "The flax"]
    )
    by_tokens = sorted(tuple(record["token_ids"]) for record in one)
    again = run(serve_batch.Generate(model, sampling=SAMPLED, slots=4), ["mill", "The flax"])
    assert {tuple(record["token_ids"]) for record in again} == set(by_tokens)
    assert len(set(by_tokens)) == 2
    drawn = run(
        serve_batch.Generate(model, sampling=SAMPLED, slots=4),
        [{"prompt": "The flax", "turn": 1}, {"prompt": "The flax", "turn": 2}],
    )
    assert drawn[0]["token_ids"] != drawn[1]["token_ids"]
    assert all(record["id"] is None and "index" not in record for record in one)


def test_samples_of_one_row_come_in_one_record(run, model):
    rows = [{"prompt": "The flax", "id": "x", "n": 3}, {"prompt": "The flax", "id": "x"}]
    three, one = sorted(
        run(serve_batch.Generate(model, sampling=SAMPLED, slots=4), rows),
        key=lambda record: record["samples"] is None,
    )
    assert len({tuple(sample["token_ids"]) for sample in three["samples"]}) == 3
    assert three["token_ids"] == three["samples"][0]["token_ids"] == one["token_ids"]


def test_an_engine_that_fails_fails_the_pipeline(run, model, monkeypatch):
    def die(self: core.Engine, steps: int) -> None:
        raise MemoryError("out of device memory")

    monkeypatch.setattr(core.Engine, "_advance", die)
    with pytest.raises(Exception, match="out of device memory"):
        run(serve_batch.Generate(model, slots=4), ["a", "b"])


def test_what_cannot_be_told_apart_is_a_failed_row(model):
    handler = serve_batch.JaxModelHandler(model, slots=4, sampling=SAMPLED)
    rows = [{"prompt": "a", "at": object()}, {"prompt": "a", 3: 4}, {"prompt": "a", "at": 1}]
    results: list[Any] = handler.run_inference(rows, handler.load_model())
    codes = [(result.inference["error"] or {"code": "ok"})["code"] for result in results]
    assert codes == ["bad_id", "bad_id", "ok"]


@pytest.mark.parametrize("surface", [serve_batch.Generate, serve_batch.JaxModelHandler])
@pytest.mark.parametrize("wrong", [{"slots": 0}, {"precision": "fp4"}, {"long_prompts": "keep"}])
def test_what_cannot_be_is_said_when_the_pipeline_is_made(model, surface, wrong):
    with pytest.raises(serve_batch.UsageError, match=f"{next(iter(wrong))} "):
        surface(model, **wrong)


def test_run_inference_goes_on_with_another_engine_where_one_failed(model):
    handler = serve_batch.JaxModelHandler(model, slots=4, sampling=SAMPLED)
    engine = handler.load_model()
    engine.close()
    call = engine.call()
    call.ask(0, core.Request("a", SAMPLED))
    with pytest.raises(serve_batch.JobError, match="closed"):
        call.take()
    results: list[Any] = handler.run_inference(["a"], engine)
    assert [result.inference["status"] for result in results] == ["ok"]


def test_the_pipeline_s_model_is_the_worker_s(run, model, monkeypatch):
    transform = serve_batch.Generate(model, slots=4)
    monkeypatch.setattr("serve_batch.plan.code_version", lambda package: "9.9.9")
    with pytest.raises(Exception, match=r"this worker imports core 9\.9\.9"):
        run(transform, ["a"])


def steps() -> int:
    """How many steps the engine of this process has made."""
    assert host._current is not None
    return host._current[1]._engine.counters.steps


def test_run_inference_gives_the_same_in_more_than_twice_the_steps(run, model):
    """With lengths as prompts have them, most short and some long; steps are counted, not seconds."""
    inference = pytest.importorskip("apache_beam.ml.inference.base")
    rows = [
        {
            "prompt": f"Prompt {i}",
            "id": i,
            "max_new_tokens": 50 if i * 7 % 8 == 3 else 3,
            "ignore_eos": True,
        }
        for i in range(256)
    ]
    rows[100]["prompt"] = ""
    ideal = sum(row["max_new_tokens"] for row in rows if row["prompt"]) / 4
    streaming = {
        r["id"]: r for r in run(serve_batch.Generate(model, sampling=SAMPLED, slots=4), rows)
    }
    streamed = steps()
    handler = serve_batch.JaxModelHandler(model, sampling=SAMPLED, slots=4, batch_size=4)
    batches = run(inference.RunInference(handler) | beam.Map(lambda result: result.inference), rows)
    batched = steps() - streamed
    assert {record["id"]: record for record in batches} == streaming
    assert [record["id"] for record in batches if record["error"]] == [100]
    assert ideal / streamed >= 0.95
    assert batched >= 2 * streamed
