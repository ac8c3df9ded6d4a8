"""NaN has code 0, so the output hides it: calls that meet it say so, padding aside."""

from __future__ import annotations

import warnings

import pytest
import torch

from attnpress.core.attention import NanWarning, integer_attention
from attnpress.core.fake_quantize import fake_quantize_attention
from tests.core.factories import Call, make_call, make_spec

FORWARDS = [integer_attention, fake_quantize_attention]


def spoiled(name: str, value: float = torch.nan) -> Call:
    call = make_call(make_spec(8))
    x = getattr(call, name).clone()
    x[1, 2, 3, 4] = value
    return call.with_(**{name: x})


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_is_taken_for_0_with_a_warning(forward: object, name: str) -> None:
    with pytest.warns(NanWarning, match="met NaN among its queries, keys or values and takes it for 0.*look for NaN"):
        found = forward(spoiled(name))  # type: ignore[operator]
    assert torch.equal(getattr(found, "output", found), spoiled(name, 0.0).integer().output)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 3e38])
def test_what_saturates_is_not_nan(forward: object, value: float) -> None:
    call = spoiled("key", value)
    call.key[0, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    forward(call)  # type: ignore[operator]  # a warning would be an error


@pytest.mark.parametrize("forward", FORWARDS)
def test_nan_in_keys_that_nobody_attends_to_is_padding(forward: object) -> None:
    valid = torch.ones(7, dtype=torch.bool)
    valid[3] = False
    forward(spoiled("key").with_(valid=valid))  # type: ignore[operator]


def test_one_process_says_it_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            integer_attention(spoiled("query"))
    assert len(caught) == 1
