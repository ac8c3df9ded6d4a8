"""The load balance in a report and in the documentation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attnpress.records.lanes import LaneRecord, LayerLanes
from attnpress.records.reading import RecordError, to_json
from attnpress.report.lanes import lane_drawings, lanes_markdown
from attnpress.report.page import make_report


def layer(name: str, *counts: int) -> LayerLanes:
    cycles = dict(zip(("in_order", "packed", "split", "ideal"), counts, strict=True))
    return LayerLanes(name, 1000, {"16": cycles, "32": {each: count // 2 for each, count in cycles.items()}})


RECORD = LaneRecord("mrpc", 64, 3000, 8, [layer("a", 400, 200, 150, 100), layer("b", 200, 120, 110, 100)])


def test_a_run_with_a_load_balance_draws_it(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "export" / "csv").mkdir(parents=True)
    shutil.copyfile(finished / "record.json", run / "record.json")
    without = make_report([run])
    assert "attnpress export RUN_DIR --to csv counts it" in without.html
    assert "lanes-1.svg" not in without.figures
    (run / "export" / "csv" / "lanes.json").write_text(to_json(RECORD), encoding="utf-8")
    made = make_report([run])
    svg = made.figures["lanes-1.svg"]
    assert "Load balance of P V on 64 sequences of mrpc" in svg
    assert "16 lanes: rows in order 3.00, rows packed 1.60, rows split and packed 1.30" in svg
    assert "32 lanes" in svg
    (run / "export" / "csv" / "lanes.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecordError, match=r"lanes\.json"):
        make_report([run])


def test_the_table_has_every_layer_and_all_of_them() -> None:
    lines = lanes_markdown(RECORD).splitlines()
    assert (
        lines[0]
        == "| layer | 16 lanes: in order / packed / split / ideal | 32 lanes: in order / packed / split / ideal |"
    )
    assert lines[2] == "| 0 | 400 / 200 / 150 / 100 | 200 / 100 / 75 / 50 |"
    assert lines[4] == "| all | 600 / 320 / 260 / 200 | 300 / 160 / 130 / 100 |"
    assert lines[5] == "| lanes busy | 33% / 62% / 77% | 33% / 62% / 77% |"


def test_nothing_counted_is_nothing_drawn() -> None:
    assert list(lane_drawings(1, None)) == []
    assert list(lane_drawings(1, LaneRecord("mrpc", 1, 1, 8, []))) == []
