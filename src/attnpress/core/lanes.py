"""Load balance of the survivors of P over parallel lanes: cycles of P V, from the survivors of each row.

A lane adds one survivor per cycle: its P code times the V codes of one key. All lanes work on one head and sequence,
since they share its V; the next one starts when the last lane has finished.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

LANES = (16, 32, 64, 128)

PIECE = 8
"""Survivors per piece of a split row."""


@dataclass(frozen=True)
class LaneCycles:
    """Cycles of P V under different schedules.

    Attributes:
        in_order: rows in order, one per lane at a time; a group takes as long as its longest row.
        packed: each row, longest first, goes to the lane that finishes earliest (Graham, "Bounds on multiprocessing
            timing anomalies", 1969: at most 4/3 of the optimum).
        split: like packed, with rows split into pieces of PIECE survivors; each piece after the first takes one more
            cycle, to add its sum to that of the row (cf. "pack and split" in Sanger, Lu et al., MICRO 2021).
        ideal: survivors over lanes, rounded up.
    """

    in_order: int
    packed: int
    split: int
    ideal: int

    def __add__(self, other: LaneCycles) -> LaneCycles:
        return LaneCycles(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


NO_CYCLES = LaneCycles(0, 0, 0, 0)


def lane_cycles(survivors: Iterable[int], lanes: int) -> LaneCycles:
    """Cycles of one head on one sequence.

    Args:
        survivors: of each row; rows without any take no cycle.
        lanes: at least 1.
    """
    rows = [count for count in survivors if count > 0]
    groups = [rows[begin : begin + lanes] for begin in range(0, len(rows), lanes)]
    return LaneCycles(
        in_order=sum(map(max, groups)),
        packed=makespan(rows, lanes),
        split=makespan([piece for row in rows for piece in pieces(row)], lanes),
        ideal=-(-sum(rows) // lanes),
    )


def pieces(row: int) -> list[int]:
    """Cycles of each piece of a split row."""
    later = [min(PIECE, row - begin) + 1 for begin in range(PIECE, row, PIECE)]
    return [min(PIECE, row), *later]


def makespan(jobs: Sequence[int], lanes: int) -> int:
    """Finishing time of the last lane, if each job, longest first, goes to the lane that finishes earliest."""
    if len(jobs) <= lanes:
        return max(jobs, default=0)
    ends = [0] * lanes
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(ends, ends[0] + job)
    return max(ends)
