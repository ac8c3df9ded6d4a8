"""The record: JSON both ways, stages in order, and damaged files named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from attnpress.records.reading import RecordError, to_json
from attnpress.records.run import (
    FORMAT,
    STAGES,
    HeadRecord,
    LayerRecord,
    Record,
    StageRecord,
    from_json,
    read_record,
)

WORK = {"bit_operations_dense": 9, "bit_operations_remaining": 5, "bytes_dense": 7, "bytes_remaining": 3}


def stage(name: str, score: float = 90.0) -> StageRecord:
    head = HeadRecord(sparsity=0.9, pruned=0.8, tile_sparsity=0.1, keys_per_row=2.5, threshold=0.25)
    layer = LayerRecord("layer.0", 0.9, 0.8, 0.95, 0.1, 2.5, {"q": [0.5, 0.25]}, [head, head])
    bits = {"q": 8, "k": 8, "v": None, "p": 4}
    return StageRecord(name, {"f1": score}, 0.9, 0.8, 0.95, 64, 0.1, 2.5, bits, 100, 55, WORK, [layer], 1.5)


RECIPE = {
    "seed": 0, "model": "bert", "data": {"task": "mrpc"}, "compress": {"epochs": 3},
    "attention": {"sparsity": 0.9, **{name: {"bits": 8} for name in "qkvp"}},
}  # fmt: skip
PROVENANCE = {"seed": 0, "rows": {"train": 10, "eval": 5}, "weights": {"base": "00", "dense": "11"}}
RECORD = Record(RECIPE, "f1", 50.0, PROVENANCE, [stage("dense")], {"dense": [{"step": 1, "loss": 0.5}]})


def test_a_record_survives_json() -> None:
    assert from_json(to_json(RECORD)) == RECORD
    assert to_json(from_json(to_json(RECORD))) == to_json(RECORD)


def test_stages_are_kept_in_the_order_of_the_run_whenever_they_are_added() -> None:
    record = Record({}, "f1", None, {})
    for name in reversed(STAGES):
        record = record.with_stage(stage(name))
    assert [one.name for one in record.stages] == list(STAGES)
    again = record.with_stage(stage("dense", 10.0))
    assert (len(again.stages), again.stages[0].metrics["f1"]) == (len(STAGES), 10.0)
    assert record.stages[0].metrics["f1"] == 90.0, "a record does not change"
    assert RECORD.stage("quantized") is None


def test_what_is_no_number_is_not_recorded() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(Record({}, "f1", float("nan"), {}))


def damaged(change: Any) -> str:
    data = json.loads(to_json(RECORD))
    change(data)
    return json.dumps(data)


DAMAGED: list[tuple[str, str]] = [
    ("", "not a record of a run"),
    ("[]", "not a record of a run"),
    ("{}", r"not a record of a run \(KeyError\('format'\)\)"),
    (to_json(RECORD)[:-40], "not a record of a run"),
    (damaged(lambda data: data.update(format=FORMAT + 1)), "format 2; this version reads format 1: update attnpress"),
    (damaged(lambda data: data.pop("stages")), r"damaged record \('stages'\)"),
    (damaged(lambda data: data.pop("headline")), r"damaged record \(.*'headline'"),
    (damaged(lambda data: data.update(extra=1)), r"damaged record \(.*'extra'"),
    (damaged(lambda data: data["stages"][0].pop("bits")), r"damaged record \(.*'bits'"),
    (damaged(lambda data: data["stages"][0]["layers"][0]["heads"][0].pop("pruned")), r"damaged record \(.*'pruned'"),
    (damaged(lambda data: data["stages"].append(None)), "damaged record"),
]


def first_stage(**changes: Any) -> str:
    return damaged(lambda data: data["stages"][0].update(changes))


NOT_OF_THEIR_TYPE: list[tuple[str, str]] = [
    (first_stage(sparsity="0.9"), r"damaged record \(stages.0 'sparsity'\): should be a number, found '0.9'"),
    (first_stage(sparsity=-1), r"damaged record \(stages.0 'sparsity'\): should be a number from 0 to 1"),
    (first_stage(macs_dense=0), r"damaged record \(stages.0 'macs_dense'\)"),
    (first_stage(layers=[{}]), r"damaged record \(stages.0.layers.0 'name'\): this key is missing"),
    (first_stage(name="second"), r"damaged record \(stages\): 'second' is none of dense"),
    (first_stage(metrics={"accuracy": 1}), r"damaged record \(stage 'dense'\): no metric 'f1'"),
    (damaged(lambda data: data["stages"].append(data["stages"][0])), r"damaged record \(stages\): 'dense' is there tw"),
    (damaged(lambda data: data["stages"][0]["layers"][0]["scales"].update(q="x")), r"damaged record \(.*scales 'q'\)"),
    (damaged(lambda data: data.update(training={"dense": [{"step": "one"}]})), r"damaged record \(training.dense.0 's"),
    (damaged(lambda data: data.update(format=True)), r"damaged record \('format'\)"),
    (damaged(lambda data: data.update(recipe={"data": "\ud83d"})), "damaged record: it holds an unpaired surrogate"),
    (to_json(RECORD).replace("90.0", "NaN"), r"not a record of a run \(.*NaN is not a JSON value"),
    (to_json(RECORD).replace('"majority"', '"headline": "f1", "majority"'), "not a .*duplicate key 'headline'"),
]


@pytest.mark.parametrize(("text", "message"), [*DAMAGED, *NOT_OF_THEIR_TYPE])
def test_a_damaged_record_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=rf"record\.json: {message}"):
        read_record(tmp_path)


def test_a_record_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match=r"record\.json: damaged: not UTF-8 text"):
        read_record(tmp_path)


def test_a_record_is_read_from_its_folder_or_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"record\.json: no such record; give the folder that `attnpress compress"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_text(to_json(RECORD), encoding="utf-8")
    assert read_record(tmp_path) == read_record(tmp_path / "record.json") == RECORD
    assert dataclasses.asdict(RECORD)["format"] == FORMAT
