"""Two runs side by side: what has changed, and what is noise."""

import json

import pytest

from bench import __main__ as command
from bench import compare
from bench.peers.contestants import OURS
from core import door


def row(workload, contestant, *, figure=None, speedup=None, unit="tokens/s"):
    def spread(values):
        return values and dict(zip(("value", "low", "high"), values, strict=True))

    return {
        "workload": {"name": workload},
        "contestant": contestant,
        "unit": unit,
        "figure": spread(figure),
        "speedup": spread(speedup),
    }


def results(*rows, cpu="one"):
    return {"date": "today", "command": "bench", "machine": {"cpu": cpu}, "rows": list(rows)}


def outcome(before, after):
    (found,) = compare.changes(results(before), results(after))
    return found.outcome


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "faster"),
        ((1.3, 1.2, 1.4), (1.0, 0.9, 1.1), "slower"),
        ((1.0, 0.9, 1.1), (1.09, 1.0, 1.2), "same"),  # the middle halves overlap
        ((1.0, 0.999, 1.001), (1.01, 1.009, 1.011), "same"),  # certain, and nothing to speak of
    ],
)
def test_a_change_is_what_noise_does_not_explain(before, after, expected):
    assert outcome(row("w", "peer", speedup=before), row("w", "peer", speedup=after)) == expected


def test_ratios_to_peers_stand_for_our_own_figure_where_there_are_any():
    ours_before, ours_after = (row("w", OURS, figure=(x, x, x)) for x in (100, 50))
    peer = row("w", "peer", speedup=(2, 2, 2))
    found = compare.changes(results(ours_before, peer), results(ours_after, peer))
    # We took twice as long, and so did the peer: the machine was slower.
    assert [(c.against, c.outcome) for c in found] == [("peer", "same")]
    assert outcome(ours_before, ours_after) == "slower"


def test_fewer_seconds_are_faster():
    before, after = (row("w", OURS, figure=(x, x, x), unit="ms") for x in (30, 20))
    (found,) = compare.changes(results(before), results(after))
    assert (found.outcome, found.factor) == ("faster", pytest.approx(1.5))


def test_what_only_one_run_has_is_told():
    old, new = row("w", "peer", speedup=(1, 1, 1)), row("v", "peer", speedup=(1, 1, 1))
    found = compare.changes(results(old), results(new))
    assert [(c.workload, c.outcome) for c in found] == [("v", "new"), ("w", "gone")]


def test_a_name_in_brackets_is_no_markup(capsys):
    run = results(row("decode[/b]", "peer", speedup=(2, 1.9, 2.1))) | {"command": "bench [a-z]"}
    compare.show(run, run)
    shown = capsys.readouterr().out
    assert "decode[/b]" in shown
    assert "bench [a-z]" in shown


def test_the_table_names_both_runs_and_other_processors(capsys):
    peer = row("decode", "peer", speedup=(2, 1.9, 2.1))
    compare.show(results(peer), results(peer, cpu="other"))
    shown = capsys.readouterr().out
    for text in ("2.00x (1.90-2.10)", "Not the same processor", "1 same", "bench, today, other"):
        assert text in shown


NOTHING_IN_NO_TIME = json.dumps(results(row("a", OURS, figure=(0, 0, 0), unit="s")))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": [1]}', '{"rows": []}', "[" * 100_000, NOTHING_IN_NO_TIME]
)
def test_a_file_without_results_is_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(compare.CompareError, match=r"results\.json is no results\.json"):
        compare.read(path)


def test_compare_takes_two_files(monkeypatch):
    monkeypatch.setattr(command, "_COMPARE", type("Flag", (), {"value": ["one.json"]}))
    with pytest.raises(door.Usage, match="takes two files"):
        command.main()


def test_a_written_report_can_be_compared(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(row("w", "peer", speedup=(1, 1, 1)))))
    assert compare.changes(compare.read(path), compare.read(path))[0].outcome == "same"
