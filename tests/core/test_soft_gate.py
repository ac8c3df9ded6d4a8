"""Trained thresholds: a sharp gate is the hard cut, and gradients open and close it as they should."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attnpress.core.attention import key_validity
from attnpress.core.soft_gate import SHARPNESS, density_penalty, soft_gate_attention
from tests.core.factories import Call, make_call, make_spec

FAR_OPEN, SHUT = 60.0, -60.0


def gated(call: Call, cutoff: Tensor, real: Tensor | None = None, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    return soft_gate_attention(call.with_(cutoff=cutoff, real=real, dropout=dropout))


def number(x: Tensor) -> float:
    return float(x.detach())


def nats(*numbers: float) -> Tensor:
    return torch.tensor(numbers, requires_grad=True)


@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@pytest.mark.parametrize("bits", [8, 4, None])
def test_an_open_gate_is_attention_without_pruning(mask: str, bits: int | None) -> None:
    call = make_call(make_spec(bits), 3, mask=mask, kv_heads=2, rows=7)
    output, density = gated(call, nats(FAR_OPEN))
    torch.testing.assert_close(output, call.fake(), atol=2e-3, rtol=2e-2)
    assert number(density) == pytest.approx(1.0 if call.allowed().any() else 0.0)


def test_far_from_the_threshold_the_gate_is_the_hard_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnpress.core.soft_gate.SHARPNESS", 1e5)
    call = make_call(make_spec(8, sparsity=0.5), 5, rows=9, keys=12, spread=3.0)
    cutoff = torch.full((4,), 1.5)
    hard = call.with_(cutoff=cutoff)
    output, density = gated(call, nats(1.5))
    torch.testing.assert_close(output, hard.fake(), atol=2e-3, rtol=2e-2)
    kept = hard.integer().keep.float().mean()
    assert 0 < number(kept) < 1
    assert number(density) == pytest.approx(number(kept), abs=1e-3)


def test_padding_counts_neither_as_key_nor_as_query() -> None:
    call = make_call(make_spec(8), 1, batch=1, rows=6, keys=6)
    valid = (torch.arange(6) < 4).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    padded = call.with_(valid=valid)
    short = call.with_(query=call.query[:, :, :4], key=call.key[:, :, :4], value=call.value[:, :, :4], valid=None)
    real = (torch.arange(6) < 4).view(1, 1, 6, 1)
    long_output, long_density = gated(padded, nats(0.7), real)
    output, density = gated(short, nats(0.7))
    torch.testing.assert_close(long_output[:, :, :4], output)
    torch.testing.assert_close(long_density, density)
    assert key_validity(valid) is not None


def test_the_penalty_lowers_the_threshold_only_until_the_target_is_reached() -> None:
    call = make_call(make_spec(8), 2, rows=9, keys=12, spread=2.0)
    cutoff = nats(1.0)
    density = gated(call, cutoff)[1]
    reached = 1 - number(density)
    above = density_penalty([density], [reached + 0.1])
    assert number(above) == pytest.approx(0.1, abs=1e-6)
    (gradient,) = torch.autograd.grad(above, cutoff, retain_graph=True)
    assert number(gradient) > 0, "a step against the gradient lowers the threshold"
    below = density_penalty([density], [reached - 0.1])
    assert number(below) == 0
    assert number(torch.autograd.grad(below, cutoff)[0]) == 0


def test_the_penalty_is_that_of_the_mean_over_modules() -> None:
    densities = [torch.tensor(0.5), torch.tensor(0.1)]
    assert number(density_penalty(densities, [0.9, 0.9])) == pytest.approx(0.2)
    assert number(density_penalty(densities, [0.6, 0.9])) == pytest.approx(0.05)
    assert number(density_penalty(densities, [0.5, 0.5])) == 0


def test_the_gradient_of_the_threshold_is_the_slope_of_the_gate() -> None:
    call = make_call(make_spec(None), 4, batch=1, heads=1, rows=3, keys=5)
    step, found = 1e-3, []
    for value in (0.8 - step, 0.8 + step):
        output, density = gated(call, nats(value))
        found.append((number(output.square().sum()), number(density)))
    cutoff = nats(0.8)
    output, density = gated(call, cutoff)
    slopes = [(high - low) / (2 * step) for low, high in zip(*found, strict=True)]
    of_output = torch.autograd.grad(output.square().sum(), cutoff, retain_graph=True)[0]
    of_density = torch.autograd.grad(density, cutoff)[0]
    assert [number(of_output), number(of_density)] == pytest.approx(slopes, rel=2e-2, abs=1e-3)
    assert SHARPNESS > 1


def test_every_input_gets_a_finite_gradient_even_where_no_key_is_valid() -> None:
    call = make_call(make_spec(4), 6, batch=2, rows=5, keys=5)
    valid = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    valid[0] = True
    tensors = [x.clone().requires_grad_() for x in (call.query, call.key, call.value)]
    cutoff = nats(SHUT)
    varied = dataclasses.replace(call, query=tensors[0], key=tensors[1], value=tensors[2], valid=valid)
    output, density = gated(varied, cutoff, dropout=0.1)
    assert not output[1].any(), "rows without a valid key give zeros"
    gradients = torch.autograd.grad(output.sum() + density, [*tensors, cutoff])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
