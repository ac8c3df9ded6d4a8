"""Thresholds fitted to a target, and budgets that share it among heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec, RuleName
from attnpress.core.attention import Pairs, prune_and_code
from attnpress.core.rules import Scored, rule_of
from attnpress.core.rules.base import BINS
from attnpress.core.thresholds import LEAST, MOST, fit_cutoff, fixed_cutoff, head_budgets, pair_histogram
from tests.core.drawn_pairs import SPARSITIES, kept_of, make_pairs
from tests.core.factories import SEEDS, generator, make_spec

FITTED: tuple[RuleName, ...] = ("relative", "threshold", "mass")


def spread_pairs(spec: AttentionSpec, seed: int, keys: int, cutoff: Tensor | None = None) -> Pairs:
    """Normal scores in fine steps: hardly any ties, other spreads for other heads; a padded second sequence."""
    spread = torch.tensor([300.0, 1000.0, 3000.0]).view(1, 3, 1, 1)
    acc = (torch.randn(2, 3, 12, keys, generator=generator(seed)) * spread).round()
    valid = torch.arange(keys) < torch.tensor([keys, keys // 2 + 1]).view(2, 1, 1, 1)
    return prune_and_code(acc, valid, torch.full((1, 3, 1, 1), 1e-3), cutoff, spec)


def histogram_of(spec: AttentionSpec, pairs: Pairs) -> Tensor:
    return pair_histogram(rule_of(spec).bins(pairs.exponent, pairs.probability, pairs.distance), pairs.valid)


# Thresholds fitted to a target.


@pytest.mark.parametrize("rule", FITTED)
@given(sparsity=SPARSITIES, seed=SEEDS)
def test_fitted_thresholds_hold_their_target_on_the_pooled_pairs(rule: RuleName, sparsity: float, seed: int) -> None:
    spec = make_spec(rule=rule, sparsity=sparsity)
    lengths = (5, 17, 60)
    batches = [spread_pairs(spec, seed + keys, keys) for keys in lengths]
    histogram = torch.stack([histogram_of(spec, pairs) for pairs in batches]).sum(0)
    cutoff = fit_cutoff(spec, histogram, sparsity)
    after = [spread_pairs(spec, seed + keys, keys, cutoff) for keys in lengths]
    kept = torch.stack([pairs.keep.sum((0, 2, 3)) for pairs in after]).sum(0)
    wanted = (1 - sparsity) * histogram.sum(-1)
    # Pairs of the bin that the threshold falls in, and of its neighbours, may go either way.
    index = (histogram.cumsum(-1) < wanted.unsqueeze(-1)).sum(-1)
    slack = (histogram * ((torch.arange(BINS) - index.unsqueeze(-1)).abs() <= 1)).sum(-1)
    spared = torch.stack([spared_maxima(spec, pairs, index) for pairs in batches]).sum(0)
    assert bool((kept >= wanted - slack - 1).all())
    assert bool((kept <= wanted + slack + spared + 1).all())


def spared_maxima(spec: AttentionSpec, pairs: Pairs, index: Tensor) -> Tensor:
    """Rows of each head that are all beyond the threshold's bin: each keeps its maximum nevertheless."""
    bins = rule_of(spec).bins(pairs.exponent, pairs.probability, pairs.distance).masked_fill(~pairs.valid, BINS)
    beyond: Tensor = (bins.amin(-1) > index.view(1, -1, 1)).sum((0, 2))
    return beyond


@pytest.mark.parametrize("rule", FITTED)
def test_pooled_thresholds_are_those_of_one_large_batch(rule: RuleName) -> None:
    spec = make_spec(rule=rule, sparsity=0.8)
    parts = [histogram_of(spec, spread_pairs(spec, seed, 20)) for seed in (1, 2)]
    pairs = [spread_pairs(spec, seed, 20) for seed in (1, 2)]
    bins = torch.cat([rule_of(spec).bins(one.exponent, one.probability, one.distance) for one in pairs])
    together = pair_histogram(bins, torch.cat([one.valid for one in pairs]))
    assert torch.equal(parts[0] + parts[1], together)


@pytest.mark.parametrize("rule", FITTED)
@given(seed=SEEDS)
def test_more_sparsity_is_a_harsher_threshold(rule: RuleName, seed: int) -> None:
    spec = make_spec(rule=rule, sparsity=0.5)
    histogram = histogram_of(spec, spread_pairs(spec, seed, 30))
    cutoffs = torch.stack([fit_cutoff(spec, histogram, sparsity) for sparsity in (0.0, 0.1, 0.5, 0.9, 0.99)])
    assert bool((cutoffs.diff(dim=0) < 0).all())
    assert bool((cutoffs > 0).all())


@given(seed=SEEDS)
def test_histogram_counts_valid_pairs_by_head(seed: int) -> None:
    bins = torch.randint(0, BINS, (2, 3, 4, 5), generator=generator(seed))
    valid = torch.rand(2, 3, 4, 5, generator=generator(seed + 1)) < 0.5
    expected = torch.zeros(3, BINS, dtype=torch.float64)
    for b, h, i, j in valid.nonzero().tolist():
        expected[h, bins[b, h, i, j]] += 1
    assert torch.equal(pair_histogram(bins, valid), expected)


@pytest.mark.parametrize("rule", FITTED)
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_head_without_a_pair_cannot_be_fitted(rule: RuleName, sparsity: float) -> None:
    histogram = torch.ones(2, BINS, dtype=torch.float64)
    histogram[1] = 0
    with pytest.raises(ValueError, match="no valid pairs were observed"):
        fit_cutoff(make_spec(rule=rule), histogram, sparsity)


def test_a_threshold_of_ones_own_is_in_the_unit_of_the_rule() -> None:
    assert fixed_cutoff(make_spec(rule="mass", threshold=0.75), 2).tolist() == [0.75, 0.75]
    for rule in ("relative", "threshold"):
        cutoff = fixed_cutoff(make_spec(rule=rule, threshold=0.01), 3)
        assert cutoff.tolist() == pytest.approx([-math.log(0.01)] * 3)
    with pytest.raises(ValueError, match="threshold is not set"):
        fixed_cutoff(make_spec(), 2)


@pytest.mark.parametrize(("cutoff", "kept"), [(0.0, {0}), (0.74, {0, 1}), (0.75, {0, 1, 2}), (0.76, {0, 1, 2})])
def test_a_pair_exactly_at_the_cut_is_kept(cutoff: float, kept: set[int]) -> None:
    alpha = torch.full((1, 1, 1, 1), 0.25)
    acc = torch.tensor([[[[10.0, 8.0, 7.0, 6.0]]]])
    pairs = prune_and_code(acc, None, alpha, torch.tensor([cutoff]), make_spec(sparsity=0.5))
    assert kept_of(pairs.keep) == [kept]


@given(seed=SEEDS, threshold=st.floats(0.001, 1.0))
def test_a_relative_threshold_keeps_what_reaches_it(seed: int, threshold: float) -> None:
    spec = make_spec(rule="relative", threshold=threshold)
    pairs = make_pairs(spec, seed, (1, 2, 3, 9), "none", levels=60, alpha=0.05)
    own, step = fixed_cutoff(spec, 2).view(1, 2, 1, 1), torch.tensor(0.05)
    keep = rule_of(spec).keep(Scored(spec, pairs.distance, pairs.probability, pairs.valid, step, own))
    nats = pairs.distance.double() * float(np.float32(0.05))
    margin = 1e-5 * (1 - math.log(threshold))
    assert bool(keep[nats < -math.log(threshold) - margin].all())
    assert not keep[nats > -math.log(threshold) + margin].any()


@given(SEEDS, st.floats(0.05, 0.98))
def test_budgets_add_up_within_their_bounds(seed: int, sparsity: float) -> None:
    change = torch.rand(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 6
    keep = torch.full((24,), 1 - sparsity, dtype=torch.float64)
    budgets = head_budgets(change, keep)
    assert torch.isclose(budgets.sum(), keep.sum(), rtol=1e-6)
    assert bool((budgets >= LEAST * keep).all())
    assert bool((budgets <= (MOST * keep).clamp(max=1)).all())
    assert torch.equal(budgets[change.argsort()], budgets.sort().values)


def test_heads_that_change_nothing_share_alike() -> None:
    keep = torch.full((3,), 0.1, dtype=torch.float64)
    assert torch.allclose(head_budgets(torch.zeros(3, dtype=torch.float64), keep), keep)
