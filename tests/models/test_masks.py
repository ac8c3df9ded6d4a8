"""Masks of every shape that broadcasts, in what a module observes, watches and counts; and calls without a key."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.cost import PairCounts
from attnpress.models.attention import CompressedAttention
from attnpress.models.watchers import Counting, Fitting, Observing, start, watched
from tests.core.factories import normal

SHAPES: list[tuple[int, ...]] = [(), (7,), (5, 7), (5, 1), (4, 1, 7), (2, 1, 1, 7), (2, 1, 5, 1), (1, 1, 5, 7)]
REAL = torch.ones(2, 1, 5, 1, dtype=torch.bool)
REAL[1, :, 3:] = False


def looked_at(valid: Tensor, spec: AttentionSpec) -> list[Tensor]:
    """Scales, histogram, thresholds, counts, and the output of one call, after calibration on that call."""
    query, key, value = normal(0, 2, 4, 5, 8), normal(1, 2, 2, 7, 8) + 2, normal(2, 2, 2, 7, 8)
    state = CompressedAttention(spec, 4, 2, 8).eval()
    observing = Observing(state)
    observing.see(state, state.call(query, key, value, valid, REAL, 0.35))
    scales = [observer.scale() for observer in observing.observers.values()]
    for name, scale in zip(observing.observers, scales, strict=True):
        getattr(state, f"{name}_scale").copy_(scale)
    with watched([(state, Fitting(slice(None)))]):
        state(state.call(query, key, value, valid, REAL, 0.35))
    state.take_seen(0.0)
    state.set_sparsity(0.5)
    compressed, dense = Counting(state), Counting(state)
    with watched([(state, compressed)]):
        output = state(state.call(query, key, value, valid, REAL, 0.35))
    with watched([(state, dense), (state, observing)]):
        state.show(state.call(query, key, value, valid, REAL, 0.35))
    return [*scales, state.histogram, state.cutoff, output, *compressed.counts.tensors(), *dense.counts.tensors()]


@pytest.mark.parametrize("smooth_key", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_of_any_shape_gives_the_statistics_of_the_mask_in_full(shape: tuple[int, ...], smooth_key: bool) -> None:
    valid = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    spec = AttentionSpec(smooth_key=smooth_key)
    found, expected = (looked_at(mask, spec) for mask in (valid, valid.expand(2, 4, 5, 7).clone()))
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def test_a_call_without_a_key_counts_nothing_and_gives_zeros() -> None:
    state = CompressedAttention(AttentionSpec(sparsity=0.5, smooth_key=True), 4, 2, 8).eval()
    counting = start(state, Counting(state))
    start(state, Fitting(slice(None)))
    empty = torch.zeros(2, 2, 0, 8)
    output = state(state.call(normal(0, 2, 4, 5, 8), empty, empty, None, REAL, 0.35))
    assert torch.equal(output, torch.zeros(2, 4, 5, 8))
    assert int(state.seen.sum()) == 0
    expected = dataclasses.replace(PairCounts.none_yet(4), sequences=torch.full((4,), 2.0, dtype=torch.float64))
    for left, right in zip(counting.counts.tensors(), expected.tensors(), strict=True):
        assert torch.equal(left, right)
    start(state, Observing(state))
    state.show(state.call(normal(0, 2, 4, 5, 8), empty, empty, None, REAL, 0.35))
