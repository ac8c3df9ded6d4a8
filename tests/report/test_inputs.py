"""What pages read: damaged records, sweeps, boards and timings are named by file and field, before a page is begun."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnpress.records.leaderboard import read_board
from attnpress.records.reading import RecordError
from attnpress.records.run import read_record
from attnpress.records.sweep import read_sweep
from attnpress.report.inputs import read_runs, read_timings

ROOT = Path(__file__).parents[2]
Change = Callable[[Any], object]


def changed(source: Path, target: Path, change: Change) -> Path:
    data = json.loads(source.read_text("utf-8"))
    change(data)
    target.write_text(json.dumps(data), "utf-8")
    return target


RECORDS: list[tuple[Change, str]] = [
    (lambda data: data["recipe"].pop("model"), r"recipe 'model'\): this key is missing"),
    (lambda data: data["recipe"].update(data=[]), r"recipe 'data'\): should be a mapping"),
    (lambda data: data["recipe"]["attention"].update(q=None), r"recipe.attention 'q'\): should be a mapping"),
    (lambda data: data["recipe"]["attention"]["k"].update(bits="8"), r"recipe.attention.k 'bits'\): should be a whole"),
    (lambda data: data["recipe"]["attention"].update(sparsity="high"), r"recipe.attention 'sparsity'\)"),
    (lambda data: data["recipe"]["compress"].update(epochs=None), r"recipe.compress 'epochs'\)"),
    (lambda data: data["provenance"]["rows"].update(eval="all"), r"provenance.rows 'eval'\)"),
    (lambda data: data["provenance"]["weights"].pop("dense"), r"provenance.weights 'dense'\): this key is missing"),
    (lambda data: data["stages"][0]["work"].pop("bytes_dense"), r"work.dense 'bytes_dense'\): this key is missing"),
    (lambda data: data["stages"][0]["work"].update(bytes_dense=0), r"work.dense 'bytes_dense'\): .*from 1"),
    (lambda data: data["training"]["dense"][0].pop("step"), r"training.dense.0 'step'\): this key is missing"),
]


@pytest.mark.parametrize(("change", "message"), RECORDS)
def test_a_record_that_no_page_can_be_made_of_is_named(change: Change, message: str, tmp_path: Path) -> None:
    file = changed(ROOT / "records" / "demo.json", tmp_path / "run.json", change)
    with pytest.raises(RecordError, match=rf"run\.json: damaged record \({message}"):
        read_record(file)


def test_every_record_of_the_project_can_be_drawn() -> None:
    files = [ROOT / "records" / "demo.json", *sorted((ROOT / "records" / "evidence").glob("*.json"))]
    runs = [run for file in files for run in read_runs(file)]
    assert [run.record.headline for run in runs]
    assert len(runs) > len(files)
    assert {"demo", "mrpc-dense-seed0"} <= {run.name for run in runs}
    assert read_board(ROOT / "records" / "leaderboard").cells


BOARDS: list[tuple[Change, str]] = [
    (lambda data: data["board"].pop("rules"), "'rules'"),
    (lambda data: data["board"]["seeds"].append("0"), "seeds '1'"),
    (lambda data: data["cells"][0].update(rule="other"), "'other' is there, but the board has no such task or rule"),
    (lambda data: data["cells"][0].update(asked="0.9"), "cells.0 'asked'"),
    (lambda data: data["cells"][0]["measured"].update(sparsity=None), "'sparsity'"),
    (lambda data: data["cells"][0]["measured"].update(metrics={}), "the headline is missing"),
    (lambda data: data["baselines"][0]["provenance"].update(rows=3), "'rows'"),
    (lambda data: data["baselines"][0].update(dense="86"), "baselines.0 'dense'"),
]


@pytest.mark.parametrize(("change", "message"), BOARDS)
def test_a_damaged_board_is_named(change: Change, message: str, tmp_path: Path) -> None:
    changed(ROOT / "records" / "leaderboard" / "board.json", tmp_path / "board.json", change)
    with pytest.raises(RecordError, match=rf"board\.json: .*{message}"):
        read_board(tmp_path)


TRIAL = {
    "number": 0, "state": "complete", "chosen": "8 bits", "params": {}, "metric": 80.0, "work": 0.5, "sparsity": 0.9,
    "watched": {}, "recipe": {}, "folder": "trials/0",
}  # fmt: skip
SWEEP: dict[str, Any] = {
    "task": "movie", "headline": "accuracy", "dense": 82.0, "majority": None, "provenance": {}, "sweep": {},
    "trials": [TRIAL], "front": [0], "format": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": "82"}, "'dense'"),
        ({"front": [1]}, "trial 1 is not complete, or not there"),
        ({"front": [None]}, "front '0'"),
        ({"trials": [TRIAL, TRIAL]}, "two trials have one number"),
        ({"trials": [TRIAL | {"metric": None}]}, "complete, but without metric"),
        ({"trials": [TRIAL | {"state": "running"}]}, "'running' is none of"),
        ({"trials": [TRIAL | {"watched": {"8": "x"}}]}, "trials.0.watched '8'"),
        ({"trials": {}}, "'trials'"),
    ],
)
def test_a_damaged_sweep_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP), "utf-8")
    assert read_sweep(tmp_path).front == [0]
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP | changes), "utf-8")
    with pytest.raises(RecordError, match=rf"sweep\.json: damaged .*{message}"):
        read_sweep(tmp_path)


TIMING = {
    "seq_len": 128, "threads": 1, "sparsity": 0.9, "peer": "sdpa", "target": "avx2", "ours_ms": 1.0, "peer_ms": 2.0,
    "ratio": 2.0,
}  # fmt: skip


def test_timings_of_another_type_are_named(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps([TIMING]), "utf-8")
    assert read_timings([file]) == [TIMING]
    for wrong in ({"seq_len": "128"}, {"ratio": None}, {"peer": 3}, {"sparsity": 7}):
        file.write_text(json.dumps([TIMING, TIMING | wrong]), "utf-8")
        with pytest.raises(RecordError, match=rf"bench\.json: damaged \(1 '{next(iter(wrong))}'\)"):
            read_timings([file])
    file.write_text('{"other": 1}', "utf-8")
    assert read_timings([tmp_path]) == [], "other files of a folder are not timings"
