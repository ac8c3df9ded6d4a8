"""The integer exponential against 2^-x in float64, over every input it can get."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnpress.core.exponential import (
    LOG2_E,
    ONE,
    STEPS_PER_OCTAVE,
    T_MAX,
    code_table,
    exponent,
    exponent_rate,
    power,
    power_table,
    row_codes,
)
from tests.core.factories import SEEDS, normal

EVERY_T = torch.arange(T_MAX + 1)
LARGEST_DISTANCE = 2 * 127 * 127 * 1024
"""Of 8-bit codes and a head of 1024."""

ALPHAS = st.floats(2.0**-40, 2.0**10, width=32)
DISTANCES = st.integers(0, LARGEST_DISTANCE)


def real_power(t: Tensor) -> Tensor:
    return torch.exp2(-t.double() / STEPS_PER_OCTAVE)


def bound(p: Tensor) -> Tensor:
    """2^-10 relative or 2^-16 absolute, whichever is larger."""
    return (p * 2**-10).clamp(min=2**-16)


def python_power(t: int) -> int:
    """The documented evaluation in Python's own integers."""
    octaves, fraction = divmod(t, 1024)
    x = fraction * 64
    inner = 15148 - (x * 2596 >> 16)
    middle = 45324 - (x * inner >> 16)
    value = 65536 - (x * middle >> 16)
    return value if octaves == 0 else (value + 2 ** (octaves - 1)) // 2**octaves


def end_to_end(alpha: float, distance: int) -> int:
    rate = exponent_rate(torch.tensor([alpha]))
    return int(power(exponent(torch.tensor([distance]), rate)))


def test_power_is_what_python_integers_give() -> None:
    assert power(EVERY_T).tolist() == [python_power(t) for t in range(T_MAX + 1)]


def test_power_is_one_exactly_at_zero_and_zero_at_the_end() -> None:
    values = power(EVERY_T)
    assert int(values[0]) == ONE
    assert int(values[1]) < ONE, "one is reached at zero only"
    assert int(values[T_MAX]) == 0
    assert not values[17 * STEPS_PER_OCTAVE + 1 :].any(), "so kernels may saturate earlier"


def test_power_falls_steadily_within_its_range() -> None:
    values = power(EVERY_T)
    assert bool((values.diff() <= 0).all())
    assert (int(values.min()), int(values.max())) == (0, ONE)


def test_power_keeps_its_own_bound_at_every_t() -> None:
    p = real_power(EVERY_T)
    error = (power(EVERY_T).double() / ONE - p).abs()
    assert bool((error <= p * 2**-13 + 2**-17).all())


def test_probability_keeps_the_bound_wherever_t_was_rounded_from() -> None:
    found = power(EVERY_T).double() / ONE
    for shift in (-0.5, 0.0, 0.5):
        p = real_power((EVERY_T + shift).clamp(min=0))
        assert bool(((found - p).abs() <= bound(p)).all())


@given(ALPHAS, DISTANCES)
def test_probability_keeps_the_bound_from_alpha_and_distance(alpha: float, distance: int) -> None:
    p = torch.tensor(math.exp2(-distance * alpha * math.log2(math.e)), dtype=torch.float64)
    assert float((torch.tensor(end_to_end(alpha, distance) / ONE) - p).abs()) <= float(bound(p))


@given(st.floats(0, 20), st.integers(1, 10**6))
def test_probability_keeps_the_bound_where_it_is_neither_one_nor_zero(nats: float, distance: int) -> None:
    alpha = float(np.float32(nats / distance))
    p = torch.tensor(math.exp(-distance * alpha), dtype=torch.float64)
    assert float((torch.tensor(end_to_end(alpha, distance) / ONE) - p).abs()) <= float(bound(p))


@given(ALPHAS, DISTANCES, DISTANCES)
def test_a_larger_distance_is_never_more_probable(alpha: float, one: int, other: int) -> None:
    near, far = sorted((one, other))
    assert end_to_end(alpha, near) >= end_to_end(alpha, far)


@given(ALPHAS, DISTANCES)
def test_exponent_is_one_float32_product_and_one_rounding(alpha: float, distance: int) -> None:
    rate = exponent_rate(torch.tensor(alpha))
    expected = np.float32(alpha) * np.float32(LOG2_E) * np.float32(STEPS_PER_OCTAVE)
    assert float(rate) == float(expected)
    t = exponent(torch.tensor(distance), rate)
    assert t.dtype == torch.int32
    assert int(t) == min(round(float(np.float32(distance) * expected)), T_MAX)


def test_exponent_rounds_halves_to_even_and_saturates() -> None:
    distance = torch.tensor([0.0, 1.0, 3.0, 5.0, 1e9, math.inf])
    assert exponent(distance, torch.tensor(0.5)).tolist() == [0, 0, 2, 2, T_MAX, T_MAX]


def test_exponent_leaves_the_distances_alone() -> None:
    distance = torch.tensor([1.0, 2.0, math.inf])
    exponent(distance, torch.tensor(3.0))
    assert distance.tolist() == [1, 2, math.inf]


@pytest.mark.parametrize("qmax", [2**bits - 1 for bits in range(1, 9)])
def test_row_codes_are_rounded_fractions_of_the_row_maximum(qmax: int) -> None:
    codes = row_codes(power(EVERY_T), qmax)
    assert codes.tolist() == [(python_power(t) * qmax + 2**15) // 2**16 for t in range(T_MAX + 1)]
    assert (int(codes[0]), int(codes[-1])) == (qmax, 0)
    # Half a step, and the bound of p~ itself.
    assert bool(((codes / qmax - real_power(EVERY_T)).abs() <= 0.5 / qmax + bound(real_power(EVERY_T))).all())


@pytest.mark.parametrize("qmax", [3, 15, 127, 255])
def test_tables_hold_the_functions(qmax: int) -> None:
    device = torch.device("cpu")
    assert torch.equal(power_table(device), power(EVERY_T))
    assert code_table(qmax, device).dtype == torch.uint8
    assert torch.equal(code_table(qmax, device).int(), row_codes(power(EVERY_T), qmax))


@given(SEEDS)
def test_power_takes_any_integer_dtype_and_layout(seed: int) -> None:
    t = (normal(seed, 6, 4).abs() * 4000).long().clamp(max=T_MAX)
    expected = [[python_power(x) for x in row] for row in t.T.tolist()]
    for view in (t.T, t.T.int(), t.T.short()):
        assert power(view).tolist() == expected
