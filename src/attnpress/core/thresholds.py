"""Thresholds fitted to a target sparsity, on histograms of how late a rule would keep pairs (numerics, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BINS

LEAST, MOST = 0.4, 6.0
"""Bounds of a head's budget: what one batch says of a head is noisy, and rows need a key or two."""

WIDE = 1e9
"""Heads whose changes differ by more are treated as if they did not, so that every sum can be reached."""

HALVINGS = 80
"""More than a float64 has bits: the search for a common factor ends at the last one."""


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
    # What does not count goes to a bin of its own, which is cheaper than to pick out what does.
    placed = torch.where(valid, bins, BINS) + offset
    return torch.bincount(placed.flatten(), minlength=heads * (BINS + 1)).view(heads, BINS + 1)[:, :BINS].double()


def fit_cutoff(spec: AttentionSpec, histogram: Tensor, sparsity: float | Tensor) -> Tensor:
    """Per-head cutoff that removes the asked fraction of the pairs pooled in `histogram`.

    Args:
        histogram: float64 [H, BINS].
        sparsity: fraction to remove, in [0, 1), of every head or float64 [H]; 0 removes nothing.

    Returns:
        float32 [H]: in the unit of `spec.rule`; +inf keeps everything.

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
    """Which fraction of its pairs each head keeps, in proportion to what pruning it changes.

    Args:
        change: float64 [H], how much the model's output moves when this head alone is pruned; not negative.
        keep: float64 [H], in (0, 1], what each head keeps without a budget.

    Returns:
        float64 [H], each at least LEAST and at most MOST of `keep` and never above 1, with the sum of `keep`.
    """
    least, most = keep * LEAST, (keep * MOST).clamp(max=1.0)
    # Where all change alike, or nothing does, every head keeps what it had.
    asked = keep * (change / change.mean()).nan_to_num(1.0).clamp(min=1 / WIDE)
    low, high = asked.new_zeros(()), asked.new_full((), MOST * WIDE)
    for _ in range(HALVINGS):
        factor = (low + high) / 2
        few = (asked * factor).clamp(least, most).sum() < keep.sum()
        low, high = torch.where(few, factor, low), torch.where(few, high, factor)
    return (asked * high).clamp(least, most)
