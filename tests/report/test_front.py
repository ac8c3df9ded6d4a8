"""The front of a sweep in the report: drawn, in words, in a table, and with nothing finished yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnpress.records.reading import RecordError, to_json
from attnpress.records.sweep import SweepRecord, TrialRecord, pareto_front
from attnpress.report.page import make_report


def trial(number: int, metric: float, work: float) -> TrialRecord:
    return TrialRecord(number, "complete", "8/8/8/4 bits, topk", {}, metric, work, 0.9, {}, {}, f"trials/{number}")


TRIALS = [
    trial(0, 80.5, 0.031), trial(1, 71.25, 0.0125), trial(2, 78.0, 0.04),
    TrialRecord(3, "pruned", "2/2/2/2 bits, topk", {}, None, None, None, {"8": 50.0}, {}, "trials/3"),
]  # fmt: skip


def write(folder: Path, trials: list[TrialRecord]) -> Path:
    folder.mkdir(exist_ok=True)
    record = SweepRecord("movie", "accuracy", 82.9, 50.0, {"seed": 0}, {"trials": 4}, trials, pareto_front(trials))
    (folder / "sweep.json").write_text(to_json(record), encoding="utf-8")
    return folder


def test_the_front_is_drawn_and_said(tmp_path: Path) -> None:
    report = make_report([write(tmp_path / "sweep", TRIALS)])
    assert list(report.figures) == ["front-1.svg"]
    svg = report.figures["front-1.svg"]
    assert "accuracy (points)" in svg
    assert "trial 1: 71.25 at 1.25% of the bit operations" in svg
    assert "trial 0: 80.50 at 3.10% of the bit operations" in svg
    assert "trial 2:" not in svg, "trial 0 beats it"
    assert "4 trials: 3 complete, 1 pruned, 0 failed; 2 that no other beats" in report.html
    assert "movie, a sweep of 4 trials: 2 that no other beats, from 71.25 at 1.25%" in report.html
    assert "Speed" not in report.html


def test_a_sweep_stands_beside_runs(tmp_path: Path, finished: Path) -> None:
    report = make_report([finished, write(tmp_path / "sweep", TRIALS)])
    assert {"front-1.svg", "metric-1.svg"} <= set(report.figures)


def test_a_sweep_with_nothing_finished_says_so(tmp_path: Path) -> None:
    report = make_report([write(tmp_path / "sweep", TRIALS[3:])])
    assert report.figures == {}
    assert "No trial has come to its end yet" in report.html


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "trials": [1]}', '{"format": 9}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=r"sweep.json: "):
        make_report([tmp_path])
