"""Counts of survivors, Sanger's load balance, and cycles on lanes: by hand on drawings, and on a model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from attnpress.export.load_balance import load_balance
from attnpress.export.sanger import HEADER, sanger_row, write_sanger
from attnpress.export.tables import write_tables
from attnpress.records.lanes import LaneRecord, read_lanes
from attnpress.records.reading import RecordError, to_json
from tests.export.factories import LAYERS, made, record, sequences


def test_every_row_is_counted_once(tmp_path: Path) -> None:
    found = sequences(seeds=(5, 6))
    write_tables(found, tmp_path, "mrpc")
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text("utf-8").splitlines()))
    for number, name in enumerate(LAYERS):
        layers = [batch.layers[name] for batch in record(seeds=(5, 6))]
        own = [row for row in rows if row["layer"] == str(number)]
        assert sum(int(row["survivors"]) for row in own) == sum(int(t["survivors"].sum()) for t in layers)
        assert sum(int(row["pairs"]) for row in own) == sum(int(t["valid"].sum()) * 2 for t in layers)
        assert len(own) == 2 * sum(int(t["lengths"].sum()) for t in layers)


def test_sangers_shares_by_hand() -> None:
    # One row of 80 keys: vectors of 64 and of 16 keys, with 40 and no survivors; a second row with 20 and 1.
    rows = ["x" * 40 + "." * 40, "x" * 20 + "." * 44 + "x" + "." * 15]
    found = sanger_row(made(rows))
    assert found.density == pytest.approx(61 / 160)
    assert found.half_skip == pytest.approx((61 / 32) / (2 + 0 + 1 + 1))
    assert found.quarter_skip == pytest.approx((61 / 16) / (3 + 0 + 2 + 1))
    assert found.half_no_skip == pytest.approx((61 / 32) / (4 + 3)), "Sanger's code adds the vectors that are not empty"
    assert found.quarter_no_skip == pytest.approx((61 / 16) / (6 + 3))
    assert found.half_empty == pytest.approx((61 / 32) / (4 + 1))
    assert found.quarter_empty == pytest.approx((61 / 16) / (6 + 1))


def test_a_vector_without_a_valid_pair_is_not_counted() -> None:
    causal = ["v" * 64 + "." * 64, "v" * 128]
    found = sanger_row(made(["x" + "." * 127, "x" + "." * 127], causal))
    assert found.half_empty == pytest.approx((2 / 32) / (2 + 1))
    assert found.density == pytest.approx(2 / 192)


def test_sangers_script_can_read_the_file(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write_sanger(sequences(), tmp_path)
    means = pandas.read_csv(tmp_path / "load_balance.csv").mean()
    assert list(means.index) == list(HEADER)
    assert HEADER[:5] == ("50%-no-skip", "50%-skip", "25%-no-skip", "25%-skip", "overall-sparsity")
    assert ((means > 0) & (means <= 1)).all()
    kept, pairs = (sum(int(x.sum()) for x in (getattr(one, n) for one in sequences())) for n in ("survivors", "pairs"))
    assert means["overall-sparsity"] == pytest.approx(kept / pairs, rel=0.3)  # each sequence weighs the same there


def test_load_balance_adds_up_over_heads_and_sequences(tmp_path: Path) -> None:
    found = load_balance([made(["xx.", "x..", "xxx"], layer="a"), made(["x..", "x..", "x.."], layer="b")], "mine")
    assert (found.sequences, found.tokens, found.lanes) == (1, 3, [16, 32, 64, 128])
    assert [layer.survivors for layer in found.layers] == [6, 3]
    assert found.layers[0].cycles["16"] == {"in_order": 3, "packed": 3, "split": 3, "ideal": 1}
    assert found.total(16, "in_order") == 4
    (tmp_path / "lanes.json").write_text(to_json(found), encoding="utf-8")
    assert read_lanes(tmp_path / "lanes.json") == found


def test_on_a_model_no_schedule_beats_the_ideal() -> None:
    found = load_balance(sequences(seeds=(5, 6, 7)), "mine")
    for layer in found.layers:
        for cycles in layer.cycles.values():
            assert cycles["ideal"] <= cycles["packed"] <= cycles["in_order"]
            assert cycles["ideal"] <= cycles["split"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda plain: plain.pop("task"), "task"),
        (lambda plain: plain.update(format=9), "format"),
        (lambda plain: plain["layers"][0]["cycles"]["16"].pop("packed"), "lacks the cycles"),
        (lambda plain: plain["layers"][0]["cycles"].update({"16": {"in_order": -1}}), "cycles"),
        (lambda plain: plain["layers"][0]["cycles"].update({"many": {}}), "lanes"),
    ],
)
def test_a_damaged_record_of_lanes_is_named(change: object, word: str, tmp_path: Path) -> None:
    plain = json.loads(to_json(load_balance([made(["x.", ".x"])], "mine")))
    change(plain)  # type: ignore[operator]
    (tmp_path / "lanes.json").write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(RecordError, match=rf"lanes\.json.*{word}"):
        read_lanes(tmp_path / "lanes.json")


def test_a_record_without_layers_has_no_lanes() -> None:
    assert LaneRecord("mine", 1, 1, 8, []).lanes == []


def test_the_sums_of_a_drawing_are_its_own() -> None:
    one = made(["x.", ".x"])
    assert torch.equal(one.weighted, one.codes.long() @ one.v_codes.long())
