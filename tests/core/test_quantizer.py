"""Codes, scales and their gradients against the definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnpress.core.quantizer import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    dequantize,
    learned_step,
    positive_scale,
    quantize,
    quantize_straight_through,
    smooth_key,
    token_scale,
)
from tests.core.factories import SEEDS, make_mask, normal, random_scale, wounded

BITS = st.integers(2, 8)
SCALES = st.floats(SMALLEST_SCALE, LARGEST_SCALE, width=32)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def largest_code(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def on_scale(scale: float) -> Tensor:
    return torch.tensor(scale, dtype=torch.float32)


@given(BITS, SCALES)
def test_codes_of_the_grid_are_the_grid(bits: int, scale: float) -> None:
    qmax = largest_code(bits)
    codes = torch.arange(-qmax, qmax + 1).float()
    assert torch.equal(quantize(dequantize(codes, on_scale(scale)), on_scale(scale), qmax), codes)


@given(BITS, SCALES, SEEDS)
def test_codes_are_symmetric_integers_within_range(bits: int, scale: float, seed: int) -> None:
    qmax = largest_code(bits)
    x = wounded(normal(seed, 200) * scale * qmax, seed)
    codes = quantize(x, on_scale(scale), qmax)
    assert torch.equal(codes, codes.round())
    assert int(codes.abs().max()) <= qmax, "the code -2^(bits-1) is never used"
    assert torch.equal(quantize(-x, on_scale(scale), qmax), -codes)


@given(BITS, SCALES, SEEDS)
def test_dequantized_values_are_within_half_a_step_inside_the_range(bits: int, scale: float, seed: int) -> None:
    qmax = largest_code(bits)
    x = normal(seed, 200).tanh() * qmax * scale
    error = (dequantize(quantize(x, on_scale(scale), qmax), on_scale(scale)).double() - x.double()).abs()
    rounding = 3 * torch.finfo(torch.float32).eps * qmax  # of 1 / scale, of the product, of code * scale
    assert float(error.max()) <= scale * (0.5 + rounding)


@given(BITS, SCALES)
def test_codes_are_one_product_with_the_inverse_scale_rounded(bits: int, scale: float) -> None:
    qmax = largest_code(bits)
    halves = (np.arange(-qmax, qmax) + 0.5).astype(np.float32)
    # Around the edges of the codes one rounding more or less, or a division, would show.
    x = np.concatenate([np.nextafter(halves * np.float32(scale), np.float32(side)) for side in (-1e38, 1e38)])
    expected = np.clip(np.rint(x * (np.float32(1) / np.float32(scale))), -qmax, qmax)
    assert quantize(torch.from_numpy(x), on_scale(scale), qmax).tolist() == expected.tolist()


def test_halves_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(x, on_scale(1.0), 127).tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_nan_becomes_zero_and_infinities_saturate() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38])
    assert quantize(x, on_scale(0.25), 7).tolist() == [0, 7, -7, 7, -7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_float_dtype_is_converted_to_float32_first(dtype: torch.dtype) -> None:
    x, scale = (normal(0, 4, 50) * 3).to(dtype), random_scale(1, 4, 1)
    before = x.clone()
    codes = quantize(x, scale, 127)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, quantize(x.float(), scale, 127))
    assert torch.equal(x, before), "the input is left alone"


@given(st.floats(0, torch.finfo(torch.float32).max, width=32))
def test_power_of_two_scales_are_the_next_power_up(asked: float) -> None:
    scale = float(positive_scale(on_scale(asked), power_of_two=True))
    wanted = min(max(asked, SMALLEST_SCALE), LARGEST_SCALE) if asked > 0 else 1.0
    assert math.frexp(scale)[0] == 0.5, "a power of two"
    assert wanted <= scale < 2 * wanted


@given(st.integers(-40, 40))
def test_power_of_two_scales_round_up_from_the_very_next_number_only(exponent: int) -> None:
    power = torch.tensor(2.0**exponent)
    above = torch.nextafter(power, torch.tensor(math.inf))
    assert float(positive_scale(power, power_of_two=True)) == 2.0**exponent
    assert float(positive_scale(above, power_of_two=True)) == min(2.0 ** (exponent + 1), LARGEST_SCALE)


def test_scales_are_usable_whatever_was_asked() -> None:
    asked = torch.tensor([0.0, -1.0, math.nan, 1e-45, 3.0, math.inf])
    assert positive_scale(asked).tolist() == [1, 1, 1, SMALLEST_SCALE, 3, LARGEST_SCALE]


@given(SEEDS, BITS, st.booleans())
def test_token_scale_maps_the_largest_finite_magnitude_of_each_row_to_the_largest_code(
    seed: int, bits: int, power_of_two: bool
) -> None:
    qmax = largest_code(bits)
    x = wounded(normal(seed, 2, 3, 5, 8), seed).clamp(-1e9, 1e9)
    scale = token_scale(x, qmax, power_of_two=power_of_two)
    for row, found in zip(x.reshape(-1, 8).tolist(), scale.flatten().tolist(), strict=True):
        largest = max((abs(value) for value in row if math.isfinite(value)), default=0.0)
        asked = torch.tensor(largest) / qmax
        assert found == float(positive_scale(asked, power_of_two=power_of_two))


def test_token_scale_ignores_infinity_and_nan() -> None:
    x = torch.tensor([[1.0, math.inf], [math.nan, -2.0], [math.nan, -math.inf]])
    assert token_scale(x, 1).tolist() == [[1.0], [2.0], [1.0]]


@given(BITS, SEEDS)
def test_gradient_is_straight_through_inside_the_range_and_zero_outside(bits: int, seed: int) -> None:
    qmax, scale = largest_code(bits), random_scale(seed, 3, 1)
    x = (normal(seed + 1, 3, 40) * scale * qmax).requires_grad_()
    upstream = normal(seed + 2, 3, 40)
    dequantize(quantize_straight_through(x, scale, qmax), scale).backward(upstream)
    inside = (x.detach() * (1 / scale)).abs() <= qmax
    assert bool(inside.any())
    torch.testing.assert_close(x.grad, upstream * inside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_comes_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    quantize_straight_through(x, on_scale(1.0), 7).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@given(BITS, SEEDS)
def test_scale_gradient_is_that_of_learned_step_size_quantization(bits: int, seed: int) -> None:
    qmax = largest_code(bits)
    x, upstream = normal(seed, 4, 50), normal(seed + 1, 4, 50)
    scale = (random_scale(seed + 2, 4, 1) / qmax).requires_grad_()
    dequantize(quantize_straight_through(x, scale, qmax), scale).backward(upstream)
    ratio = x.double() / scale.detach().double()
    # Esser et al. 2020, equation 3: round(v/s) - v/s inside, the saturated code outside.
    slope = torch.where(ratio.abs() <= qmax, ratio.round() - ratio, ratio.sign() * qmax)
    expected = (upstream * slope).sum(-1, keepdim=True)
    assert scale.grad is not None
    rounding = 8 * torch.finfo(torch.float32).eps * float((upstream.abs() * (ratio.abs() + qmax)).sum(-1).max())
    assert float((scale.grad - expected).abs().max()) <= rounding


def test_scale_gradient_does_not_see_values_without_a_direction() -> None:
    x = torch.tensor([0.4, math.nan, math.inf, -math.inf])
    scale = torch.tensor([1.0], requires_grad=True)
    dequantize(quantize_straight_through(x, scale, 7), scale).backward(torch.ones(4))
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(0.0 - 0.4 + 0 + 7 - 7)


def test_learned_step_scales_the_gradient_only() -> None:
    scale = torch.tensor([0.5, 0.25], requires_grad=True)
    stepped = learned_step(scale, 100, 4)
    assert torch.equal(stepped, scale)
    stepped.sum().backward()
    torch.testing.assert_close(scale.grad, torch.full((2,), 1 / 20))


@given(SEEDS, st.sampled_from(["none", "padding"]), st.integers(1, 12), st.integers(1, 5))
def test_smoothed_keys_lose_the_mean_of_the_valid_ones(seed: int, mask: str, keys: int, dim: int) -> None:
    key = normal(seed, 2, 3, keys, dim) + 5
    valid = make_mask(mask, seed, 2, 1, 1, keys)
    weights = torch.ones(2, 1, keys, 1, dtype=torch.bool) if valid is None else valid.mT
    smoothed = smooth_key(key, None if valid is None else weights)
    for b, h, d in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(dim)).reshape(-1, 3).tolist():
        pairs = zip(key[b, h, :, d], weights[b, 0, :, 0], strict=True)
        counted = [Fraction(round(Fraction(float(x)) * 2**20), 2**20) for x, real in pairs if real]
        mean = torch.tensor(float(sum(counted) / len(counted)) if counted else 0.0)
        assert torch.equal(smoothed[b, h, :, d], key[b, h, :, d] - mean)


@given(SEEDS)
def test_smoothing_ignores_what_padding_holds(seed: int) -> None:
    key = normal(seed, 2, 2, 6, 4)
    valid = torch.tensor([4, 6]).view(2, 1, 1, 1) > torch.arange(6).view(6, 1)
    filled = torch.where(valid, key, torch.tensor(math.nan))
    assert torch.equal(smooth_key(filled, valid)[0, :, :4], smooth_key(key, valid)[0, :, :4])
    assert torch.equal(smooth_key(filled, valid)[1], smooth_key(key, valid)[1])


@given(SEEDS)
def test_smoothing_leaves_softmax_unchanged(seed: int) -> None:
    query, key = normal(seed, 2, 3, 5, 8).double(), normal(seed + 1, 2, 3, 7, 8) + 2
    before, after = (torch.softmax(query @ x.double().mT, -1) for x in (key, smooth_key(key, None)))
    rounding = torch.finfo(torch.float32).eps * 8 * float(query.abs().max() * key.abs().max())
    assert float((before - after).abs().max()) <= rounding


def test_smoothing_survives_values_that_are_not_finite() -> None:
    key = torch.tensor([1.0, 4.0, math.nan, math.inf, -math.inf]).view(1, 1, 5, 1)
    smoothed = smooth_key(key, None).flatten().tolist()
    assert smoothed[:2] == [0.0, 3.0], "what is not finite counts as 0"
    assert math.isnan(smoothed[2])
    assert smoothed[3:] == [math.inf, -math.inf]


@given(SEEDS)
def test_smoothing_does_not_depend_on_the_order_of_keys(seed: int) -> None:
    key = normal(seed, 1, 2, 50, 4) * torch.logspace(-6, 5, 50).view(50, 1)
    assert torch.equal(smooth_key(key.flip(-2), None).flip(-2), smooth_key(key, None))


def test_smoothing_passes_gradients_as_if_the_mean_were_constant() -> None:
    key = normal(0, 1, 1, 4, 2).requires_grad_()
    smooth_key(key, None).sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))  # type: ignore[arg-type]  # None would fail here too
