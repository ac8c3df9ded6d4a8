"""What became of each row: packed small, unpacked as it was, refused where it is damaged."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from attnpress.records.reading import RecordError, to_json
from attnpress.records.row_scores import RowScores, pack_rows
from attnpress.records.run import from_json
from attnpress.records.table import brief, read_table, table_text
from tests.records.test_table import LONG, stage, write


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 408])
def test_right_and_wrong_come_back_as_they_were(rows: int) -> None:
    right = np.random.default_rng(rows).random(rows) < 0.8
    packed = pack_rows("right", right)
    assert packed.values().tolist() == right.astype(float).tolist()
    assert len(packed.packed) < 16 + rows / 4


def test_values_come_back_to_a_part_in_65535_and_both_ends_and_the_order_stay() -> None:
    values = np.random.default_rng(0).normal(3, 2, 575).astype(np.float32)
    found = pack_rows("value", values).values()
    assert np.abs(found - values).max() <= (values.max() - values.min()) / 65535
    assert (found.min(), found.max()) == (values.min(), values.max())
    assert (np.diff(found[np.argsort(values)]) >= 0).all()
    assert pack_rows("value", [2.5, 2.5]).values().tolist() == [2.5, 2.5]
    assert pack_rows("score", [0.0, 1.0, 0.4]).values().tolist() == [0, 1, pytest.approx(0.4, abs=1e-5)]


LONG_ROWS = dataclasses.replace(
    LONG,
    targets=pack_rows("value", [0.0, 5.0]),
    stages=[
        dataclasses.replace(stage(name), row_scores=pack_rows("value", [1.0, score]))
        for name, score in (("dense", 2.0), ("dense_control", 3.0), ("one_shot", 4.0), ("progressive", 5.0))
    ],
)


def test_a_brief_record_has_the_rows_of_what_is_compared_and_reads_back(tmp_path: object) -> None:
    short = brief(LONG_ROWS)
    assert [one.name for one in short.stages if one.row_scores] == ["dense_control", "progressive"]
    assert short.targets == LONG_ROWS.targets
    assert from_json(to_json(LONG_ROWS)) == LONG_ROWS
    file = write(tmp_path, table_text({"8888-seed0": short}))  # type: ignore[arg-type]
    assert read_table(file) == {"8888-seed0": short}


def test_an_older_record_has_no_rows_and_stays_the_line_that_it_was() -> None:
    text = table_text({"8888-seed0": brief(LONG)})
    assert "row_scores" not in text
    assert "targets" not in text
    old = json.loads(to_json(LONG))
    del old["targets"]
    for one in old["stages"]:
        del one["row_scores"]
    assert from_json(json.dumps(old)) == LONG


GOOD = pack_rows("value", [1.0, 2.0])


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (dataclasses.replace(GOOD, packed="no base64"), "should be base64 of compressed rows"),
        (dataclasses.replace(GOOD, packed="AAAA"), "should be base64 of compressed rows"),
        (dataclasses.replace(GOOD, packed="\u00e9"), "should be base64 of compressed rows"),
        (dataclasses.replace(GOOD, rows=3), "should hold 3 rows"),
        (dataclasses.replace(GOOD, rows=1), "should hold 1 rows"),
        (dataclasses.replace(GOOD, kind="right"), "should hold 2 rows"),
    ],
)
def test_damaged_rows_are_named(packed: RowScores, message: str) -> None:
    whole = dataclasses.replace(LONG, stages=[dataclasses.replace(stage("dense"), row_scores=packed)])
    with pytest.raises(RecordError, match=rf"damaged record \(stage 'dense', row_scores\): {message}"):
        from_json(to_json(whole))
    with pytest.raises(RecordError, match=rf"damaged record \(targets\): {message}"):
        from_json(to_json(dataclasses.replace(LONG, targets=packed)))
