"""Long calls run in slices, between which Ctrl-C is heard; the slices give the bits of the whole."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from attnpress.config import AttentionSpec, TensorSpec
from attnpress.kernels import ops, slices
from tests.kernels.factories import make_case, needs_kernel

pytestmark = needs_kernel


def limit(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(ops, "SHORT", 0)
    monkeypatch.setattr(ops, "_most", lambda: most)


@pytest.mark.parametrize("most", [1, 3000, 20_000, 100_000])
@pytest.mark.parametrize("mask", ["none", "padding", "window", "by head"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [5, 11, 17])
def test_slices_give_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, rows: int, causal: bool, mask: str, most: int
) -> None:
    spec = AttentionSpec(sparsity=0.5, smooth_key=True, v=TensorSpec(granularity="channel"))
    case = make_case((2, 4, 2, rows, 11, 16), spec, mask=mask, cutoff=2.0, causal=causal)
    whole = ops.attention(case.with_(causal=causal))
    limit(monkeypatch, most)
    found = ops.attention(case.with_(causal=causal))
    assert torch.equal(found, whole)
    assert found.stride() == whole.stride()


@pytest.mark.parametrize("rule", ["threshold", "topk"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_slices_take_their_part_of_every_argument(monkeypatch: pytest.MonkeyPatch, rule: Any, granularity: Any) -> None:
    tensor = TensorSpec(granularity="tensor")
    spec = AttentionSpec(q=TensorSpec(granularity=granularity), k=tensor, v=tensor, rule=rule, sparsity=0.5)
    case = make_case((3, 4, 2, 7, 9, 16), spec, cutoff=2.0, dtype=torch.bfloat16)
    case = case.with_(valid=torch.rand(9) > 0.3)
    whole = ops.attention(case)
    limit(monkeypatch, 2000)
    assert torch.equal(ops.attention(case), whole)


@pytest.mark.parametrize("most", [1, 4000, 30_000])
def test_packed_calls_in_slices_give_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    case = make_case((1, 4, 2, 30, 30, 16), AttentionSpec(sparsity=0.5, smooth_key=True), cutoff=2.0)
    case = case.with_(bounds=torch.tensor([0, 0, 4, 9, 9, 26, 30]), causal=True)
    whole = ops.attention(case)
    limit(monkeypatch, most)
    assert torch.equal(ops.attention(case), whole)


def test_slices_are_about_as_long_as_asked() -> None:
    case = make_case((3, 4, 2, 40, 50, 16), AttentionSpec())
    whole = slices.products(case.query, case.key)
    for most in (10_000, 50_000, 200_000):
        parts = [slices.products(part.query, part.key) for _, part in slices.slices(case, most)]
        assert sum(parts) == whole
        assert max(parts) <= most


def test_a_long_call_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((1, 1, 1, 50, 50, 16), AttentionSpec())
    limit(monkeypatch, slices.products(case.query, case.key) // 50)
    operator, made = ops._run, []

    def interrupted(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            signal.raise_signal(signal.SIGINT)
        return operator(*arguments)

    monkeypatch.setattr(ops, "_run", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            ops.attention(case)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(made) == 3
