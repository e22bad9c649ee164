import dataclasses
import json

import pytest

from bench import gate, report, run
from bench.driver import Row, Shared
from bench.peers.contestants import OURS
from bench.peers.protocol import Usage
from bench.workloads import CI

FORWARD, DECODE, TRAIN, OPEN, CONVERT = (
    next(w for w in CI if w.kind == kind)
    for kind in ("forward", "decode", "train", "open", "convert")
)


def turns(*seconds: float) -> tuple[tuple[float, ...], ...]:
    return tuple((s, s) for s in seconds)


def row(workload, contestant: str, **values) -> Row:
    return Row(**{"workload": workload, "contestant": contestant, "status": "measured"} | values)


ROWS = (
    row(FORWARD, OURS, turns=turns(0.001, 0.0011, 0.0012), first_call_s=0.5, difference=0.0),
    row(
        FORWARD,
        "torch eager",
        turns=turns(0.002, 0.0033, 0.0024),
        first_call_s=0.1,
        difference=2e-6,
    ),
    row(FORWARD, "torch.compile", status="failed", reason="exited with 1: no C++ compiler"),
    row(DECODE, OURS, turns=turns(0.064, 0.064, 0.064), first_call_s=1.5, difference=0.0),
    row(DECODE, "HF generate", turns=turns(0.032, 0.032, 0.032), first_call_s=0.2, difference=0.0),
    row(TRAIN, OURS, turns=turns(0.04, 0.04, 0.04), first_call_s=1.5, difference=0.0),
    row(TRAIN, "torch eager", status="wrong", reason="losses[1] is 4.5 instead of 4.2"),
    row(OPEN, OURS, status="failed", reason="killed by SIGKILL"),
    row(
        OPEN,
        "torch eager",
        status="not run",
        reason="torch is not installed (make bench builds .venv-peers)",
    ),
)


@pytest.fixture
def found() -> report.Report:
    thresholds = [
        gate.Threshold("forward-.*", "torch eager", 1.5),
        gate.Threshold("decode-.*", "HF generate", 0.9),
        gate.Threshold("open-.*", "torch eager", 0.9),
    ]
    return report.Report(
        suite="ci",
        command="python -m bench --suite=ci",
        date="2026-11-21T00:00:00Z",
        machine={
            "cpu": "A CPU",
            "threads": 2,
            "memory_gib": 24.0,
            "system": "Linux",
            "python": "3.11",
        },
        versions={
            OURS: {"jax": "0.10.2"},
            "torch eager": {"torch": "2.15"},
            "HF generate": {"torch": "2.15"},
        },
        ceilings={
            OURS: {"gemm_float32_flops_per_s": 4e11, "read_bytes_per_s": 3e10},
            "torch eager": {"gemm_float32_flops_per_s": 2e11, "read_bytes_per_s": 4e10},
        },
        rows=ROWS,
        verdicts=gate.judge(ROWS, thresholds),
    )


def test_the_files_are_complete_and_nothing_else_stays(found, tmp_path):
    paths = report.write(found, tmp_path)
    assert {p.name for p in paths} == {p.name for p in tmp_path.iterdir()}
    pictures = {"results.png", "roofline.png"}
    assert {p.name for p in paths} == {"results.json", "results.md"} | pictures
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n") for name in pictures)


def test_times_at_several_lengths_are_drawn_and_a_picture_of_another_run_does_not_stay(
    found, tmp_path
):
    longer = dataclasses.replace(FORWARD, name="longer", length=2 * FORWARD.length)
    more = (*ROWS, row(longer, OURS, turns=turns(0.002, 0.002, 0.002)))
    paths = report.write(dataclasses.replace(found, rows=more), tmp_path)
    assert tmp_path / "latency.png" in paths
    page = (tmp_path / "results.md").read_text()
    assert "(latency.png)" in page
    assert "(roofline.png)" in page
    report.write(found, tmp_path)
    assert not (tmp_path / "latency.png").exists()
    assert "(latency.png)" not in (tmp_path / "results.md").read_text()


def test_json_holds_every_sample_every_reason_and_the_circumstances(found, tmp_path):
    report.write(found, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["turns"] for r in results["rows"]] == [[list(t) for t in r.turns] for r in ROWS]
    assert [r["reason"] for r in results["rows"]] == [r.reason for r in ROWS]
    assert results["versions"]["torch eager"] == {"torch": "2.15"}
    assert results["command"] == "python -m bench --suite=ci"
    assert results["rows"][1]["speedup"]["value"] == pytest.approx(2.0)
    assert results["rows"][4]["figure"]["value"] == pytest.approx(8 * 32 / 0.032)
    assert {v["outcome"] for v in results["gate"]} == {"passed", "failed", "not judged"}


def test_markdown_shows_every_row_and_every_reason(found):
    page = report.markdown(found)
    for contestant in (OURS, "torch eager", "torch.compile", "HF generate"):
        assert contestant in page
    assert all(r.reason in page for r in ROWS)
    assert "0.50x (0.50-0.50)" in page
    assert "8,000 tokens/s" in page
    assert "**" + FORWARD.name + "**" in page


def test_the_share_of_the_limit_uses_the_best_ceiling_of_all(found):
    (phase,) = FORWARD.phases()
    assert found.share_of_limit(ROWS[0]) == pytest.approx(phase.flops / 4e11 / 0.0011)
    assert found.share_of_limit(ROWS[2]) is None


def test_the_limits_are_the_best_of_every_look_and_a_contestant_lost_meanwhile_keeps_its_first():
    before = {"a": {"gemm": 3.0, "read": 1.0}, "b": {"gemm": 1.0, "read": 1.0}}
    after = {"a": {"gemm": 2.0, "read": 5.0}}
    assert run.best([before, after]) == {"a": {"gemm": 3.0, "read": 5.0}, "b": before["b"]}


def test_there_is_no_speedup_where_either_has_no_figure(found):
    assert [found.speedup(r) is not None for r in ROWS] == [
        False, True, False, False, True, False, False, False, False,
    ]  # fmt: skip


def test_disagreement_our_own_breakage_and_the_gate_fail_the_command_but_a_broken_peer_does_not(
    found,
):
    assert found.failures == [
        f"{TRAIN.name}: torch eager wrong: losses[1] is 4.5 instead of 4.2",
        f"{OPEN.name}: {OURS} failed: killed by SIGKILL",
        f"{DECODE.name}: 0.50x (0.50-0.50), asked for at least 0.9x of HF generate",
    ]


def test_the_terminal_shows_what_ran_what_did_not_and_the_verdict(found, capsys):
    report.show(found)
    shown = capsys.readouterr().out
    for text in (
        FORWARD.name,
        "0.50x",
        "torch is not installed",
        "no C++ compiler",
        "1 failed",
        "flaxmill 400, torch eager 200 GFLOP/s",
    ):
        assert text in shown


def test_a_busy_machine_is_said_to_be_one(found):
    assert "BUSY" not in report.markdown(found)
    rows = (dataclasses.replace(ROWS[0], neighbours=0.4), *ROWS[1:])
    page = report.markdown(dataclasses.replace(found, rows=rows))
    assert "others used up to 40%" in page
    assert "on a busy machine" in page


def test_work_in_processes_of_its_own_tells_memory_whole_commands_sharing_and_the_disk(found):
    def usage(command_s: float, peak_mb: int, disk_bytes: int = 0) -> Usage:
        return Usage(
            seconds=1.0,
            command_s=command_s,
            idle_bytes=10**7,
            peak_bytes=10**7 + peak_mb * 10**6,
            disk_bytes=disk_bytes,
        )

    rows = (
        row(
            CONVERT,
            OURS,
            turns=turns(1.0, 1.0),
            usages=(usage(1.5, 61), usage(2.5, 84)),
            shared=Shared(400_000_000, 200_000_000),
        ),
        row(
            CONVERT,
            "transformers",
            turns=turns(2.0, 2.0),
            usages=(usage(8.0, 700, 3 * 10**8),),
        ),
    )
    page = report.markdown(dataclasses.replace(found, rows=rows))
    assert "| 84 MB |" in page
    assert "included: flaxmill 2 s, transformers 8 s (4.00x)" in page
    assert f"{OURS} has 400 MB of it alone, 200 MB in each of two processes" in page
    assert "transformers had 0.3 GB from the disk, not from the cache" in page
    assert "flaxmill had" not in page


def test_a_report_without_any_measurement_can_be_written(found, tmp_path):
    nothing = [row(OPEN, OURS, status="failed", reason="killed by SIGKILL")]
    report.write(
        dataclasses.replace(found, rows=nothing, ceilings={}, versions={}, verdicts=[]), tmp_path
    )
    assert "killed by SIGKILL" in (tmp_path / "results.md").read_text()
