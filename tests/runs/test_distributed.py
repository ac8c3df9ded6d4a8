"""Two processes (gloo) get what one gets: scales, thresholds, figures; and the whole journey runs under torchrun."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnpress.config import RunConfig, TrainSpec
from attnpress.config.recipe import dump_config
from attnpress.records.run import read_record

PROGRAM = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def recipe(tiny_recipe: RunConfig, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd number of evaluation rows, and a last calibration batch of a single one: neither divides by two."""
    short = TrainSpec(epochs=1, learning_rate=1e-3, batch_size=8, checkpoints=2)
    config = dataclasses.replace(
        tiny_recipe,
        checkpoint=finished / "dense",
        data=dataclasses.replace(tiny_recipe.data, train_rows=65, eval_rows=77),
        calibration=dataclasses.replace(tiny_recipe.calibration, batches=9, batch_size=8),
        compress=short,
    )
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def alone(recipe: Path) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(json.dumps(runpy.run_path(str(PROGRAM))["measure"](recipe)))
    return measured


@pytest.fixture(scope="module")
def folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(recipe), str(folder)], env=environment, capture_output=True, text=True)
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return figures


@pytest.mark.parametrize("moment", ["calibrated", "driven"])
def test_scales_thresholds_and_histograms_are_those_of_one_process(
    moment: str, alone: dict[str, Any], together: dict[str, Any]
) -> None:
    assert len(alone[moment]) == 10
    assert together[moment] == alone[moment]


def test_no_evaluation_row_is_counted_twice(alone: dict[str, Any], together: dict[str, Any]) -> None:
    one, two = alone["stage"], together["stage"]
    for stage in (one, two):
        del stage["seconds"]
    assert two == one
    assert together["layers"] == alone["layers"]


def test_predictions_come_in_the_order_of_the_rows(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert len(together["logits"]) == 77
    for one, two in zip(alone["logits"], together["logits"], strict=True):
        assert two[0] == pytest.approx(one[0], abs=1e-6)


def test_a_run_of_two_ranks_resumes_exactly(together: dict[str, Any]) -> None:
    assert together["ranks_that_resumed_differently"] == 0


def test_the_journey_runs_on_two_ranks_and_writes_one_record(folder: Path, alone: dict[str, Any]) -> None:
    record = read_record(folder / "run")
    assert record.provenance["machine"]["processes"] == 2
    assert [stage.name for stage in record.stages] == ["dense", "quantized", "one_shot", "progressive"]
    assert [stage.macs_dense for stage in record.stages] == [alone["stage"]["macs_dense"]] * 4
    assert record.stages[-1].pruned == pytest.approx(0.8, abs=0.03)
    assert [entry["step"] for entry in record.training["progressive"]] == [1, 2, 3, 4, 5], "of 2 x 8 rows each"
    assert not list((folder / "run").rglob("checkpoint-*"))
    printed = (folder / "stdout").read_text(encoding="utf-8")
    assert printed.count("== progressive: ") == printed.count("record: ") == 1, "one rank speaks"
