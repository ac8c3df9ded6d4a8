"""How evenly the survivors of P share out over parallel lanes: cycles of P V, from the survivors of each row.

A lane adds one survivor a cycle: its P code times the V codes of one key. All lanes work on one head and sequence,
since they share its V; the next begins when the last lane has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

LANES = (16, 32, 64, 128)

PIECE = 8
"""Survivors in a piece of a row that is split."""


@dataclass(frozen=True)
class LaneCycles:
    """Cycles of P V.

    Attributes:
        in_order: rows in their order, as many at a time as there are lanes; a group ends with its longest row.
        packed: each row, longest first, to the lane that ends earliest (Graham, "Bounds on multiprocessing timing
            anomalies", 1969: at most 4/3 of the best).
        split: likewise, rows cut into pieces of PIECE survivors; a piece after the first takes a cycle more, in which
            its sum is added to that of the row (cf. "pack and split" in Sanger, Lu et al., MICRO 2021).
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
    """Cycles of each piece of a row that is split."""
    later = [min(PIECE, row - begin) + 1 for begin in range(PIECE, row, PIECE)]
    return [min(PIECE, row), *later]


def makespan(jobs: Sequence[int], lanes: int) -> int:
    """When the last lane ends, if each job, longest first, goes to the lane that ends earliest."""
    if len(jobs) <= lanes:
        return max(jobs, default=0)
    ends = [0] * lanes
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(ends, ends[0] + job)
    return max(ends)
