"""Training steps on the compiled kernel: outputs and gradients are those of float products, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsSpec, RuleName, TailName, TensorSpec
from attnpress.core.call import AttentionCall
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.kernels import training
from attnpress.kernels.cpu import TARGET_VARIABLE
from attnpress.kernels.training import code_rows, training_attention
from tests.core.factories import differentiable, generator, tensors
from tests.kernels.factories import MASKS, Case, cases, make_case, needs_kernel

pytestmark = [needs_kernel, pytest.mark.filterwarnings("ignore::attnpress.core.attention.NanWarning")]

PRUNED = AttentionSpec(sparsity=0.9)


def step(call: Case, *, compiled: bool, dropout: float) -> list[Tensor]:
    """Output, and gradients of what takes some."""
    leaves = differentiable(call.with_(dropout=dropout))
    torch.manual_seed(0)
    output = fake_quantize_attention(leaves, code_rows if compiled else None)
    upstream = torch.randn(output.shape, generator=generator(1))
    return [output, *torch.autograd.grad(output, tensors(leaves), upstream)]


def assert_same_step(case: Case, dropout: float = 0.0) -> None:
    call = case.in_mask()
    found, expected = (step(call, compiled=compiled, dropout=dropout) for compiled in (True, False))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.nan_to_num(nan=7.5), theirs.nan_to_num(nan=7.5))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases(), dropout=st.sampled_from([0.0, 0.3]))
def test_steps_equal_those_of_products(target: str, case: Case, dropout: float) -> None:
    assert_same_step(case, dropout)


@pytest.mark.parametrize(("tail", "rank"), [("none", 1), ("mean", 1), ("linear", 3), ("linear", 64)])
@pytest.mark.parametrize("mask", MASKS)
def test_every_tail_and_mask(target: str, tail: TailName, rank: int, mask: str) -> None:
    spec = AttentionSpec(sparsity=0.9, tail=tail, tail_rank=rank, smooth_key=True)
    assert_same_step(make_case((3, 4, 2, 50, 50, 64), spec, mask=mask, cutoff=3.0), dropout=0.1)


@pytest.mark.parametrize("rule", ["relative", "threshold", "topk"])
@pytest.mark.parametrize(
    "p", [ProbsSpec(), ProbsSpec(mode="unit"), ProbsSpec(mode="unit", renormalize=True), ProbsSpec(bits=4)]
)
def test_every_rule_and_coding(target: str, rule: RuleName, p: ProbsSpec) -> None:
    learned = TensorSpec(bits=6, learned=True)
    spec = AttentionSpec(sparsity=0.8, rule=rule, p=p, q=learned, k=learned, v=learned)
    assert_same_step(make_case((2, 4, 4, 40, 60, 32), spec, mask="padding", cutoff=3.0 if rule == "relative" else 0.02))


def test_slices_of_a_long_batch(target: str) -> None:
    assert_same_step(make_case((3, 8, 8, 200, 200, 32), PRUNED, mask="padding", cutoff=3.0))


def calls_of_the_kernel(monkeypatch: pytest.MonkeyPatch, call: AttentionCall) -> int:
    count = 0

    def counted(part: AttentionCall) -> Any:
        nonlocal count
        count += 1
        return code_rows(part)

    monkeypatch.setattr(training, "code_rows", counted)
    training_attention(call)
    return count


def test_the_kernel_runs_where_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((2, 2, 2, 20, 20, 32), PRUNED, cutoff=3.0)
    assert calls_of_the_kernel(monkeypatch, differentiable(case)) == 1
    assert calls_of_the_kernel(monkeypatch, case) == 0
    with torch.no_grad():
        assert calls_of_the_kernel(monkeypatch, differentiable(case)) == 0


@pytest.mark.parametrize(
    "change",
    [{"q": TensorSpec(bits=None), "k": TensorSpec(bits=None)}, {"rule": "mass"}, {"predictor_bits": 4}],
)
def test_what_the_kernel_does_not_support_is_computed_by_products(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    case = make_case((2, 2, 2, 20, 20, 32), PRUNED, cutoff=0.9)
    case = case.with_(spec=dataclasses.replace(PRUNED, **change))
    assert calls_of_the_kernel(monkeypatch, differentiable(case)) == 0


def test_head_sizes_that_no_kernel_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_of_the_kernel(monkeypatch, differentiable(make_case((1, 2, 2, 9, 9, 6), PRUNED, cutoff=3.0))) == 0


def test_without_a_kernel_products_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TARGET_VARIABLE, "none such")
    assert calls_of_the_kernel(monkeypatch, differentiable(make_case((1, 2, 2, 9, 9, 32), PRUNED, cutoff=3.0))) == 0
