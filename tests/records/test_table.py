"""A table of records: brief forms in one file, each checked as a record; records that lie apart are read beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from attnpress.records.reading import RecordError, to_json
from attnpress.records.run import HeadRecord, LayerRecord, Record, StageRecord
from attnpress.records.table import brief, is_table, read_table, recorded, table_files, table_text

WORK = {"bit_operations_dense": 9, "bit_operations_remaining": 5, "bytes_dense": 7, "bytes_remaining": 3}
RECIPE = {
    "seed": 0, "model": "bert", "data": {"task": "mrpc"}, "compress": {"epochs": 3},
    "attention": {"sparsity": 0.9, **{name: {"bits": 8} for name in "qkvp"}},
}  # fmt: skip
PROVENANCE = {"seed": 0, "rows": {"train": 10, "eval": 5}, "weights": {"base": "00", "dense": "11"}}


def layer(*errors: float | None) -> LayerRecord:
    heads = [
        HeadRecord(0.9, 0.8, 0.1, 2.5, 0.25, {} if error is None else {"q": 0.0, "output": error}) for error in errors
    ]
    return LayerRecord("layer", 0.9, 0.8, 0.95, 0.1, 2.5, {"q": [0.5, 0.25]}, heads)


def stage(name: str, *layers: LayerRecord) -> StageRecord:
    bits = {"q": 8, "k": 8, "v": None, "p": 4}
    return StageRecord(name, {"f1": 90.0}, 0.9, 0.8, 0.95, 64, 0.1, 2.5, bits, 100, 55, WORK, list(layers), 1.5)


LONG = Record(
    RECIPE, "f1", 50.0, PROVENANCE,
    [stage("dense", layer(None, None)), stage("one_shot", layer(0.25, 0.5), layer(1.0, 2.0))],
    {"dense": [{"step": 1, "loss": 0.5}]},
)  # fmt: skip


def write(folder: Path, text: str, name: str = "mrpc.json") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_brief_record_lacks_layers_and_logs_and_nothing_else() -> None:
    short = brief(LONG)
    assert short.training == {}
    assert [one.layers for one in short.stages] == [[], []]
    assert [one.output_errors for one in short.stages] == [[], [0.375, 1.5]], "where they were measured"
    assert [one.errors_by_layer() for one in short.stages] == [one.errors_by_layer() for one in LONG.stages]
    pairs = zip(short.stages, LONG.stages, strict=True)
    stages = [dataclasses.replace(one, layers=long.layers, output_errors=[]) for one, long in pairs]
    assert dataclasses.replace(short, training=LONG.training, stages=stages) == LONG
    assert brief(short) == short


def test_a_table_is_one_line_a_run_in_order(tmp_path: Path) -> None:
    records = {"dense-seed1": brief(LONG), "8888-0.95-seed0": brief(dataclasses.replace(LONG, majority=None))}
    file = write(tmp_path, table_text(records))
    assert read_table(file) == records
    lines = file.read_text("utf-8").splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == ['"8888-0.95-seed0"', '"dense-seed1"']
    one_more = table_text(records | {"8888-0.90-seed0": brief(LONG)}).splitlines()
    assert set(lines) <= set(one_more), "the lines of the others stay"
    assert (read_table(write(tmp_path, table_text({}), "none.json")), is_table(file)) == ({}, True)


def test_a_number_that_is_none_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        table_text({"a-seed0": dataclasses.replace(LONG, majority=float("nan"))})


def changed(change: Any) -> str:
    data = json.loads(table_text({"8888-seed0": brief(LONG)}))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mrpc\.json: not a table of records \(line 1"),
        (to_json(LONG), r"mrpc\.json: not a table of records; name another folder"),
        ("[]", "not a table of records"),
        (changed(lambda data: data.update(format=2)), "format 2; this version reads 1: update attnpress"),
        (changed(lambda data: data.update(more=1)), r"damaged table \('more'\): this key is not known"),
        (changed(lambda data: data["records"].update(demo={})), r"damaged table \('demo'\): runs are called CELL-seed"),
        (changed(lambda data: data["records"].update({"a-seed1": 3})), r"mrpc\.json: a-seed1: not a record of a run"),
        (
            changed(lambda data: data["records"]["8888-seed0"].update(format=9)),
            r"mrpc\.json: 8888-seed0: format 9; this version reads format 1",
        ),
        (
            changed(lambda data: data["records"]["8888-seed0"]["provenance"].pop("rows")),
            r"mrpc\.json: 8888-seed0: damaged record \(provenance 'rows'\): this key is missing",
        ),
        (
            changed(lambda data: data["records"]["8888-seed0"]["stages"][0].update(output_errors=["much"])),
            r"8888-seed0: damaged record \(stages.0.output_errors '0'\): should be a number",
        ),
        (table_text({"a-seed0": brief(LONG)})[:-30], "not a table of records"),
        (table_text({"a-seed0": brief(LONG)}).replace('"records": {', '"records": {"a-seed0": 1,'), "duplicate key"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=message):
        read_table(write(tmp_path, text))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"mrpc\.json: cannot be read"):
        read_table(tmp_path / "mrpc.json")
    assert not is_table(tmp_path / "mrpc.json")


def test_records_apart_are_read_beside_the_table(tmp_path: Path) -> None:
    old, new = (dataclasses.replace(LONG, majority=majority) for majority in (1.0, 2.0))
    for name in ("mrpc-dense-6epochs-seed0", "mrpc-8888-0.95-seed11", "mrpcs-a-seed0"):
        write(tmp_path, to_json(old), f"{name}.json")
    assert recorded(tmp_path / "mrpc.json") == {"dense-6epochs-seed0": old, "8888-0.95-seed11": old}
    file = write(tmp_path, table_text({"8888-0.95-seed11": brief(new), "8888-0.95-seed2": brief(new)}))
    found = recorded(file)
    assert {name: one.majority for name, one in found.items()} == {
        "dense-6epochs-seed0": 1.0, "8888-0.95-seed11": 2.0, "8888-0.95-seed2": 2.0
    }, "of a run that is in both, the table's"  # fmt: skip
    write(tmp_path, "no record", "demo.json")
    assert [one.name for one in table_files(tmp_path)] == ["mrpc.json", "mrpcs.json"]
    write(tmp_path, file.read_text("utf-8")[:-30], "cut.json")
    assert tmp_path / "cut.json" in table_files(tmp_path), "a table that was cut is not passed over"
