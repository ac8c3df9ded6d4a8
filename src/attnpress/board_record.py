"""The record of a leaderboard: its baselines and its cells, those not run yet among them. Plain JSON, `board.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpress.results import read_json

FORMAT = 1
FILE = "board.json"


@dataclass(frozen=True)
class BaselineRecord:
    """The dense model of one task and seed.

    Attributes:
        headline: name of the metric that is compared.
        dense: its score in points.
        control: score of the dense model trained on, as long as the compressed ones; None where that was not asked for.
        majority: score of always answering the commonest class; None outside classification.
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
        """What compressed models are held against: the dense model that was trained as long, where there is one."""
        return self.dense if self.control is None else self.control


@dataclass(frozen=True)
class CellRecord:
    """One rule at one sparsity, on one task, with one seed.

    Attributes:
        asked: sparsity.
        measured: the `StageRecord` as plain data, without its layers; None where the cell is still to be run.
        weights: hash of the dense weights from which it began.
    """

    task: str
    rule: str
    asked: float
    seed: int
    measured: dict[str, Any] | None = None
    weights: str | None = None


@dataclass(frozen=True)
class BoardRecord:
    """A whole leaderboard.

    Attributes:
        board: the BoardSpec as plain data.
        baselines: those that were run.
        cells: all that the board asks for.
    """

    board: dict[str, Any]
    baselines: list[BaselineRecord]
    cells: list[CellRecord]
    format: int = FORMAT

    def baseline(self, task: str, seed: int) -> BaselineRecord | None:
        """The dense model of a task and seed, if it was run."""
        return next((one for one in self.baselines if (one.task, one.seed) == (task, seed)), None)


def read_board(folder: Path) -> BoardRecord:
    """Read `board.json` of a leaderboard's folder.

    Raises:
        RecordError: no such file, of a newer format, or damaged.
    """
    return read_json(folder / FILE, FORMAT, BoardRecord)
