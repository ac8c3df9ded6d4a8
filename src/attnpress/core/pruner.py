"""The pruning rules (numerics, section 4): which valid pairs survive, and thresholds fitted to a target sparsity.

All rules look only at one row's own valid pairs, so a mask never depends on padding or on batch-mates. Distances and
probabilities are integers, in int or exactly in float tensors; ties are the normal case.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.exponential import STEPS_PER_OCTAVE

BINS = 4608
BIN_WIDTH = 8
"""A histogram bin spans 8/1024 octave (0.54 % of a probability); 4608 bins reach 2^-36, below any P code."""

GRAIN = 4096
"""Shares of a row are rounded up to 1/4096 where only a bound is asked for."""

COUNTED = ("topk", "nm")
"""Rules that keep a count of keys, and so have no threshold."""

GROUP = 4
"""Rule "nm" keeps some of every 4 consecutive keys of a row: M of N:M."""

LEAST, MOST = 0.4, 6.0
"""Bounds of a head's budget: what one batch says of a head is noisy, and rows need a key or two."""

WIDE = 1e9
"""Heads whose changes differ by more are treated as if they did not, so that every sum can be reached."""

HALVINGS = 80
"""More than a float64 has bits: the search for a common factor ends at the last one."""

CUT_MAX = 2.0**40
"""Beyond any distance or mass: a cut that keeps every pair."""

NATS_PER_BIN = BIN_WIDTH / STEPS_PER_OCTAVE * math.log(2)


def relative_cut(cutoff: Tensor, alpha: Tensor) -> Tensor:
    """Largest distance that rule "relative" keeps: cutoff / alpha, one float32 division.

    The floor of numerics section 4 is implied: an integer distance is at most x exactly if it is at most floor(x).

    Args:
        cutoff: float32 [.., H, 1, 1], -ln tau in nats; +inf keeps all.
        alpha: float32 score units per integer step.
    """
    return cutoff.float() / alpha


def keep_relative(distance: Tensor, cut: Tensor) -> Tensor:
    """Pairs with p~ >= tau, decided on integers before any exponential."""
    return distance <= cut


def keep_threshold(probability: Tensor, total: Tensor, distance: Tensor, cutoff: Tensor) -> Tensor:
    """Pairs with P = probability / total >= theta = exp(-cutoff), and the row maximum (the paper's reading)."""
    return (probability.float() >= least_probability(cutoff) * total.float()) | (distance == 0)


def least_probability(cutoff: Tensor) -> Tensor:
    """theta = exp(-cutoff) of rule "threshold"; float32, rounded from float64."""
    return torch.exp(-cutoff.double()).float()


def keep_topk(distance: Tensor, valid: Tensor, sparsity: float) -> Tensor:
    """The k nearest pairs of each row, k = max(1, round((1 - sparsity) * valid keys); ties go to the lower index."""
    k = kept_of_row(valid, sparsity)
    ranked = distance.double().masked_fill(~valid, math.inf)
    smallest = ranked.topk(most_kept(valid.shape[-1], sparsity), largest=False, sorted=True).values
    kth = smallest.gather(-1, k.expand(*ranked.shape[:-1], 1) - 1)
    nearer, tied = ranked < kth, ranked == kth
    room = k - nearer.sum(-1, keepdim=True)
    return (nearer | (tied & (tied.cumsum(-1) <= room))) & valid


def kept_of_row(valid: Tensor, sparsity: float) -> Tensor:
    """k of rule "topk", at least 1; int64 [.., Sq, 1]."""
    return torch.round((1.0 - sparsity) * valid.sum(-1, keepdim=True).double()).long().clamp(min=1)


def most_kept(keys: int, sparsity: float) -> int:
    """An upper bound, 1 to `keys`, of `keep_topk`'s k, in integers alone: `keys` may be symbolic, as in an export."""
    share = min(GRAIN, math.ceil((1.0 - sparsity) * GRAIN))
    return keys if share == GRAIN else keys * share // GRAIN + 1


def keep_nm(distance: Tensor, valid: Tensor, sparsity: float) -> Tensor:
    """Of every 4 consecutive keys of a row the N nearest; ties go to the lower index.

    Dynamic N:M structured attention (Chen et al., "DFSS", PPoPP 2023, arXiv 2203.00091); sparsity 0.5 is its 2:4. Keys
    that are not valid come last in their group of 4, so that padding never takes a place.
    """
    keys = distance.shape[-1]
    ranked = F.pad(distance.float().masked_fill(~valid, math.inf), (0, -keys % GROUP), value=math.inf)
    place = ranked.unflatten(-1, (-1, GROUP)).sort(dim=-1, stable=True).indices.argsort(-1)
    keep: Tensor = (place < kept_of_group(sparsity)).flatten(-2)[..., :keys] & valid
    return keep


def kept_of_group(sparsity: float) -> int:
    """N of N:M, 1 to 4: never prunes more than asked, but for `sparsity` above 0.75, which N:4 cannot reach."""
    return max(1, GROUP - math.floor(sparsity * GROUP))


def keep_mass(probability: Tensor, distance: Tensor, cutoff: Tensor) -> Tensor:
    """The smallest set of most probable pairs whose P adds up to gamma = cutoff; ties go to the lower index."""
    before, total = mass_before(probability, distance)
    return before.double() < cutoff.double() * total.double()


def mass_before(probability: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Summed probability of the pairs that rank before each pair, and of the whole row; exact int64."""
    order = distance.sort(dim=-1, stable=True).indices
    ranked = probability.long().gather(-1, order)
    running = ranked.cumsum(-1)
    before = torch.empty_like(running).scatter_(-1, order, running - ranked)
    return before, running[..., -1:]


def keep_mask(
    spec: AttentionSpec, distance: Tensor, probability: Tensor, valid: Tensor, alpha: Tensor, cutoff: Tensor | None
) -> Tensor:
    """The keep mask of `spec.rule` over valid pairs.

    Args:
        distance: integers [B, H, Sq, Sk]; +inf or anything large where not valid.
        probability: 16-bit fixed point, same shape; 0 where not valid.
        valid: bool, same shape.
        alpha: broadcastable float32.
        cutoff: float32 [1, H, 1, 1] in the rule's unit (`fit_cutoff`); None prunes nothing.

    Returns:
        bool, True = keep.
    """
    if spec.rule == "topk":
        return keep_topk(distance, valid, spec.sparsity) if spec.sparsity > 0 else valid
    if spec.rule == "nm":
        return keep_nm(distance, valid, spec.sparsity)
    if cutoff is None:
        return valid
    if spec.rule == "relative":
        return keep_relative(distance, relative_cut(cutoff, alpha)) & valid
    if spec.rule == "threshold":
        total = probability.sum(-1, keepdim=True, dtype=torch.int64)
        return keep_threshold(probability, total, distance, cutoff) & valid
    return keep_mass(probability, distance, cutoff) & valid


def integer_cut(
    spec: AttentionSpec, probability: Tensor, valid: Tensor, alpha: Tensor, cutoff: Tensor | None
) -> Tensor | None:
    """The integer that each row of `keep_mask` comes down to, for those who build the comparison.

    Args:
        probability, valid, alpha: as `keep_mask`.
        cutoff: float32 [H] or None.

    Returns:
        int64, broadcastable to [B, H, Sq, 1]; None where nothing is pruned. With rule "relative" the largest distance
        kept; "threshold" the least p~ kept, beside the row maximum; "mass" pairs are kept while the p~ of those
        before them add up to less; "topk" the keys kept of a row, "nm" those of each 4.
    """
    if spec.rule in COUNTED:
        if spec.sparsity == 0:
            return None
        if spec.rule == "topk":
            return kept_of_row(valid, spec.sparsity)
        return torch.full((1, 1, 1, 1), kept_of_group(spec.sparsity))
    if cutoff is None:
        return None
    per_head = cutoff.view(1, -1, 1, 1)
    if spec.rule == "relative":
        cut = relative_cut(per_head, alpha).floor()
    else:
        total = probability.sum(-1, keepdim=True, dtype=torch.int64)
        wide = (
            per_head.double() * total.double() if spec.rule == "mass" else least_probability(per_head) * total.float()
        )
        cut = wide.ceil()
    return cut.double().nan_to_num(0.0).clamp(max=CUT_MAX).long()


def pair_bins(spec: AttentionSpec, t: Tensor, probability: Tensor, distance: Tensor) -> Tensor:
    """Histogram bin of each pair: how late the rule would keep it, 0 for the surest.

    Args:
        t: exponents from `exponent`, int32.

    Returns:
        int64 bins, 0 to BINS - 1: -log2 p~ for "relative", -log2 P for "threshold", mass before for "mass".
    """
    if spec.rule == "mass":
        before, total = mass_before(probability, distance)
        position = before.double() / total.clamp(min=1) * BINS
    elif spec.rule == "threshold":
        total = probability.sum(-1, keepdim=True, dtype=torch.int64).clamp(min=1)
        # From the very integers that the rule compares, since t is finer than small probabilities.
        position = torch.log2(total.double() / probability.double()) * (STEPS_PER_OCTAVE / BIN_WIDTH)
    else:
        return t.long() // BIN_WIDTH
    return position.clamp_(0, BINS - 1).long()


def pair_histogram(bins: Tensor, valid: Tensor) -> Tensor:
    """Counts of valid pairs per head and bin.

    Args:
        bins: from `pair_bins`, integers [B, H, Sq, Sk].
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
        float32 [H]: -ln tau, -ln theta, or gamma for rule "mass"; +inf keeps everything.

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
    unit = 1.0 / BINS if spec.rule == "mass" else NATS_PER_BIN
    return (position * unit).masked_fill(share == 0, math.inf).squeeze(-1).float()


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


def pruned_pairs(spec: AttentionSpec, histogram: Tensor, cutoff: Tensor | None) -> Tensor:
    """How many of the pairs in `histogram` lie beyond the cutoff: what `fit_cutoff` asks for, on pairs of any origin.

    Args:
        histogram: float64 [H, BINS]; within a bin, pairs count as evenly spread.
        cutoff: float32 [H]; None prunes nothing. Rules "topk" and "nm" have none: they prune the share they can.

    Returns:
        float64 [H].
    """
    total = histogram.sum(-1)
    if spec.rule == "topk":
        return total * spec.sparsity
    if spec.rule == "nm":
        return total * (1 - kept_of_group(spec.sparsity) / GROUP)
    if cutoff is None:
        return torch.zeros_like(total)
    position = cutoff.double() / (1.0 / BINS if spec.rule == "mass" else NATS_PER_BIN)
    starts = torch.arange(BINS, dtype=torch.float64, device=histogram.device)
    kept = (position.unsqueeze(-1) - starts).clamp(0, 1)
    return total - (histogram * kept).sum(-1)


def fixed_cutoff(spec: AttentionSpec, heads: int) -> Tensor:
    """The user's own `spec.threshold` (tau, theta or gamma) as the cutoff of every head; float32 [heads]."""
    if spec.threshold is None:
        raise ValueError("attention.threshold is not set")
    value = spec.threshold if spec.rule == "mass" else -math.log(spec.threshold)
    return torch.full((heads,), value, dtype=torch.float32)
