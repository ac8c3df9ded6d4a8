"""Table and figure of a leaderboard, from a record made up for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnpress.records.leaderboard import FILE, BaselineRecord, BoardRecord, CellRecord, read_board
from attnpress.records.reading import RecordError, to_json
from attnpress.report.leaderboard import (
    MISSING,
    board_caption,
    board_figure,
    board_markdown,
    board_rows,
    figure_words,
    missing_words,
    skipped,
)
from attnpress.report.plots import PRINT, recolored, to_svg

BITS = {"q": 8, "k": 8, "v": 8, "p": 8}


def entry(predictor_bits: int | None = None, **attention: Any) -> dict[str, Any]:
    return {"source": "somebody", "attention": attention, "schedule": {}, "predictor_bits": predictor_bits}


RULES = {"ours": entry(), "sanger": entry(4, rule="threshold"), "two-of-four": entry(rule="nm")}


def measured(score: float, sparsity: float) -> dict[str, Any]:
    figures = {"metrics": {"f1": score, "accuracy": 1.0}, "sparsity": sparsity, "pruned": sparsity - 0.1}
    return {**figures, "keys_per_row": 5.0, "bits": BITS, "name": "progressive"}


def baseline(task: str, seed: int, dense: float, control: float | None) -> BaselineRecord:
    return BaselineRecord(task, seed, "f1", dense, control, 60.0, {"rows": {"train": 100, "eval": 10}})


CELLS = [
    CellRecord("mrpc", "ours", 0.9, 0, measured(84.0, 0.91)),
    CellRecord("mrpc", "ours", 0.9, 1, measured(82.0, 0.93)),
    CellRecord("mrpc", "ours", 0.8, 0, measured(85.0, 0.82)),
    CellRecord("mrpc", "ours", 0.8, 1),
    CellRecord("mrpc", "sanger", 0.9, 0, measured(80.0, 0.95)),
    CellRecord("mrpc", "sanger", 0.9, 1),
    CellRecord("mrpc", "two-of-four", 0.5, 0, measured(86.0, 0.6)),
    CellRecord("sst2", "ours", 0.9, 0),
]
RECORD = BoardRecord(
    {"tasks": {"mrpc": {}, "sst2": {}}, "rules": RULES, "seeds": [0, 1]},
    [baseline("mrpc", 0, 85.0, 86.0), baseline("mrpc", 1, 84.0, None)],
    CELLS,
)


def row(asked: str, rule: str) -> dict[str, str]:
    header, *rows = board_rows(RECORD)
    return next(dict(zip(header, one, strict=True)) for one in rows if one[:3] == ("mrpc", asked, rule))


def test_a_row_is_the_mean_over_seeds_against_each_seeds_own_dense_model() -> None:
    found = row("0.9", "ours")
    assert found["score"] == "83.00 ± 1.41"
    assert found["against dense"] == "-2.00", "84 of 86 trained equally long, and 82 of 84, which has no control"
    assert (found["sparsity"], found["seeds"], found["metric"]) == ("0.920", "2 of 2", "f1")


def test_rows_go_by_task_and_sparsity() -> None:
    places = [one[:3] for one in board_rows(RECORD)[1:]]
    assert places == [
        ("mrpc", "0.5", "two-of-four"), ("mrpc", "0.8", "ours"), ("mrpc", "0.9", "ours"), ("mrpc", "0.9", "sanger"),
        ("sst2", "0.9", "ours"),
    ]  # fmt: skip


def test_what_is_skipped_follows_from_when_the_mask_is_known() -> None:
    found = measured(80.0, 0.95)
    assert skipped(RULES["ours"], 0.9, found) == (0.0, 0.95)
    product, value = skipped(RULES["sanger"], 0.9, found)
    assert product == pytest.approx(0.85 - 16 / 64), "the prediction is a product of its own"
    assert value == 0.95
    foretold = entry(rule="threshold", predictor_bits=4)
    assert skipped(foretold, 0.9, found) == (product, value), "the same, where the mask is foretold"
    assert skipped(RULES["two-of-four"], 0.5, found) == (0.0, 0.5), "not more, whatever else is zero"
    assert skipped(RULES["sanger"], 0.2, measured(80.0, 0.2))[0] == 0.0
    assert (row("0.9", "sanger")["QK^T skipped"], row("0.5", "two-of-four")["PV skipped"]) == ("60%", "50%")


def test_cells_that_were_not_run_are_named_and_have_no_row() -> None:
    assert missing_words(RECORD) == (
        "Not run yet, 3 of 8 cells: ours on mrpc at 0.8 (seed 1); sanger on mrpc at 0.9 (seed 1); "
        "ours on sst2 at 0.9 (seed 0)."
    )
    text = board_markdown(RECORD)
    assert "| sst2 |" not in text
    assert missing_words(RECORD) in text
    assert [one for one in board_rows(RECORD)[1:] if one[3] == MISSING] == [
        ("sst2", "0.9", "ours", MISSING, *[""] * 6, "0 of 1")
    ]


def test_a_board_that_was_just_begun_is_told_as_such() -> None:
    begun = BoardRecord(RECORD.board, [], [CellRecord("mrpc", "ours", 0.9, 0), CellRecord("sst2", "ours", 0.9, 0)])
    assert board_markdown(begun).startswith("Not run yet, 2 of 2 cells")
    assert figure_words(begun).endswith("Nothing was run yet.")
    assert f"mrpc ({MISSING})" in to_svg(board_figure(begun), "board")


def test_the_caption_says_what_scores_are_held_against() -> None:
    assert board_caption(RECORD).startswith("mrpc, seed 0: f1 85.00 dense, 86.00 trained equally long, 60.00 for")
    assert "seed 1: f1 84.00 dense, 60.00 for" in board_caption(RECORD)


def test_the_figure_has_a_panel_for_each_task_and_a_line_for_each_rule() -> None:
    figure = board_figure(RECORD)
    mrpc, sst2 = figure.axes
    drawn = {line.get_label(): [np.asarray(values).tolist() for values in line.get_data()] for line in mrpc.get_lines()}
    assert drawn["ours"] == [[pytest.approx(0.82), pytest.approx(0.92)], [85.0, 83.0]]
    assert set(drawn) == {"ours", "sanger", "two-of-four", "dense model"}
    assert drawn["dense model"][1] == [85.0, 85.0], "the mean of what each seed is held against"
    assert not sst2.get_lines()
    assert (mrpc.get_ylabel(), sst2.get_ylabel()) == ("mrpc: f1 (points)", f"sst2 ({MISSING})")
    svg = recolored(to_svg(figure, "board"), PRINT)
    assert "two-of-four" in svg
    assert len(svg) < 100_000
    assert "mrpc at 0.9: best ours, 84.0" in figure_words(RECORD)


def test_a_record_is_written_and_read(tmp_path: Any) -> None:
    (tmp_path / FILE).write_text(to_json(RECORD), encoding="utf-8")
    assert read_board(tmp_path) == RECORD
    (tmp_path / FILE).write_text(to_json(RECORD).replace('"format": 1', '"format": 9'), encoding="utf-8")
    with pytest.raises(RecordError, match="format 9; this version reads 1: update attnpress"):
        read_board(tmp_path)
    (tmp_path / FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(RecordError, match="damaged"):
        read_board(tmp_path)
