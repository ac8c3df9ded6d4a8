"""Linear layers in 8 bits: their integers, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attnpress.core.linear import (
    ProductPlan,
    Step,
    fake_quantize_linear,
    input_codes,
    linear,
    step_of,
    weight_codes,
)

BOUNDS = st.floats(-1e4, 1e4, width=32)


def test_codes_round_half_to_even_around_the_zero_point() -> None:
    x = torch.tensor([-9.0, -1.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.0, 200.0, torch.inf])
    assert input_codes(x, Step(0.5, 3)).tolist() == [0, 1, 1, 3, 3, 3, 5, 5, 255, 255]


@given(BOUNDS, BOUNDS)
def test_a_step_covers_its_range_and_gives_zero_a_code_of_its_own(one: float, other: float) -> None:
    low, high = sorted((one, other))
    step = step_of(low, high)
    codes = input_codes(torch.tensor([low, 0.0, high]), step)
    assert codes[1] == step.zero_point
    seen = (codes.double() - step.zero_point) * step.scale
    assert torch.allclose(seen, torch.tensor([low, 0.0, high]).double(), atol=step.scale * 1.01)


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_ranges_that_no_step_covers_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="no step covers that"):
        step_of(low, high)


def test_weights_are_symmetric_with_a_scale_for_each_output() -> None:
    weight = torch.tensor([[1.27, -0.635, 0.0], [0.0, 0.0, 0.0], [-254.0, 1.0, 3.0]])
    codes, scale = weight_codes(weight)
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 0, 2]]
    assert scale.tolist() == pytest.approx([0.01, 1.0, 2.0])


def test_the_product_is_that_of_what_the_codes_stand_for() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 48), torch.randn(16, 48), torch.randn(16)
    plan = ProductPlan(float(x.min()), float(x.max()))
    codes, scale = weight_codes(weight)
    found = linear(input_codes(x, plan.step), plan.step, codes, scale, bias)
    assert torch.allclose(found, fake_quantize_linear(x, weight, bias, plan.step), atol=1e-4)
    exact = F.linear(x, weight, bias)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.02
