"""Dropout of P codes: after quantization, at the rate it tells, seen by the gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpress.config import ProbsMode, ProbsSpec, RuleName
from attnpress.core.fake_quantize import dropout_mask
from tests.core.factories import (
    MODES,
    RULES,
    SEEDS,
    assert_gradients,
    differentiable,
    gradients,
    in_float64,
    make_call,
    make_spec,
    normal,
    plain_attention,
    weights_of,
)


def nearest_rate(rate: float) -> float:
    """Dropout is drawn from one byte a pair."""
    return round(rate * 256) / 256


# Dropout.


@given(seed=SEEDS, rate=st.sampled_from([0.1, 0.5, 0.9]), rule=st.sampled_from(RULES))
@settings(max_examples=20)
def test_dropout_removes_codes_and_scales_up_the_rest(seed: int, rate: float, rule: RuleName) -> None:
    call = make_call(make_spec(8, rule), seed, rows=40, keys=40)
    torch.manual_seed(seed)
    weights, dropped = weights_of(call), weights_of(call, rate)
    alive = dropped != 0
    torch.testing.assert_close(dropped[alive], (weights / (1 - nearest_rate(rate)))[alive])
    pairs = int((weights > 0).sum())
    deviation = math.sqrt(rate * (1 - rate) / pairs)
    assert 1 - float(alive.sum()) / pairs == pytest.approx(nearest_rate(rate), abs=5 * deviation)


@given(st.floats(0, 0.99), SEEDS)
def test_the_dropout_mask_keeps_the_share_that_it_tells(rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    kept, share = dropout_mask(torch.empty(7, 3, 41, 13), rate)
    assert share == 1 - nearest_rate(rate)
    assert abs(share - (1 - rate)) <= 1 / 512
    if kept is None:
        assert share == 1
        return
    assert kept.shape == (7, 3, 41, 13)
    assert set(kept.unique().tolist()) <= {0, 1}
    deviation = math.sqrt(share * (1 - share) / kept.numel())
    assert float(kept.double().mean()) == pytest.approx(share, abs=5 * deviation)
    for dim in range(4):
        assert len({line.sum().item() for line in kept.transpose(0, dim)}) > 1, "no pattern along any dimension"


def test_dropout_is_drawn_anew_for_each_call_and_repeats_with_the_seed() -> None:
    call = make_call(make_spec(8), rows=20, keys=20)
    torch.manual_seed(0)
    first, second = weights_of(call, 0.5), weights_of(call, 0.5)
    torch.manual_seed(0)
    assert torch.equal(weights_of(call, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [None, 8])
def test_gradients_see_the_very_pairs_that_dropout_removed(mode: ProbsMode, bits: int | None) -> None:
    call = differentiable(make_call(make_spec(8, sparsity=0.5, p=ProbsSpec(bits=bits, mode=mode)), mask="pairs"))
    weights = weights_of(call).detach()
    torch.manual_seed(3)
    dropped = weights_of(call, 0.4).detach()
    torch.manual_seed(3)
    output = call.fake(0.4)
    upstream = normal(9, *output.shape)
    plain = in_float64(call)
    factor = (dropped != 0).double() / (1 - nearest_rate(0.4))
    reference = plain_attention(plain, weights, factor)
    torch.testing.assert_close(output, reference.float())
    assert_gradients(gradients(call, output, upstream), gradients(plain, reference, upstream), terms=400)
