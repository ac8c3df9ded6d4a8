"""Load balance as defined by Sanger (Lu et al., MICRO 2021), in the file format of its public benchmark script.

The script, bench_sanger.py of github.com/hatsu3/Sanger, averages each column of `load_balance.csv`. It calls the share
of kept pairs "overall-sparsity"; this is the density.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from attnpress.export.sequences import AttendedSequence

FILE = "load_balance.csv"
PORTS = 64
"""Keys per vector, the width of Sanger's array."""

HALF, QUARTER = 32, 16
"""Multipliers per row of the array: 50 % and 25 % of the ports."""

HEADER = (
    "50%-no-skip",
    "50%-skip",
    "25%-no-skip",
    "25%-skip",
    "overall-sparsity",
    "50%-empty-counted",
    "25%-empty-counted",
)


@dataclass(frozen=True)
class SangerRow:
    """One line, in the order of HEADER: utilization of the multipliers, 0 to 1, after vectors were split.

    With skip, vectors without a survivor use no slot. Without it, Sanger's own code adds one slot for each vector that
    has survivors; its published figures follow that, and so do these. The last two columns add one for each vector
    without survivors instead.
    """

    half_no_skip: float
    half_skip: float
    quarter_no_skip: float
    quarter_skip: float
    density: float
    half_empty: float
    quarter_empty: float


def sanger_row(sequence: AttendedSequence) -> SangerRow:
    """The line for one sequence in one layer."""
    survivors, valid = (_vectors(mask) for mask in (sequence.codes > 0, sequence.valid.expand_as(sequence.codes)))
    counts = survivors[valid > 0]
    full, some = float(counts.sum()), int((counts > 0).sum())
    slots = {width: int((counts + width - 1).div(width, rounding_mode="floor").sum()) for width in (HALF, QUARTER)}

    def utilization(width: int, added: int) -> float:
        return full / width / max(1, slots[width] + added)

    empty = len(counts) - some
    return SangerRow(
        utilization(HALF, some),
        utilization(HALF, 0),
        utilization(QUARTER, some),
        utilization(QUARTER, 0),
        full / max(1, int(valid.sum())),
        utilization(HALF, empty),
        utilization(QUARTER, empty),
    )


def _vectors(mask: torch.Tensor) -> torch.Tensor:
    """Pairs in each vector of PORTS keys; int64 [H, rows, vectors]."""
    padded = F.pad(mask.long(), (0, -mask.shape[-1] % PORTS))
    found: torch.Tensor = padded.unflatten(-1, (-1, PORTS)).sum(-1)
    return found


def write_sanger(sequences: Iterable[AttendedSequence], folder: Path) -> None:
    """Write `load_balance.csv`: one line for each sequence in each layer."""
    with (folder / FILE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEADER)
        table.writerows([f"{value:.6f}" for value in astuple(sanger_row(one))] for one in sequences)
