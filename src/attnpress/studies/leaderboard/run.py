"""Run a leaderboard: each dense model and each cell once, resumable; the record is updated after each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnpress.config import ConfigError, RunConfig
from attnpress.config.recipe import comparable, parse_spec, spec_to_dict
from attnpress.files import remove_folder, take_folder, write_text
from attnpress.records.leaderboard import FILE, BaselineRecord, BoardRecord, CellRecord, read_board
from attnpress.records.reading import RecordError, to_json
from attnpress.records.run import Record, StageRecord, read_record
from attnpress.studies.cells import Notify, check_one_process, in_turn
from attnpress.studies.leaderboard.spec import BoardSpec, Cell, plan, teacher_folder, teacher_recipe
from attnpress.studies.teacher import train_student, train_teacher
from attnpress.tasks import check_data


def run_board(board: BoardSpec, output: Path, notify: Notify = print) -> BoardRecord:
    """Run the missing cells of a leaderboard. Any number of processes may do so at once.

    Args:
        board: what to compare.
        output: its folder: `teachers/`, `runs/` and `board.json`. Finished runs are not repeated.
        notify: receives progress messages.

    Returns:
        The record, also written to `output/board.json` before the first run and after each.

    Raises:
        OutputError: the folder contains something other than a leaderboard.
        ConfigError, TaskError, ModelError: found before any training starts, or a folder belongs to another recipe.
    """
    check_one_process()
    cells = plan(board)
    for task in board.tasks:
        check_data(teacher_recipe(board, task, board.seeds[0]).data)
    take_folder(output, "leaderboard", _is_board)
    publish(board, cells, output)

    def missing(some: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in some if _measured(board, cell, output) is None]

    for cell, _ in in_turn(cells, missing, lambda cell: _works_in(cell, output)):
        notify(f"run {cells.index(cell) + 1} of {len(cells)}: {cell.name}")
        stage = run_cell(board, cell, output, notify)
        notify(f"{cell.name}: {next(iter(stage.metrics.values())):.2f} at sparsity {stage.sparsity:.3f}")
        publish(board, cells, output)
    return publish(board, cells, output)


def _is_board(folder: Path) -> bool:
    try:
        read_board(folder)
    except RecordError:
        return False
    return True


def _works_in(cell: Cell, output: Path) -> tuple[Path, Path]:
    return output / "runs" / cell.name, teacher_folder(output, cell.task, cell.seed)


def run_cell(board: BoardSpec, cell: Cell, output: Path, notify: Notify) -> StageRecord:
    """Run one cell, after the dense model it needs. Its record is kept, its compressed weights are not."""
    recipe, folder = teacher_recipe(board, cell.task, cell.seed), output / "runs" / cell.name
    stages = ("dense", "dense_control") if recipe.dense_control else ("dense",)
    dense = train_teacher(recipe, teacher_folder(output, cell.task, cell.seed), notify, stages)[1]
    record = train_student(cell.recipe, dense, folder, notify, stage=cell.stage)
    remove_folder(folder / "progressive", "model")
    stage = record.stage(cell.stage)
    assert stage is not None
    return stage


def publish(board: BoardSpec, cells: list[Cell], output: Path) -> BoardRecord:
    """Write `board.json` with the current state."""
    baselines = [_baseline(output, task, seed) for seed in board.seeds for task in board.tasks]
    found = [_cell_record(cell, _measured(board, cell, output)) for cell in cells]
    record = BoardRecord(spec_to_dict(board), [one for one in baselines if one is not None], found)
    write_text(output / FILE, to_json(record))
    return record


def _baseline(output: Path, task: str, seed: int) -> BaselineRecord | None:
    record = _record(teacher_folder(output, task, seed))
    dense = record.stage("dense") if record else None
    if record is None or dense is None:
        return None
    trained_on = record.stage("dense_control")
    control = trained_on.metrics[record.headline] if trained_on else None
    score = dense.metrics[record.headline]
    return BaselineRecord(task, seed, record.headline, score, control, record.majority, record.provenance)


def _measured(board: BoardSpec, cell: Cell, output: Path) -> Record | None:
    """The record of a complete cell, if its recipe matches the board."""
    record = _record(output / "runs" / cell.name)
    if record is None or record.stage(cell.stage) is None:
        return None
    own = teacher_recipe(board, cell.task, cell.seed).checkpoint
    dense = own or teacher_folder(output, cell.task, cell.seed) / "dense"
    return record if _is_of(record, dataclasses.replace(cell.recipe, checkpoint=dense)) else None


def _is_of(record: Record, recipe: RunConfig) -> bool:
    """True if a record belongs to this recipe; keys added to recipes since have their defaults."""
    try:
        return comparable(parse_spec(RunConfig, record.recipe)) == comparable(recipe)
    except ConfigError:
        return False


def _cell_record(cell: Cell, record: Record | None) -> CellRecord:
    where = (cell.task, cell.rule, cell.asked, cell.seed)
    stage = record.stage(cell.stage) if record else None
    if record is None or stage is None:
        return CellRecord(*where)
    plain: dict[str, Any] = dataclasses.asdict(stage)
    del plain["layers"], plain["row_scores"]
    return CellRecord(*where, plain, record.provenance["weights"].get("dense"))


def _record(folder: Path) -> Record | None:
    try:
        return read_record(folder)
    except RecordError:
        return None
