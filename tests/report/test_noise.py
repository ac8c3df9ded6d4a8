"""The noise band of a score: one standard error from the number of rows, on every axis of scores."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from attnpress.records.leaderboard import read_board
from attnpress.report.figures import dense_noise
from attnpress.report.inputs import group_runs, read_run
from attnpress.report.leaderboard import board_figure
from attnpress.report.noise import WATCHED_ROWS, standard_error
from attnpress.report.plots import Band, Line, curves, front, metric_against_sparsity
from attnpress.training import progress

RECORDS = Path(__file__).parents[2] / "records"


def test_accuracy_has_the_error_of_a_share() -> None:
    assert standard_error("accuracy", 80.0, 400) == pytest.approx(2.0)
    assert standard_error("exact_match", 50.0, 100) == pytest.approx(5.0)
    assert standard_error("accuracy", 100.0, 400) == 0


def test_a_correlation_has_the_error_of_a_correlation() -> None:
    assert standard_error("pearson", 60.0, 101) == pytest.approx(6.4)
    assert standard_error("matthews", -60.0, 101) == pytest.approx(6.4)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_few_rows_give_a_finite_error(metric: str, rows: int) -> None:
    assert math.isfinite(standard_error(metric, 50.0, rows))


def test_the_band_of_a_run_is_that_of_its_dense_score_and_rows() -> None:
    (group,) = group_runs([read_run(RECORDS / "demo.json")])
    dense = group.records[0].stage("dense")
    assert dense is not None
    score = dense.metrics["accuracy"]
    assert dense_noise(group) == Band(score, standard_error("accuracy", score, 1585))
    assert dense_noise(group, 200) == Band(score, standard_error("accuracy", score, 200))


def test_a_run_without_a_dense_stage_has_no_band() -> None:
    (group,) = group_runs([read_run(RECORDS / "demo.json")])
    record = group.records[0]
    bare = dataclasses.replace(group.runs[0], record=dataclasses.replace(record, stages=record.stages[1:]))
    assert dense_noise(dataclasses.replace(group, runs=[bare])) is None


def test_every_axis_of_scores_has_its_band() -> None:
    band, line = Band(80.0, 2.0), Line("dense", [0.5], [81.0])
    drawn = [
        metric_against_sparsity([line], "accuracy", None, band), front(line, line, "accuracy", 80.0, band),
        curves([line], "accuracy", noise=band), board_figure(read_board(RECORDS / "leaderboard")),
    ]  # fmt: skip
    for figure in drawn:
        for axes in [axes for axes in figure.axes if axes.get_visible()]:
            assert any(patch.get_label() == band.label for patch in axes.patches)
    (patch,) = drawn[0].axes[0].patches
    assert isinstance(patch, Rectangle)
    assert (patch.get_y(), patch.get_y() + patch.get_height()) == pytest.approx((78.0, 82.0))


def test_scores_are_watched_on_as_many_rows_as_the_band_says() -> None:
    assert progress.WATCHED_ROWS == WATCHED_ROWS
