"""A whole leaderboard on a tiny model: equal terms, one dense model a task, and nothing run twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnpress.cli import main
from attnpress.config import ConfigError, RunConfig, TrainSpec
from attnpress.config.recipe import dump_config, load_spec
from attnpress.files import take_folder
from attnpress.locks import alone
from attnpress.records.leaderboard import BoardRecord, read_board
from attnpress.records.run import read_record
from attnpress.runs.compression import compress
from attnpress.studies.leaderboard import BoardSpec, EntrySpec, run_board
from attnpress.studies.leaderboard.spec import Cell, plan, teacher_folder

SHORT = TrainSpec(epochs=1, learning_rate=1e-3, batch_size=16, checkpoints=1)
RULES = {
    "ours": EntrySpec("this project"),
    "fixed": EntrySpec("Sanger", {"rule": "threshold"}, {"kind": "fixed"}, predictor_bits=4),
    "inference": EntrySpec("spiqa", {"rule": "threshold"}, stage="one_shot"),
    "trained": EntrySpec("LeOPArd", {"threshold_penalty": 20.0}, {"kind": "constant", "start": 0.4}),
    "two-of-four": EntrySpec("DFSS", {"rule": "nm"}, {"kind": "constant"}, sparsities=(0.5,)),
}


@pytest.fixture(scope="module")
def board(tiny_recipe: RunConfig) -> BoardSpec:
    recipe = dataclasses.replace(tiny_recipe, dense=SHORT, compress=SHORT, dense_control=True)
    tasks = {"reviews": {}, "short": {"data": {"train_rows": 64}}}
    return BoardSpec(recipe, tasks, RULES, sparsities=(0.7,))


@pytest.fixture(scope="module")
def folder(board: BoardSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a board whose first task was run to its end, and whose second was interrupted after its first cell."""
    folder = tmp_path_factory.mktemp("board") / "study"
    folder.with_name("board.yaml").write_text(dump_config(board), encoding="utf-8")

    def stop(line: str) -> None:
        if line.startswith("run ") and "short-fixed" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_board(board, folder, stop)
    return folder


@pytest.fixture(scope="module")
def record(folder: Path) -> BoardRecord:
    return read_board(folder)


def test_the_record_of_an_interrupted_board_names_what_is_missing(record: BoardRecord, board: BoardSpec) -> None:
    done = [(cell.task, cell.rule) for cell in record.cells if cell.measured]
    assert done == [("reviews", rule) for rule in RULES] + [("short", "ours")]
    assert len(record.cells) == len(plan(board)) == 2 * len(RULES)
    assert [one.task for one in record.baselines] == ["reviews", "short"]
    assert all(one.control is not None for one in record.baselines)


def test_every_cell_began_from_the_dense_model_of_its_task(record: BoardRecord, folder: Path) -> None:
    for cell in record.cells:
        if cell.measured is not None:
            teacher = read_record(folder / "teachers" / f"{cell.task}-seed0")
            assert cell.weights == teacher.provenance["weights"]["dense"]
            assert cell.measured["bits"] == {"q": 8, "k": 8, "v": 8, "p": 8}


def test_every_rule_prunes_about_what_it_is_asked_for(record: BoardRecord) -> None:
    pruned = {cell.rule: cell.measured["pruned"] for cell in record.cells if cell.task == "reviews" and cell.measured}
    assert pruned["ours"] == pytest.approx(0.7, abs=0.05)
    assert pruned["inference"] == pytest.approx(0.7, abs=0.05)
    assert pruned["two-of-four"] == pytest.approx(0.5, abs=0.12), "groups at the end of short rows lose less"
    assert pruned["fixed"] == pytest.approx(0.7, abs=0.15), "the model moves, its threshold does not"
    assert 0.55 <= pruned["trained"] <= 0.95, "the penalty counts a soft gate, so the hard cut may exceed the request"


def test_only_rules_that_train_have_trained(record: BoardRecord, folder: Path) -> None:
    for cell in record.cells:
        if cell.measured is not None:
            run = read_record(folder / "runs" / f"{cell.task}-{cell.rule}-{cell.asked:g}-seed0")
            assert [stage.name for stage in run.stages] == [cell.measured["name"]]
            assert bool(run.training) == (cell.rule != "inference")
    assert not list(folder.glob("runs/*/progressive")), "weights are not kept"


def test_a_finished_run_is_not_run_again_and_the_command_ends_the_rest(
    folder: Path, record: BoardRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def watched(config: RunConfig, output: Path, *args: object, **options: object) -> object:
        trained.append(output.name)
        return compress(config, output, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("attnpress.studies.teacher.compress", watched)
    assert main(["leaderboard", str(folder.with_name("board.yaml")), "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "run 7 of 10: short-fixed-0.7-seed0" in printed
    assert "run 6 of 10" not in printed
    rules = [name for name in trained if name != "short-seed0"]
    assert rules == [f"short-{rule}-{0.5 if rule == 'two-of-four' else 0.7}-seed0" for rule in list(RULES)[1:]]
    assert all(cell.measured is not None for cell in read_board(folder).cells)


def test_what_another_process_is_at_work_on_comes_last(
    board: BoardSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = plan(board)
    begun: list[str] = []

    def run_cell(_: BoardSpec, cell: Cell, *__: Any) -> Any:
        begun.append(cell.name)
        return SimpleNamespace(metrics={"f1": 0.0}, sparsity=0.0)

    monkeypatch.setattr("attnpress.studies.leaderboard.run.run_cell", run_cell)
    take_folder(tmp_path, "leaderboard")
    with alone(tmp_path / "runs" / first.name, lambda: None):
        run_board(board, tmp_path)
    assert begun == [*(cell.name for cell in rest), first.name]
    with alone(teacher_folder(tmp_path, first.task, first.seed), lambda: None):
        run_board(board, tmp_path)
    assert begun[len(rest) + 1] == next(cell.name for cell in rest if cell.task != first.task), "nor its dense model"


def test_a_changed_board_is_refused_rather_than_mixed(board: BoardSpec, folder: Path, record: BoardRecord) -> None:
    other = dataclasses.replace(board, recipe=dataclasses.replace(board.recipe, compress=TrainSpec(epochs=0.5)))
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        run_board(other, folder, lambda _: None)
    run_board(board, folder, lambda _: None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.short.data.tsak=mrpc", "tasks.short, rules.ours: data.tsak: unknown key; did you mean 'task'"),
        ("rules.ours.attention.rule=top", "rules.ours: attention.rule: Input should be"),
        ("rules.two-of-four.sparsities=[0.9]", "rule 'nm' prunes 0.25, 0.5 or 0.75"),
        ("rules.a/b.source=x", "a/b: use letters, digits and hyphens for names of tasks"),
        ("sparsities=[]", "nothing to compare"),
    ],
)
def test_a_mistake_is_named(board: BoardSpec, tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "board.yaml"
    file.write_text(dump_config(dataclasses.replace(board, rules={**RULES})), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_spec(BoardSpec, file, [override] if "sparsities=[]" not in override else [override, "rules={}"])
