"""What it means that the kernel gives the integers of the reference."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnpress.core.attention import key_validity
from attnpress.kernels import ops
from tests.kernels.factories import Case

NAMES = ("q_codes", "row_max", "p_codes", "code_sum", "weighted")


def ulps(left: Tensor, right: Tensor) -> int:
    """Largest distance in float32 steps; NaN nowhere."""
    ordered = [x.contiguous().view(torch.int32).long() for x in (left, right)]
    ordered = [torch.where(x < 0, -(2**31) - x, x) for x in ordered]
    return int((ordered[0] - ordered[1]).abs().amax()) if left.numel() else 0


def assert_same(case: Case) -> None:
    expected, found = case.integer(), ops.compiled_integers(case)
    tailed = {field.name for field in dataclasses.fields(expected) if field.name.startswith("tail_")}
    assert tailed == {name for name in found if name.startswith("tail_")}
    for name in (*NAMES, *sorted(tailed)):
        assert torch.equal(found[name], getattr(expected, name)), name
    seen = key_validity(case.allowed())
    assert seen is not None
    for name in ("k_codes", "v_codes"):
        assert torch.equal(found[name] * seen, getattr(expected, name) * seen), name
    assert ulps(found["output"], expected.output) <= 1
    plain = ops.attention(case)
    assert torch.equal(plain, found["output"])
