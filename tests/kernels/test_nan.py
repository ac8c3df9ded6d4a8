"""The kernel takes NaN for 0 as it packs, and says so on every target; what it never packs it does not see."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from attnpress.config import AttentionSpec
from attnpress.core.attention import NanWarning
from attnpress.kernels import ops
from tests.kernels.factories import DTYPES, Case, make_case, needs_kernel

pytestmark = needs_kernel


def spoiled(name: str, value: float, place: tuple[int, ...] = (1, 1, -1, -1), **changes: Any) -> Case:
    case = make_case((2, 4, 2, 37, 70, 20), AttentionSpec(**changes))
    x = getattr(case, name).clone()
    x[place] = value
    return case.with_(**{name: x})


@pytest.mark.parametrize("smooth_key", [False, True])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 1, -1, -1), (0, 1, 17, 3)])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_is_taken_for_0_with_a_warning(target: str, name: str, place: tuple[int, ...], smooth_key: bool) -> None:
    with pytest.warns(NanWarning, match="met NaN among its queries, keys or values"):
        found = ops.attention(spoiled(name, torch.nan, place, smooth_key=smooth_key))
    if not smooth_key:
        assert torch.equal(found, ops.attention(spoiled(name, 0.0, place)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_every_dtype_is_seen(target: str, dtype: torch.dtype) -> None:
    case = spoiled("query", torch.nan)
    case = case.with_(**{name: getattr(case, name).to(dtype) for name in ("query", "key", "value")})
    with pytest.warns(NanWarning):
        ops.attention(case)
    few = {name: getattr(case, name)[1:, :, :37] for name in ("query", "key", "value")}
    with pytest.warns(NanWarning):
        ops.attention(case.with_(**few, bounds=torch.tensor([0, 5, 37])))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 3e38])
def test_what_saturates_is_not_nan(target: str, value: float) -> None:
    ops.attention(spoiled("key", value))  # a warning would be an error


def test_nan_in_keys_that_nobody_attends_to_is_padding(target: str) -> None:
    valid = torch.arange(70) < 69
    ops.attention(spoiled("key", torch.nan).with_(valid=valid))
    ops.attention(spoiled("value", torch.nan).with_(valid=valid))


def test_a_call_without_nan_after_one_with_it_says_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ops.attention(spoiled("query", torch.nan))
        assert len(caught) == 1
        ops.attention(make_case((2, 4, 2, 7, 9, 16), AttentionSpec()))
        ops.attention(make_case((0, 4, 2, 7, 9, 16), AttentionSpec()))
    assert len(caught) == 1
