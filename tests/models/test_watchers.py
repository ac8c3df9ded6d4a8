"""What watchers see of the calls: scales, pairs for thresholds, counts."""

from __future__ import annotations

import pytest
import torch

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, RuleName, TensorSpec
from attnpress.core.attention import integer_attention, prune_and_code, repeat_heads
from attnpress.core.cost import count_pairs
from attnpress.core.fake_quantize import scores_operands
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BINS
from attnpress.core.thresholds import pair_histogram
from attnpress.models.watchers import Counting, Fitting, Observing, start, watched
from attnpress.models.work import pairs_work
from tests.models.states import (
    DIM,
    HEADS,
    RULES,
    calibrated,
    call,
    counts_of,
    make_inputs,
    make_state,
    watch,
)

# Observing.


def test_observers_see_real_tokens_only() -> None:
    query, key, value, valid, real = make_inputs()
    filled = [torch.where(real, x, 1e4) for x in (query, key, value)]
    one, other = (calibrated(AttentionSpec(), (*x, valid, real)) for x in ((query, key, value), filled))
    for name in "qkv":
        assert torch.equal(getattr(one, f"{name}_scale"), getattr(other, f"{name}_scale"))


def test_observers_of_smoothed_keys_see_them_smoothed() -> None:
    query, key, value, valid, real = make_inputs()
    shifted = (query, key + 50, value, valid, real)
    smooth, rough = (calibrated(AttentionSpec(smooth_key=flag), shifted) for flag in (True, False))
    assert float(smooth.k_scale.max()) < 10 / 127 < 40 / 127 < float(rough.k_scale.min())


def test_observers_are_those_of_the_spec() -> None:
    spec = AttentionSpec(q=TensorSpec(bits=4), k=TensorSpec(bits=8), v=TensorSpec(observer="percentile"))
    assert {name: one.name for name, one in Observing(make_state(spec)).observers.items()} == {
        "q": "mse", "k": "ema", "v": "percentile",
    }  # fmt: skip


# Histogram.


@pytest.mark.parametrize("rule", RULES)
def test_the_histogram_counts_valid_pairs_of_real_rows(rule: RuleName) -> None:
    inputs = make_inputs()
    state = make_state(AttentionSpec(rule=rule, sparsity=0.5))
    watch(state, inputs, slice(None))
    assert state.seen.sum(-1).tolist() == [11**2 + 6**2] * HEADS
    watch(state, inputs, slice(2, None, 4))
    assert state.seen.sum(-1).tolist() == [11**2 + 6**2 + 3 * 11 + 1 * 6] * HEADS


def test_every_row_is_seen_once_over_a_round_of_strides() -> None:
    inputs = make_inputs()
    whole, parts = make_state(), make_state()
    watch(whole, inputs, slice(None))
    for first in range(8):
        watch(parts, inputs, slice(first, None, 8))
    assert torch.equal(parts.seen, whole.seen)


@pytest.mark.parametrize("rule", RULES)
def test_a_stride_without_a_row_sees_nothing(rule: RuleName) -> None:
    state = make_state(AttentionSpec(rule=rule, sparsity=0.5))
    for lengths in ((1,), (5, 2)):
        inputs = make_inputs(lengths=lengths)
        watch(state, inputs, slice(5, None, 8))
        query, key, value, *_ = inputs
        watch(state, (query, key, value, None, None), slice(5, None, 8))  # type: ignore[arg-type]  # no mask at all
    assert not state.seen.any()


def test_what_was_seen_moves_into_a_decaying_histogram() -> None:
    state = make_state()
    state.histogram += 1
    state.seen += 2
    state.take_seen(0.5)
    assert torch.equal(state.histogram, torch.full((HEADS, BINS), 2.5, dtype=torch.float64))
    assert not state.seen.any()
    state.seen += 1
    state.take_seen(0.0, reduce=lambda tensor, how: tensor * (3 if how == "sum" else 0))
    assert torch.equal(state.histogram, torch.full((HEADS, BINS), 3.0, dtype=torch.float64))


def test_watching_and_counting_change_neither_output_nor_gradients() -> None:
    inputs = make_inputs()
    state = calibrated(AttentionSpec(sparsity=0.5), inputs)
    query = inputs[0].requires_grad_()
    results = []
    for watchers in ([], [Fitting(slice(None)), Counting(state)]):
        with watched((state, watcher) for watcher in watchers):
            output = call(state, inputs)
        (gradient,) = torch.autograd.grad(output.sum(), query)
        results.append((output, gradient))
    for plain, looked_at in zip(*results, strict=True):
        assert torch.equal(plain, looked_at)


# Counts.


@pytest.mark.parametrize("rule", RULES)
def test_counts_are_those_of_the_reference(rule: RuleName) -> None:
    inputs = make_inputs()
    state = calibrated(AttentionSpec(rule=rule, sparsity=0.7, p=ProbsSpec(bits=4)), inputs)
    query, key, value, valid, real = inputs
    found = integer_attention(state.call(query, key, value, valid, None, DIM**-0.5))
    counted = (valid & real).expand(found.keep.shape)
    expected = count_pairs(found.p_codes.float(), ~found.keep, counted)
    counts = counts_of(state, inputs)
    for ours, theirs in zip(counts.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert counts.rows.tolist() == [17] * HEADS
    assert bool((counts.sparsity() >= counts.pruned_fraction()).all())


@pytest.mark.parametrize("rule", ["relative", "threshold"])
def test_thresholds_of_foretold_masks_are_fitted_to_foretold_scores(rule: RuleName) -> None:
    inputs = make_inputs()
    state = calibrated(AttentionSpec(rule=rule, sparsity=0.7, predictor_bits=4), inputs)
    query, key, value, valid, real = inputs
    found = integer_attention(state.call(query, key, value, valid, None, DIM**-0.5))
    counted = (valid & real).expand(found.keep.shape)
    counts = counts_of(state, inputs)
    expected = count_pairs(found.p_codes.float(), ~found.keep, counted)
    for ours, theirs in zip(counts.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert float(counts.total().pruned_fraction()) == pytest.approx(0.7, abs=0.12), "steps of 4 bits are coarse"
    exact = calibrated(AttentionSpec(rule=rule, sparsity=0.7), inputs)
    assert not torch.equal(exact.cutoff, state.cutoff)
    work = pairs_work(state, counts.total())
    total = counts.total()
    kept, survivors = int(total.pairs - total.pruned), int(total.pairs - total.zeros)
    assert work.bit_operations_remaining == DIM * (int(total.pairs) * 16 + kept * 64 + survivors * 64)


def test_dense_calls_count_their_pairs_too() -> None:
    state = make_state(DENSE)
    query, key, value, valid, real = make_inputs()
    counting = start(state, Counting(state))
    state.show(state.call(query, key, value, valid, real, DIM**-0.5))
    state.show(state.call(query, key, value, None, None, DIM**-0.5))
    assert counting.counts.pairs.tolist() == [11**2 + 6**2 + 2 * 11**2] * HEADS
    assert not counting.counts.zeros.any()
    assert not counting.counts.pruned.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [slice(None), slice(1, None, 3)])
def test_the_histogram_holds_the_pairs_of_the_reference_before_pruning(rule: RuleName, rows: slice) -> None:
    inputs = make_inputs()
    state = calibrated(AttentionSpec(rule=rule, sparsity=0.5), inputs)
    watch(state, inputs, rows)
    query, key, value, valid, real = inputs
    q, k, alpha = scores_operands(state.call(query, key, value, valid, real, DIM**-0.5))
    pairs = prune_and_code(q @ repeat_heads(k, HEADS).mT, valid, alpha, None, state.spec)
    bins = rule_of(state.spec).bins(pairs.exponent, pairs.probability, pairs.distance)
    assert torch.equal(state.seen, pair_histogram(bins[:, :, rows], (pairs.valid & real)[:, :, rows]))
