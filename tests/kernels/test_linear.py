"""oneDNN's product of bytes: the integers of core.linear, and what is done around it in one pass."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnpress.core import linear as reference
from attnpress.core import ordered
from attnpress.core.linear import Coded, decode, linear, weight_codes
from attnpress.kernels import cpu
from attnpress.kernels import linear as compiled
from attnpress.kernels.linear import FloatBlocks, OneDnn, OneDnnHalves, PackedProduct, multiplication, token_codes
from tests.kernels.factories import needs_kernel

BUILT = [pytest.param(True, marks=needs_kernel), False]


def operands(rows: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * 3 + 1
    return x, torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)


def packed(weight: Tensor, bias: Tensor | None) -> Any:
    return PackedProduct(*weight_codes(weight), bias)


@given(st.integers(0, 5), st.integers(1, 200), st.floats(2.0**-20, 2.0**20, width=32), st.integers(0, 2**31))
def test_tokens_get_the_codes_of_the_definition(rows: int, width: int, scale: float, seed: int) -> None:
    x = operands(rows, width, 1, seed)[0] * scale
    for found, expected in zip(token_codes(x), reference.token_codes(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 0.0, 1e-45, 3e38, -3e38])
def test_odd_numbers_get_the_codes_of_the_definition(odd: float) -> None:
    x = torch.tensor([[1.0, odd, -2.0], [odd] * 3, [-odd, odd, 0.0], [0.5, 1.5, 255.0]])
    for found, expected in zip(token_codes(x), reference.token_codes(x), strict=True):
        assert torch.equal(found, expected)


MULTIPLICATIONS: dict[str, Any] = {
    "oneDNN, 7 bits": (7, lambda weight: OneDnn(weight)),
    "oneDNN, halves": (8, lambda weight: OneDnnHalves(weight)),
    "float32 blocks, 7 bits": (7, lambda weight: FloatBlocks(weight, 7)),
    "float32 blocks, 8 bits": (8, lambda weight: FloatBlocks(weight, 8)),
}


@pytest.mark.skipif(not cpu.has_avx2(), reason="oneDNN's products of bytes are not known to be exact here")
@pytest.mark.parametrize("name", MULTIPLICATIONS)
def test_multiplications_give_the_integers(name: str) -> None:
    bits, make = MULTIPLICATIONS[name]
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((1, 1), (3, 70), (1041, 17), (4096, 33)):
        codes = torch.randint(0, 2**bits, (37, inputs), dtype=torch.uint8, generator=generator)
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        codes[0], weight[0] = 2**bits - 1, 127
        multiply = make(weight)
        assert torch.equal(multiply(codes), (codes.long() @ weight.long().mT).float())
        assert torch.equal(multiply.weight(), weight)
        assert multiply(codes[:0]).shape == (0, outputs)


def test_the_processor_chooses_the_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(4, 4, dtype=torch.int8)
    for avx2, vnni, expected in (
        (True, True, (OneDnn, OneDnn)),
        (True, False, (OneDnn, OneDnnHalves)),
        (False, False, (FloatBlocks, FloatBlocks)),
    ):
        monkeypatch.setattr(cpu, "has_avx2", lambda answer=avx2: answer)
        monkeypatch.setattr(cpu, "has_vnni", lambda answer=vnni: answer)
        assert tuple(type(multiplication(weight, bits)) for bits in (7, 8)) == expected


@needs_kernel
@pytest.mark.parametrize("target", cpu.supported_targets() if cpu.is_built() else [])
@pytest.mark.parametrize("width", [1, 50, 64, 130, 768])
def test_compiled_passes_give_the_bits_of_the_definition(
    target: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.TARGET_VARIABLE, target)
    x, weight, bias = operands(9, width, 21, width)
    norm = (weight[0], weight[1], 1e-5)
    assert torch.equal(compiled.layer_norm(x, *norm), ordered.layer_norm(x, *norm))
    assert torch.equal(compiled.gelu(x), ordered.gelu(x))
    assert torch.equal(compiled.tanh(x), ordered.tanh(x))
    assert torch.equal(compiled.ordered_linear(x, weight, bias), ordered.ordered_linear(x, weight, bias))
    for bits in (7, 8):
        assert all(map(torch.equal, token_codes(x, bits), reference.token_codes(x, bits)))


@needs_kernel
@pytest.mark.parametrize("target", cpu.supported_targets() if cpu.is_built() else [])
@pytest.mark.parametrize("bits", [7, 8])
def test_layers_give_the_bits_of_the_definition(target: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.TARGET_VARIABLE, target)
    x, weight, bias = operands(30, 96, 75, bits)
    codes, scale = weight_codes(weight * 0.05)
    residual, norm = torch.randn(30, 75) + 3, torch.nn.LayerNorm(75)
    layer = PackedProduct(codes, scale, bias, bits)
    plain = linear(reference.token_codes(x, bits), codes, scale, bias)
    assert torch.equal(torch.as_tensor(layer(x, False)), plain)
    assert all(map(torch.equal, layer(x, True, 7), reference.token_codes(ordered.gelu(plain), 7)))
    with torch.no_grad():
        expected = ordered.layer_norm(plain + residual, norm.weight, norm.bias, norm.eps)
        assert torch.equal(layer.normed(x, residual, norm), expected)
    without = PackedProduct(codes, scale, None, bits)
    assert torch.equal(torch.as_tensor(without(x, False)), linear(reference.token_codes(x, bits), codes, scale, None))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_layer_is_copied_and_pickled_by_its_codes(duplicate: Any) -> None:
    x, weight, bias = operands(5, 40, 30, 3)
    layer = PackedProduct(*weight_codes(weight), bias, 7)
    assert torch.equal(duplicate(layer)(x, False), torch.as_tensor(layer(x, False)))


@given(st.integers(0, 70), st.integers(1, 200), st.integers(1, 100), st.booleans(), st.integers(0, 2**31))
def test_the_product_is_that_of_the_definition(
    rows: int, inputs: int, outputs: int, with_bias: bool, seed: int
) -> None:
    x, weight, bias = operands(rows, inputs, outputs, seed)
    added = bias if with_bias else None
    expected = linear(token_codes(x), *weight_codes(weight), added)
    found = packed(weight, added)(x, False)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) if rows else 0)


def test_sums_of_the_largest_products_do_not_saturate() -> None:
    weight = torch.full((8, 4096), 127.0)
    assert torch.equal(
        packed(weight, None)(torch.full((3, 4096), 255.0), False), torch.full((3, 8), 255.0 * 127 * 4096)
    )


@pytest.mark.parametrize("built", BUILT)
def test_codes_after_the_gelu_are_those_of_its_output(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_is_compiled", lambda: built)
    x, weight, bias = operands(113, 64, 48, 0)
    layer = packed(weight * 0.05, bias)
    expected = F.gelu(layer(x, False))
    found = layer(x, True)
    assert isinstance(found, Coded)
    assert found.codes.dtype == torch.uint8
    assert torch.allclose(found.scale, reference.token_codes(expected).scale, rtol=1e-5)
    half = found.scale.unsqueeze(-1) * 0.501
    assert bool(((decode(found) - expected).abs() <= half).all())
    last = packed(torch.randn(16, 48), None)
    assert torch.allclose(last(found, False), last(decode(found), False), rtol=1e-4, atol=1e-4)


@needs_kernel
def test_the_gelu_is_the_framework_s() -> None:
    x = torch.linspace(-12, 12, 4801).unsqueeze(1)
    found = Coded(torch.empty(4801, 1, dtype=torch.uint8), torch.empty(4801), torch.empty(4801))
    compiled.finish_codes(8, x, torch.ones(4801), torch.zeros(4801), torch.zeros(1), torch.ones(1), None, *found)
    assert torch.allclose(decode(found), F.gelu(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("built", BUILT)
def test_tokens_get_the_same_bits_in_whatever_company(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_is_compiled", lambda: built)
    x, weight, bias = operands(167, 96, 48, 1)
    residual, norm = torch.randn(167, 48), torch.nn.LayerNorm(48)
    layer = packed(weight, bias)

    def found(first: int, end: int) -> list[Tensor]:
        part = x[first:end].unsqueeze(0)
        with torch.no_grad():
            coded, normed = layer(part, True), layer.normed(part, residual[first:end].unsqueeze(0), norm)
        assert isinstance(coded, Coded)
        return [out[0] for out in (layer(part, False), normed, *coded)]

    whole, one = found(0, 167), found(150, 151)
    monkeypatch.setattr(compiled, "_rows_at_once", lambda: 20)
    for at_once, by_rows, alone in zip(whole, found(0, 167), one, strict=True):
        assert torch.equal(by_rows, at_once)
        assert torch.equal(alone, at_once[150:151])


@pytest.mark.parametrize("built", BUILT)
def test_the_residual_and_the_norm_are_those_of_the_framework(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_is_compiled", lambda: built)
    x, weight, bias = operands(113, 64, 50, 2)
    residual = torch.randn(1, 113, 50) * 4 + 100
    norm = torch.nn.LayerNorm(50, eps=1e-12)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        layer = packed(weight, bias)
        expected = norm(layer(x, False) + residual)
        found = layer.normed(x.unsqueeze(0), residual, norm)
        assert found.shape == residual.shape
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        apart = residual.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(layer.normed(token_codes(x.unsqueeze(0)), apart, norm), found)


def test_the_codes_of_the_weight_come_back_from_its_packing() -> None:
    codes, scale = weight_codes(torch.randn(50, 70))
    assert torch.equal(PackedProduct(codes, scale, None).weight(), codes)


@needs_kernel
def test_operators_refuse_what_does_not_fit() -> None:
    ops, ones = torch.ops.attnpress, torch.ones(2)
    with pytest.raises(RuntimeError, match="float32, contiguous"):
        ops.token_codes(torch.ones(2, 2, dtype=torch.float64), 8)
    with pytest.raises(RuntimeError, match="1 to 8 bits, found 9"):
        ops.token_codes(torch.ones(2, 2), 9)
    three = torch.ones(3)
    with pytest.raises(RuntimeError, match="a product of 2 rows and 3 columns"):
        ops.finish_product(torch.ones(2, 2), ones, ones, three, three, None, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="of 6 numbers"):
        ops.finish_product(torch.ones(2, 3), ones, ones, three, three, None, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="of 6 numbers"):
        ops.finish_normed(
            torch.ones(2, 3), ones, ones, three, three, None, torch.ones(2, 2), three, three, 1e-5, torch.ones(2, 3)
        )
    with pytest.raises(RuntimeError, match=r"weight \[N, K\]"):
        ops.ordered_linear(torch.ones(2, 3), torch.ones(2, 2), None)
