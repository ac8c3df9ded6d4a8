"""Cycles on parallel lanes, by hand and against properties that any schedule has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpress.core.lanes import PIECE, LaneCycles, lane_cycles, makespan, pieces

ROWS = st.lists(st.integers(0, 60), max_size=80)


def test_cycles_by_hand() -> None:
    # Groups in order: (9, 1), (2, 2), (7): 9 + 2 + 7. Packed on two lanes: 9 + 2 and 7 + 2 + 1.
    assert lane_cycles([9, 1, 2, 2, 7], 2) == LaneCycles(in_order=18, packed=11, split=11, ideal=11)
    assert lane_cycles([20, 1, 1, 1], 4) == LaneCycles(in_order=20, packed=20, split=9, ideal=6)
    assert lane_cycles([], 16) == lane_cycles([0, 0], 16) == LaneCycles(0, 0, 0, 0)


def test_a_row_that_is_split_pays_for_each_further_sum() -> None:
    assert pieces(PIECE) == [PIECE]
    assert pieces(PIECE + 1) == [PIECE, 2]
    assert pieces(2 * PIECE + 3) == [PIECE, PIECE + 1, 4]


@given(ROWS, st.integers(1, 32))
def test_no_schedule_beats_the_ideal_or_the_longest_row(rows: list[int], lanes: int) -> None:
    found = lane_cycles(rows, lanes)
    assert found.ideal == -(-sum(rows) // lanes)
    assert found.ideal <= found.split
    assert max(found.ideal, *rows, 0) <= found.packed <= found.in_order
    assert found.packed <= sum(rows) / lanes + max([*rows, 0])
    assert sum(sum(pieces(row)) - (len(pieces(row)) - 1) for row in rows if row) == sum(rows)


@given(ROWS)
def test_one_lane_does_all(rows: list[int]) -> None:
    found = lane_cycles(rows, 1)
    assert found.in_order == found.packed == found.ideal == sum(rows)


@pytest.mark.parametrize(("jobs", "lanes", "end"), [([3, 3, 2, 2, 2], 2, 7), ([5], 3, 5), ([], 2, 0), ([1] * 7, 3, 3)])
def test_longest_first_to_the_lane_that_ends_earliest(jobs: list[int], lanes: int, end: int) -> None:
    assert makespan(jobs, lanes) == end
