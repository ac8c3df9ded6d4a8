"""oneDNN's product of bytes: the integers of core.linear, and what is fused into it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnpress.core.linear import Step, input_codes, linear, step_of, weight_codes
from attnpress.kernels.linear import Int8Linear, is_supported, quantize

needs_vnni = pytest.mark.skipif(not is_supported(), reason="this processor has no VNNI")


def operands(rows: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Step]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * 3 + 1
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    return x, weight, bias, step_of(float(x.min()), float(x.max()))


@given(st.floats(-40, 40, width=32), st.integers(0, 255), st.floats(2.0**-10, 2.0, width=32))
def test_inputs_get_the_codes_of_the_definition(value: float, zero_point: int, scale: float) -> None:
    x, step = torch.tensor([value, -value, 0.0, 0.5 * scale, 1.5 * scale]), Step(scale, zero_point)
    assert torch.equal(quantize(x, step), input_codes(x, step))


@needs_vnni
@given(st.integers(1, 70), st.integers(1, 200), st.integers(1, 100), st.booleans(), st.integers(0, 2**31))
def test_the_product_is_that_of_the_definition(
    rows: int, inputs: int, outputs: int, with_bias: bool, seed: int
) -> None:
    x, weight, bias, step = operands(rows, inputs, outputs, seed)
    added = bias if with_bias else None
    expected = linear(input_codes(x, step), step, *weight_codes(weight), added)
    found = Int8Linear(weight, added, step)(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@needs_vnni
def test_sums_of_the_largest_products_do_not_saturate() -> None:
    step, weight = Step(1.0, 0), torch.full((8, 4096), 127.0)
    assert torch.equal(
        Int8Linear(weight, None, step)(torch.full((3, 4096), 255.0)), torch.full((3, 8), 255.0 * 127 * 4096)
    )


@needs_vnni
@pytest.mark.parametrize(
    ("name", "function"),
    [("relu", F.relu), ("gelu", F.gelu), ("gelu_new", lambda x: F.gelu(x, approximate="tanh"))],
)
def test_activations_are_fused(name: str, function: torch.nn.Module) -> None:
    x, weight, bias, step = operands(33, 64, 48, 0)
    plain = Int8Linear(weight, bias, step)(x)
    fused = Int8Linear(weight, bias, step, name)(x)
    assert torch.allclose(fused, function(plain), rtol=1e-4, atol=1e-4)


@needs_vnni
def test_codes_pass_from_one_product_to_the_next_without_a_float_between() -> None:
    x, weight, bias, step = operands(33, 64, 48, 0)
    between = Int8Linear(weight, bias, step, "gelu")(x)
    after = step_of(float(between.min()), float(between.max()))
    codes = Int8Linear(weight, bias, step, "gelu", after)(x)
    assert codes.dtype == torch.uint8
    difference = codes.int() - input_codes(between, after).int()
    assert int(difference.abs().max()) <= 1
    assert int(difference.count_nonzero()) <= codes.numel() // 100
    last = Int8Linear(torch.randn(16, 48), None, after)
    assert torch.equal(last(codes), last((codes.float() - after.zero_point) * after.scale))


@needs_vnni
def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    x, weight, bias, step = operands(67, 96, 48, 1)
    layer = Int8Linear(weight, bias, step, "gelu")
    assert torch.equal(layer(x)[20:21], layer(x[20:21]))
    assert torch.equal(layer(x.view(1, 67, 96))[0, :9], layer(x[:9]))
