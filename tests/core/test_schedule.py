"""The asked sparsity: ends, limits, monotony, and the formula of each kind."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpress.config import ScheduleName, ScheduleSpec
from attnpress.core.schedule import sparsity_at

KINDS: tuple[ScheduleName, ...] = get_args(ScheduleName)
AT_ONCE = ("constant", "fixed")
FRACTIONS = st.floats(0, 1)
SPARSITIES = st.floats(0, 1, exclude_max=True)
TOTALS = st.integers(1, 5000)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleSpec:
    begin, end = sorted((draw(FRACTIONS), draw(FRACTIONS)))
    kind: ScheduleName = draw(st.sampled_from(KINDS))
    return ScheduleSpec(kind=kind, begin=begin, end=end, start=draw(SPARSITIES), steps=draw(st.integers(1, 20)))


@given(schedules(), SPARSITIES, TOTALS)
def test_both_ends_are_exact(spec: ScheduleSpec, target: float, total: int) -> None:
    first = target if spec.kind in AT_ONCE or spec.end == 0 else min(spec.start, target)
    assert sparsity_at(0, total, spec, target) == first
    assert sparsity_at(total, total, spec, target) == target
    for step in range(0, total + 1, max(1, total // 50)):
        found = sparsity_at(step, total, spec, target)
        if step / total >= spec.end:
            assert found == target
        elif step / total <= spec.begin:
            assert found == first


@given(schedules(), SPARSITIES, TOTALS)
def test_sparsity_never_falls_and_stays_between_its_ends(spec: ScheduleSpec, target: float, total: int) -> None:
    path = [sparsity_at(step, total, spec, target) for step in range(0, total + 1, max(1, total // 200))]
    assert path == sorted(path)
    assert min(spec.start, target) <= path[0]
    assert path[-1] <= target


@given(schedules(), TOTALS)
def test_a_target_of_zero_asks_for_nothing(spec: ScheduleSpec, total: int) -> None:
    assert {sparsity_at(step, total, spec, 0.0) for step in range(0, total + 1, max(1, total // 50))} == {0.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jump", [0, 50, 100])
def test_an_interval_without_length_is_a_jump(kind: ScheduleName, jump: int) -> None:
    spec = ScheduleSpec(kind=kind, begin=jump / 100, end=jump / 100, start=0.2)
    before = 0.9 if kind in AT_ONCE else 0.2
    assert [sparsity_at(step, 100, spec, 0.9) for step in range(101)] == [before] * jump + [0.9] * (101 - jump)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_without_steps_asks_for_a_legal_sparsity(kind: ScheduleName) -> None:
    assert 0.1 <= sparsity_at(0, 0, ScheduleSpec(kind=kind, start=0.1), 0.9) <= 0.9


def test_each_kind_follows_its_formula() -> None:
    halfway = {
        kind: sparsity_at(45, 100, ScheduleSpec(kind=kind, begin=0.2, end=0.7, start=0.1, steps=3), 0.9)
        for kind in KINDS
    }
    assert halfway == {
        "fixed": 0.9,
        "constant": 0.9,
        "linear": pytest.approx(0.5),
        "cubic": pytest.approx(0.9 - 0.8 / 8),
        "step": pytest.approx(0.1 + 0.8 / 3),
    }


def test_steps_are_equal_rises() -> None:
    spec = ScheduleSpec(kind="step", begin=0.0, end=1.0, steps=4)
    path = [sparsity_at(step, 16, spec, 0.8) for step in range(17)]
    assert path == pytest.approx([0.0] * 4 + [0.2] * 4 + [0.4] * 4 + [0.6] * 4 + [0.8])
