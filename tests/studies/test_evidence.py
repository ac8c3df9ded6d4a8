"""A table of evidence: what is planned, what is missing, and that a cell is run once, from the one dense model."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from attnpress.cli import main
from attnpress.config import ConfigError, RunConfig
from attnpress.config.recipe import dump_config, load_spec, parse_spec
from attnpress.locks import alone
from attnpress.records.run import read_record
from attnpress.report.evidence import ablation_markdown
from attnpress.studies.evidence import CellSpec, EvidenceSpec, choose, missing, plan, run_missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def spec(tiny_recipe: RunConfig) -> EvidenceSpec:
    cells = {
        "8888-0.50": CellSpec((0,), {"attention": {"sparsity": 0.5}}),
        "4444-0.50": CellSpec((0,), {"attention": {"sparsity": 0.5, "q": {"bits": 4}, "k": {"bits": 4}}}),
    }
    return EvidenceSpec("tiny", tiny_recipe, cells)


@pytest.fixture(scope="module")
def done(spec: EvidenceSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first cell was asked for."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "table.yaml").write_text(dump_config(spec), encoding="utf-8")
    assert main(command(folder, "--only", "8888-0.50")) == 0
    return folder


def command(folder: Path, *more: str) -> list[str]:
    records = ["--records", str(folder / "records")]
    return ["evidence", str(folder / "table.yaml"), "--output", str(folder / "runs"), *records, *more]


def test_cells_differ_from_the_recipe_in_what_they_say(spec: EvidenceSpec, tmp_path: Path) -> None:
    dense, eight, four = plan(spec, tmp_path, tmp_path)
    assert [item.name for item in (dense, eight, four)] == ["dense-seed0", "8888-0.50-seed0", "4444-0.50-seed0"]
    assert dense.stages == ("dense", "dense_control")
    assert dense.config.dense_control
    assert eight.config == dataclasses.replace(
        spec.recipe, attention=dataclasses.replace(spec.recipe.attention, sparsity=0.5), seed=0,
        checkpoint=tmp_path / "dense-seed0" / "dense",
    )  # fmt: skip
    assert four.config.attention.bits == {"q": 4, "k": 4, "v": 8, "p": 8}


def test_a_cell_trained_for_longer_has_a_control_of_its_length(spec: EvidenceSpec, tmp_path: Path) -> None:
    longer = CellSpec((0, 1), {"compress": {"epochs": 2.5}})
    items = plan(dataclasses.replace(spec, cells={"a": longer, "b": longer}), tmp_path, tmp_path)
    names = ["dense-seed0", "dense-2.5epochs-seed0", "a-seed0", "dense-seed1", "dense-2.5epochs-seed1", "a-seed1"]
    assert [item.name for item in items] == [*names, "b-seed0", "b-seed1"]
    control, cell = items[1:3]
    assert control.stages == ("dense", "dense_control")
    assert control.config.checkpoint == cell.config.checkpoint == tmp_path / "dense-seed0" / "dense"
    assert (control.config.compress, control.config.dense_control) == (cell.config.compress, True)


def test_the_dense_model_of_a_cell_is_trained_first_and_shared(done: Path) -> None:
    cell, dense = (read_record(done / "records" / f"tiny-{name}-seed0.json") for name in ("8888-0.50", "dense"))
    assert [stage.name for stage in dense.stages] == ["dense", "dense_control"]
    assert [stage.name for stage in cell.stages] == ["dense", "quantized", "one_shot", "progressive"]
    assert cell.provenance["weights"]["dense"] == dense.provenance["weights"]["dense"]
    assert dense.training["dense_control"][-1]["step"] == cell.training["progressive"][-1]["step"], (
        "trained equally long"
    )


def test_a_table_without_training_prunes_a_given_dense_model_at_once(from_dense: RunConfig, tmp_path: Path) -> None:
    cells = {"half": CellSpec((0,), {"attention": {"sparsity": 0.5}}, "one_shot")}
    (tmp_path / "table.yaml").write_text(dump_config(EvidenceSpec("tiny", from_dense, cells)), encoding="utf-8")
    assert main(command(tmp_path)) == 0
    dense, half = (read_record(tmp_path / "records" / f"tiny-{name}-seed0.json") for name in ("dense", "half"))
    assert [stage.name for stage in dense.stages] == ["dense"], "a control would be trained, and nothing else is"
    assert [stage.name for stage in half.stages] == ["one_shot"]
    assert half.provenance["weights"]["dense"] == dense.provenance["weights"]["dense"]
    assert not list((tmp_path / "runs").glob("*/dense")), "the given one is used where it lies"
    rows = ablation_markdown({"dense": [dense], "half": [half]}).splitlines()
    lost = half.stages[0].metrics[half.headline] - dense.stages[0].metrics[dense.headline]
    assert rows[-1].split("|")[3].strip() == f"{lost:+.2f}"


def test_what_has_a_record_is_not_run_again(done: Path, spec: EvidenceSpec, capsys: pytest.CaptureFixture[str]) -> None:
    items = plan(spec, done / "runs", done / "records")
    assert [item.name for item in missing(items)] == ["4444-0.50-seed0"]
    assert main(command(done, "--list")) == 0
    assert capsys.readouterr().out.split() == ["done", "dense-seed0", "done", "8888-0.50-seed0", "missing", "4444-0.50-seed0"]  # fmt: skip # noqa: E501
    before = (done / "records" / "tiny-8888-0.50-seed0.json").stat().st_mtime_ns
    assert main(command(done, "--only", "8888-0.50-seed0")) == 0
    assert "run" not in capsys.readouterr().out
    assert (done / "records" / "tiny-8888-0.50-seed0.json").stat().st_mtime_ns == before


def test_a_lost_record_is_taken_from_the_finished_run(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "records" / "tiny-8888-0.50-seed0.json"
    record.unlink()
    # The cell names its dense model by the folder it began in, so the copy stands for that folder.
    assert main([*command(done)[:-1], str(tmp_path / "records"), "--only", "8888-0.50"]) == 0
    assert read_record(record) == read_record(done / "records" / record.name)


def test_a_dense_model_made_anew_leaves_its_record_alone(
    spec: EvidenceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = plan(spec, tmp_path / "runs", tmp_path / "records")
    made: list[tuple[str, tuple[str, ...]]] = []

    def compress(config: RunConfig, folder: Path, notify: Any, *, stages: Any) -> None:
        made.append((folder.name, stages))
        (folder / "dense").mkdir(parents=True)
        (folder / "record.json").write_text("new", encoding="utf-8")

    monkeypatch.setattr("attnpress.studies.evidence.compress", compress)
    items[0].record.parent.mkdir()
    items[0].record.write_text("committed", encoding="utf-8")
    run_missing(items, items)
    assert made[0] == ("dense-seed0", ("dense",)), "its control is known"
    assert [item.record.read_text("utf-8") for item in items] == ["committed", "new", "new"]


def test_processes_share_the_runs_of_a_table(
    spec: EvidenceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = plan(spec, tmp_path / "runs", tmp_path / "records")
    dense, eight, four = items
    for item in items:
        item.folder.mkdir(parents=True)
    made, told, waits = [], [], threading.Event()

    def compress(config: RunConfig, folder: Path, notify: Any, *, stages: Any) -> None:
        made.append(folder.name)
        (folder / "record.json").write_text("mine", encoding="utf-8")
        (folder / "dense").mkdir()

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("waiting"):
            waits.set()

    monkeypatch.setattr("attnpress.studies.evidence.compress", compress)
    here = threading.Thread(target=run_missing, args=(items, items, tell))
    with alone(eight.folder, lambda: None):  # as another process would
        here.start()
        assert waits.wait(60)
        assert made == [dense.name, four.name], "what is taken is passed over"
        eight.record.write_text("theirs", encoding="utf-8")
    here.join(60)
    assert told[-1] == "waiting for the process that is at work on 8888-0.50-seed0"
    assert (made, eight.record.read_text("utf-8")) == ([dense.name, four.name], "theirs")


def test_a_cell_is_passed_over_while_another_process_trains_its_dense_model(
    spec: EvidenceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = dataclasses.replace(spec, cells={"8888-0.50": CellSpec((0, 1), {"attention": {"sparsity": 0.5}})})
    items = plan(two, tmp_path / "runs", tmp_path / "records")
    first: list[RunConfig] = []

    def stop(config: RunConfig, *_: Any, **__: Any) -> None:
        first.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("attnpress.studies.evidence.compress", stop)
    with alone(items[0].folder, lambda: None), pytest.raises(KeyboardInterrupt):
        run_missing(items, choose(items, ["8888-0.50"]))
    assert [config.seed for config in first] == [1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="instead of torchrun, start the command several times"):
        run_missing(items, items)


def test_unknown_cells_and_bad_changes_are_named(spec: EvidenceSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--only 9999: no such cell; there are dense-seed0, 8888-0\.50-seed0"):
        choose(plan(spec, tmp_path, tmp_path), ["9999"])
    wrong = dataclasses.replace(spec, cells={"a": CellSpec((0,), {"attention": {"sparsty": 0.5}})})
    with pytest.raises(
        ConfigError, match=r"cells\.a\.change:\nattention\.sparsty: unknown key; did you mean 'sparsity'"
    ):
        plan(wrong, tmp_path, tmp_path)
    data: dict[str, Any] = {"name": "x", "recipe": {}, "cells": {"../up": {"seeds": [0]}}}
    with pytest.raises(ConfigError, match=r"cells: '\.\./up' is part of file names"):
        parse_spec(EvidenceSpec, data)
    with pytest.raises(ConfigError, match=r"name: '\.hidden' is part of file names"):
        parse_spec(EvidenceSpec, {"name": ".hidden", "recipe": {}, "cells": {}})
    data = {"name": "x", "recipe": {}, "cells": {"dense": {"seeds": [0]}}}
    with pytest.raises(ConfigError, match="call the cell otherwise"):
        parse_spec(EvidenceSpec, data)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "evidence").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_tables_are_what_their_cells_are_called(path: Path, tmp_path: Path) -> None:
    for item in plan(load_spec(EvidenceSpec, path), tmp_path, tmp_path):
        if not item.cell.startswith("dense"):
            bits, _, asked = item.cell.partition("-")
            assert "".join(str(value) for value in item.config.attention.bits.values()) == bits
            assert item.config.attention.sparsity == pytest.approx(float(asked), abs=0.0021)
