"""Record of a leaderboard: its baselines and its cells, including those not run yet. Plain JSON, `board.json`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpress.records.reading import Amount, RecordError, Share, build_record, read_json
from attnpress.records.run import RowsPart

FORMAT = 1
FILE = "board.json"


@dataclass(frozen=True)
class BaselineRecord:
    """The dense model of one task and seed.

    Attributes:
        headline: name of the metric that is compared.
        dense: its score in points.
        control: score of the dense model trained equally long; None if it was not requested.
        majority: score of always predicting the most frequent class; None outside classification.
        provenance: of its run: versions, data, weights, rows, machine.
    """

    task: str
    seed: int
    headline: str
    dense: float
    control: float | None
    majority: float | None
    provenance: dict[str, Any]

    @property
    def reference(self) -> float:
        """The score that compressed models are compared with: the control if there is one, else `dense`."""
        return self.dense if self.control is None else self.control


@dataclass(frozen=True)
class CellRecord:
    """One rule at one sparsity, on one task, with one seed.

    Attributes:
        asked: requested sparsity.
        measured: the `StageRecord` as plain data, without its layers; None if the cell was not run yet.
        weights: hash of the initial dense weights.
    """

    task: str
    rule: str
    asked: Share
    seed: int
    measured: dict[str, Any] | None = None
    weights: str | None = None


@dataclass(frozen=True)
class BoardRecord:
    """A whole leaderboard.

    Attributes:
        board: the BoardSpec as plain data.
        baselines: those that were run.
        cells: all cells of the board.
    """

    board: dict[str, Any]
    baselines: list[BaselineRecord]
    cells: list[CellRecord]
    format: int = FORMAT

    def baseline(self, task: str, seed: int) -> BaselineRecord | None:
        """The dense model of a task and seed; None if it was not run."""
        return next((one for one in self.baselines if (one.task, one.seed) == (task, seed)), None)


def read_board(folder: Path) -> BoardRecord:
    """Read `board.json` of a leaderboard's folder.

    Raises:
        RecordError: the file is missing, damaged or of a newer format.
    """
    file = folder / FILE
    record = read_json(file, FORMAT, BoardRecord)
    board = build_record(BoardPart, record.board, f"{file}: board", extra=True)
    for one in record.baselines:
        build_record(ProvenancePart, one.provenance, f"{file}: baseline of {one.task!r:.40}", extra=True)
        _check_known(file, one.task, board.tasks)
    for cell in record.cells:
        _check_known(file, cell.task, board.tasks)
        _check_known(file, cell.rule, board.rules)
        if cell.measured is not None:
            where = f"{file}: cell {cell.rule} of {cell.task}"
            found = build_record(MeasuredPart, cell.measured, where, extra=True)
            known = record.baseline(cell.task, cell.seed)
            if not found.metrics or (known is not None and known.headline not in found.metrics):
                raise RecordError(f"{where}: damaged ('metrics'): the headline is missing")
    return record


def _check_known(file: Path, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise RecordError(f"{file}: damaged: {name!r:.40} is there, but the board has no such task or rule")


@dataclass(frozen=True)
class EntryPart:
    """Fields of a rule that a page shows."""

    attention: dict[str, Any]
    predictor_bits: int | None


@dataclass(frozen=True)
class BoardPart:
    """Fields of the specification that a page shows."""

    tasks: dict[str, Any]
    rules: dict[str, EntryPart]
    seeds: list[int]


@dataclass(frozen=True)
class ProductPart:
    """Bits of the two matrices whose product the mask is computed from."""

    q: int | float | None
    k: int | float | None


@dataclass(frozen=True)
class MeasuredPart:
    """Fields of a cell that a page shows."""

    metrics: dict[str, float]
    sparsity: Share
    pruned: Share
    keys_per_row: Amount
    bits: ProductPart


@dataclass(frozen=True)
class ProvenancePart:
    """Fields of the provenance that a page shows."""

    rows: RowsPart
