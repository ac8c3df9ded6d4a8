"""Linear layers in 8 bits: their integers, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attnpress.core.linear import LEVELS, decode, fake_quantize_linear, linear, token_codes, weight_codes

ROWS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9)


def test_codes_round_half_to_even_around_the_zero_point() -> None:
    coded = token_codes(torch.tensor([[-1.5, -1.0, -0.75, -0.25, 0.0, 0.25, 0.75, 126.0]]))
    assert coded.scale.tolist() == [0.5]
    assert coded.zero.tolist() == [3.0]
    assert coded.codes.tolist() == [[0, 1, 1, 3, 3, 3, 5, 255]]


@given(ROWS)
def test_each_token_is_covered_and_zero_has_a_code_of_its_own(row: list[float]) -> None:
    x = torch.tensor([[*row, 0.0], [0.0] * (len(row) + 1)])
    coded = token_codes(x)
    assert coded.codes[:, -1].tolist() == coded.zero.tolist()
    assert torch.allclose(decode(coded), x, atol=float(coded.scale[0]) * 1.01)
    assert decode(coded)[1].tolist() == x[1].tolist()


def test_all_codes_serve_a_row_without_negative_numbers() -> None:
    coded = token_codes(torch.tensor([[0.1, 3.0, 7.0]]))
    assert coded.zero.tolist() == [0.0]
    assert coded.codes.tolist() == [[round(0.1 / 7 * LEVELS), round(3 / 7 * LEVELS), LEVELS]]


def test_what_is_no_number_becomes_the_code_of_zero_and_infinity_the_last() -> None:
    coded = token_codes(torch.tensor([[torch.nan, -1.0, 1.0], [torch.inf, 1.0, -1.0], [torch.nan] * 3]))
    assert coded.codes[0, 0] == coded.zero[0]
    assert coded.codes[1].tolist() == [255, 0, 0]
    assert coded.codes[2].tolist() == [0, 0, 0]


def test_weights_are_symmetric_with_a_scale_for_each_output() -> None:
    weight = torch.tensor([[1.27, -0.635, 0.0], [0.0, 0.0, 0.0], [-254.0, 1.0, 3.0]])
    codes, scale = weight_codes(weight)
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 0, 2]]
    assert scale.tolist() == pytest.approx([0.01, 1.0, 2.0])


def test_the_product_is_that_of_what_the_codes_stand_for() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 48), torch.randn(16, 48), torch.randn(16)
    codes, scale = weight_codes(weight)
    found = linear(token_codes(x), codes, scale, bias)
    assert torch.allclose(found, fake_quantize_linear(x, weight, bias), atol=1e-4)
    exact = F.linear(x, weight, bias)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.02
