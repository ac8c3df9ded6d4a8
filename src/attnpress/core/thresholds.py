"""Thresholds fitted to a target sparsity, on histograms of pairs (numerics, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BINS

LEAST, MOST = 0.4, 6.0
"""Bounds of a head's budget: sensitivities from one batch are noisy, and rows need a key or two."""

WIDE = 1e9
"""Larger ratios between heads are clamped, so that every sum can be reached."""

HALVINGS = 80
"""Bisection steps, more than a float64 has bits."""


def pair_histogram(bins: Tensor, valid: Tensor) -> Tensor:
    """Counts of valid pairs per head and bin.

    Args:
        bins: from `Rule.bins`, integers [B, H, Sq, Sk].
        valid: bool, broadcastable.

    Returns:
        float64 [H, BINS], whole numbers, so that sums over batches and ranks are exact.
    """
    heads = bins.shape[1]
    offset = torch.arange(heads, dtype=bins.dtype, device=bins.device).view(1, heads, 1, 1) * (BINS + 1)
    # Pairs that do not count go to a separate bin, which is cheaper than selecting the others.
    placed = torch.where(valid, bins, BINS) + offset
    return torch.bincount(placed.flatten(), minlength=heads * (BINS + 1)).view(heads, BINS + 1)[:, :BINS].double()


def fit_cutoff(spec: AttentionSpec, histogram: Tensor, sparsity: float | Tensor) -> Tensor:
    """Per-head cutoff that removes the requested fraction of the pairs pooled in `histogram`.

    Args:
        histogram: float64 [H, BINS].
        sparsity: fraction to remove, in [0, 1), one for all heads or float64 [H]; 0 removes nothing.

    Returns:
        float32 [H] in the unit of `spec.rule`; +inf keeps everything.

    Raises:
        ValueError: a head has no pair to fit on.
    """
    total = histogram.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise ValueError(
            "no valid pairs were observed, so thresholds cannot be fitted: calibrate on real batches first"
        )
    share = torch.as_tensor(sparsity, dtype=torch.float64, device=histogram.device).view(-1, 1)
    asked = (1.0 - share) * total
    running = histogram.cumsum(-1)
    index = (running < asked).sum(-1, keepdim=True).clamp(max=BINS - 1)
    inside = histogram.gather(-1, index).clamp(min=1e-9)
    position = index + ((asked - (running.gather(-1, index) - inside)) / inside).clamp(0, 1)
    return (position * rule_of(spec).per_bin).masked_fill(share == 0, math.inf).squeeze(-1).float()


def fixed_cutoff(spec: AttentionSpec, heads: int) -> Tensor:
    """The user's own `spec.threshold` (tau, theta or gamma) as the cutoff of every head; float32 [heads]."""
    if spec.threshold is None:
        raise ValueError("attention.threshold is not set")
    return torch.full((heads,), rule_of(spec).to_cutoff(spec.threshold), dtype=torch.float32)


def head_budgets(change: Tensor, keep: Tensor) -> Tensor:
    """Fraction of its pairs that each head keeps, in proportion to its sensitivity.

    Args:
        change: float64 [H], change of the model's output if only this head is pruned; not negative.
        keep: float64 [H], in (0, 1], fraction that each head keeps without a budget.

    Returns:
        float64 [H], each between LEAST and MOST times `keep` and never above 1, with the sum of `keep`.
    """
    least, most = keep * LEAST, (keep * MOST).clamp(max=1.0)
    # If all changes are equal or zero, the fractions stay as they are.
    asked = keep * (change / change.mean()).nan_to_num(1.0).clamp(min=1 / WIDE)
    low, high = asked.new_zeros(()), asked.new_full((), MOST * WIDE)
    for _ in range(HALVINGS):
        factor = (low + high) / 2
        few = (asked * factor).clamp(least, most).sum() < keep.sum()
        low, high = torch.where(few, factor, low), torch.where(few, high, factor)
    return (asked * high).clamp(least, most)
