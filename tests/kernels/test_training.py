"""Training steps on the compiled kernel: the outputs of float products, bit for bit, and their gradients."""

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
from attnpress.core.fake_quantize import StepKernel, Survivors, fake_quantize_attention
from attnpress.kernels import training
from attnpress.kernels.cpu import TARGET_VARIABLE
from attnpress.kernels.training import COMPILED, survivor_gradients, training_attention
from tests.core.factories import differentiable, generator, tensors
from tests.kernels.factories import MASKS, Case, cases, make_case, needs_kernel
from tests.kernels.test_cpu import threads

pytestmark = [needs_kernel, pytest.mark.filterwarnings("ignore::attnpress.core.attention.NanWarning")]

PRUNED = AttentionSpec(sparsity=0.9)


def step(case: Case, kernel: StepKernel | None, dropout: float) -> list[Tensor]:
    """Output, and gradients of what takes some."""
    leaves = differentiable(case.with_(dropout=dropout))
    torch.manual_seed(0)
    output = fake_quantize_attention(leaves, kernel)
    upstream = torch.randn(output.shape, generator=generator(1))
    return [output, *torch.autograd.grad(output, tensors(leaves), upstream)]


def assert_same_step(case: Case, dropout: float = 0.0) -> None:
    """The same output, bit for bit, and the same gradients but for the rounding of float32 sums."""
    found, expected = (step(case.in_mask(), kernel, dropout) for kernel in (COMPILED, None))
    assert torch.equal(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == theirs.dtype
        near = 1e-4 if ours.dtype == torch.float32 else 4 * torch.finfo(ours.dtype).eps
        assert float((ours - theirs).abs().max()) <= near * max(1.0, float(theirs.abs().max()))


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


@pytest.mark.parametrize("dim", [4, 12, 32, 80])
@pytest.mark.parametrize("tail", ["none", "mean", "linear"])
def test_every_head_size(target: str, tail: TailName, dim: int) -> None:
    spec = AttentionSpec(sparsity=0.9, tail=tail)
    assert_same_step(make_case((2, 2, 1, 33, 41, dim), spec, mask="padding", cutoff=3.0), dropout=0.2)


@pytest.mark.parametrize("tail", ["none", "mean", "linear"])
def test_gradients_have_the_same_bits_on_every_target_and_with_any_threads(
    target: str, tail: TailName, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case((3, 4, 2, 40, 40, 32), AttentionSpec(sparsity=0.9, tail=tail), mask="padding", cutoff=3.0)
    found = survivor_gradients(seen_survivors(case))
    with threads(3):
        again = survivor_gradients(seen_survivors(case))
    monkeypatch.setenv(TARGET_VARIABLE, "scalar")
    expected = survivor_gradients(seen_survivors(case))
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, again, expected))


def seen_survivors(case: Case) -> Survivors:
    """What a step on the case passes to the kernel."""
    seen = []

    def noted(survivors: Survivors) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(survivors)
        return survivor_gradients(survivors)

    step(case, COMPILED._replace(survivor_gradients=noted), 0.1)
    (found,) = seen
    made = {name: x.detach() for name, x in found._asdict().items() if isinstance(x, Tensor)}
    return found._replace(**made)  # type: ignore[arg-type]


@pytest.mark.parametrize("tail", ["none", "mean", "linear"])
def test_gradients_are_products_of_the_terms(target: str, tail: TailName) -> None:
    """By the formula of csrc/gradients.h, in float64."""
    case = make_case((2, 4, 2, 30, 35, 32), AttentionSpec(sparsity=0.9, tail=tail), mask="padding", cutoff=3.0)
    survivors = seen_survivors(case)
    grad, q, k, v, terms = (x.double() for x in (survivors.grad, *survivors[1:4], survivors.terms))
    codes, kept = survivors.codes.double(), survivors.factor * (survivors.kept if survivors.kept is not None else 1)
    scale, own, weight, *rest = terms.split(1, -1)
    inner, seen = grad @ v.mT, q @ k.mT
    rest += [torch.zeros_like(own)] * (3 - len(rest))
    level, value_level, slope = rest
    change = (scale * codes * (kept * inner - own) - level - slope * inner) * (codes > 0)
    weights = (weight * codes * kept - value_level - slope * seen) * (codes > 0)
    expected = change @ k, change.mT @ q, weights.mT @ grad
    for ours, theirs in zip(survivor_gradients(survivors), expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_arguments_of_the_operator_are_checked(target: str) -> None:
    survivors = seen_survivors(make_case((2, 4, 2, 30, 35, 32), PRUNED, cutoff=3.0))
    wrong: list[dict[str, Any]] = [
        {"codes": survivors.codes.float()},
        {"codes": survivors.codes[:, :, :, 1:]},
        {"k": survivors.k.mT.contiguous().mT},
        {"grad": survivors.grad.double()},
        {"terms": survivors.terms[..., :2].contiguous()},
        {"v": survivors.v[:1]},
    ]
    for change in wrong:
        with pytest.raises(RuntimeError, match="attnpress"):
            survivor_gradients(survivors._replace(**change))


def calls_of_the_kernel(monkeypatch: pytest.MonkeyPatch, call: AttentionCall) -> int:
    count = 0

    def counted(part: AttentionCall) -> Any:
        nonlocal count
        count += 1
        return COMPILED.code_rows(part)

    monkeypatch.setattr(training, "COMPILED", COMPILED._replace(code_rows=counted))
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
