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
from attnpress.records.reading import RecordError, to_json
from attnpress.records.run import Record, read_record
from attnpress.records.table import brief, read_table, table_text
from attnpress.report.evidence import ablation_markdown
from attnpress.studies.evidence import CellSpec, EvidenceSpec, choose, fold, missing, plan, run_missing

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
    known = read_table(done / "records" / "tiny.json")
    cell, dense = (read_record(done / "runs" / f"{name}-seed0") for name in ("8888-0.50", "dense"))
    assert known == {"8888-0.50-seed0": brief(cell), "dense-seed0": brief(dense)}
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
    known = read_table(tmp_path / "records" / "tiny.json")
    dense, half = known["dense-seed0"], known["half-seed0"]
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
    before = (done / "records" / "tiny.json").stat().st_mtime_ns
    assert main(command(done, "--only", "8888-0.50-seed0")) == 0
    assert "run" not in capsys.readouterr().out
    assert (done / "records" / "tiny.json").stat().st_mtime_ns == before


def test_a_lost_record_is_taken_from_the_finished_run(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    table = tmp_path / "records" / "tiny.json"
    table.unlink()
    # The cell names its dense model by the folder it began in, so the copy stands for that folder.
    assert main([*command(done)[:-1], str(tmp_path / "records"), "--only", "8888-0.50"]) == 0
    assert read_table(table) == {
        name: record for name, record in read_table(done / "records" / "tiny.json").items() if name.startswith("8888")
    }, "of the cell that was asked for"


def score(number: float) -> Record:
    """A record that is told from others by its headline's floor."""
    parts: dict[str, dict[str, Any]] = {
        "recipe": {
            "model": "bert", "data": {"task": "mrpc"}, "compress": {"epochs": 3},
            "attention": {"sparsity": 0.9, **{name: {"bits": 8} for name in "qkvp"}},
        },
        "provenance": {"rows": {"train": 10, "eval": 5}, "weights": {}},
    }  # fmt: skip
    return Record(parts["recipe"], "f1", number, parts["provenance"])


def scores(table: Path) -> dict[str, float | None]:
    return {name: record.majority for name, record in read_table(table).items()}


def test_a_dense_model_made_anew_leaves_its_record_alone(
    spec: EvidenceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = plan(spec, tmp_path / "runs", tmp_path / "records")
    made: list[tuple[str, tuple[str, ...]]] = []

    def compress(config: RunConfig, folder: Path, notify: Any, *, stages: Any) -> Record:
        made.append((folder.name, stages))
        (folder / "dense").mkdir(parents=True)
        return score(2.0)

    monkeypatch.setattr("attnpress.studies.evidence.compress", compress)
    table = items[0].table
    table.parent.mkdir()
    table.write_text(table_text({items[0].name: score(1.0)}), encoding="utf-8")
    run_missing(items, items)
    assert made[0] == ("dense-seed0", ("dense",)), "its control is known"
    assert scores(table) == {"dense-seed0": 1.0, "8888-0.50-seed0": 2.0, "4444-0.50-seed0": 2.0}


def test_processes_share_the_runs_of_a_table(
    spec: EvidenceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = plan(spec, tmp_path / "runs", tmp_path / "records")
    dense, eight, four = items
    for item in items:
        item.folder.mkdir(parents=True)
    made, told, waits = [], [], threading.Event()

    def compress(config: RunConfig, folder: Path, notify: Any, *, stages: Any) -> Record:
        made.append(folder.name)
        (folder / "dense").mkdir()
        return score(1.0)

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
        known = read_table(eight.table)
        eight.table.write_text(table_text(known | {eight.name: score(2.0)}), encoding="utf-8")
    here.join(60)
    assert told[-1] == "waiting for the process that is at work on 8888-0.50-seed0"
    assert (made, scores(eight.table)[eight.name]) == ([dense.name, four.name], 2.0)


def test_records_written_at_once_are_all_kept(
    spec: EvidenceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = dataclasses.replace(spec, cells={"8888-0.50": CellSpec(tuple(range(6)))})
    items = [item for item in plan(many, tmp_path / "runs", tmp_path / "records") if item.cell != "dense"]
    for item in items:
        item.folder.mkdir(parents=True)
        assert item.config.checkpoint is not None
        item.config.checkpoint.mkdir(parents=True)
    ready = threading.Barrier(len(items))

    def compress(config: RunConfig, *_: Any, **__: Any) -> Record:
        ready.wait(60)  # all of them end in one moment
        return score(float(config.seed))

    monkeypatch.setattr("attnpress.studies.evidence.compress", compress)
    threads = [threading.Thread(target=run_missing, args=(items, [item], lambda _: None)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert scores(items[0].table) == {f"8888-0.50-seed{seed}": float(seed) for seed in range(6)}


def test_long_records_beside_a_table_count_and_are_taken_into_it(
    done: Path, spec: EvidenceSpec, tmp_path: Path
) -> None:
    long = read_record(done / "runs" / "8888-0.50-seed0")
    apart = tmp_path / "tiny-8888-0.50-seed0.json"
    apart.write_text(to_json(long), encoding="utf-8")
    assert [item.name for item in missing(plan(spec, tmp_path, tmp_path))] == ["dense-seed0", "4444-0.50-seed0"]
    assert fold(tmp_path) == [apart]
    assert read_table(tmp_path / "tiny.json") == {"8888-0.50-seed0": brief(long)}
    assert read_record(apart) == long, "nothing is lost"
    assert fold(tmp_path) == [apart], "again, it is there already"
    apart.write_text(to_json(dataclasses.replace(long, majority=1.0)), encoding="utf-8")
    with pytest.raises(RecordError, match=r"tiny\.json: 8888-0\.50-seed0 already has a different record; remove one"):
        fold(tmp_path)
    assert read_table(tmp_path / "tiny.json") == {"8888-0.50-seed0": brief(long)}


def test_a_file_that_is_no_table_is_left_alone(done: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text("[1, 2]", encoding="utf-8")
    assert main([*command(done)[:-1], str(tmp_path), "--only", "8888-0.50"]) == 1
    assert (tmp_path / "tiny.json").read_text("utf-8") == "[1, 2]"


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
    with pytest.raises(ConfigError, match="rename the cell"):
        parse_spec(EvidenceSpec, data)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "evidence").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_tables_are_what_their_cells_are_called(path: Path, tmp_path: Path) -> None:
    for item in plan(load_spec(EvidenceSpec, path), tmp_path, tmp_path):
        if not item.cell.startswith("dense"):
            bits, asked, *_ = item.cell.split("-")
            assert "".join(str(value) for value in item.config.attention.bits.values()) == bits
            assert item.config.attention.sparsity == pytest.approx(float(asked), abs=0.0021)
