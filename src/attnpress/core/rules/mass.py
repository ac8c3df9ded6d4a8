"""Rule "mass": the smallest set of most probable pairs whose P adds up to gamma."""

from __future__ import annotations

import torch
from torch import Tensor

from attnpress.core.rules.base import BINS, Rule, Scored, as_integer, present, row_total


class Mass(Rule):
    """The cutoff is gamma itself, a share of the row's mass; ties go to the lower index."""

    per_bin = 1.0 / BINS

    def kept(self, pairs: Scored) -> Tensor:
        """Pairs with less than gamma of the row's mass before them."""
        before, total = mass_before(pairs.probability, pairs.distance)
        return before.double() < present(pairs.cutoff).double() * total.double()

    def cut(self, pairs: Scored) -> Tensor:
        """Pairs are kept while the p~ of those before them sum to less."""
        return as_integer((present(pairs.cutoff).double() * row_total(pairs.probability).double()).ceil())

    def bins(self, t: Tensor, probability: Tensor, distance: Tensor) -> Tensor:
        """Share of the row's mass before each pair."""
        before, total = mass_before(probability, distance)
        return (before.double() / total.clamp(min=1) * BINS).clamp_(0, BINS - 1).long()

    def to_cutoff(self, threshold: float) -> float:
        """gamma itself."""
        return threshold

    def usable(self, cutoff: Tensor) -> tuple[Tensor, str]:
        """Above 0, up to the whole row."""
        return ((cutoff > 0) & (cutoff <= 1)) | (cutoff == torch.inf), "a share above 0 and up to 1, or infinity,"

    def to_threshold(self, cutoff: Tensor) -> Tensor:
        """gamma itself, at most the whole row."""
        return cutoff.clamp(max=1)


def mass_before(probability: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Summed probability of the pairs that rank before each pair, and of the whole row; exact int64."""
    order = distance.sort(dim=-1, stable=True).indices
    ranked = probability.long().gather(-1, order)
    running = ranked.cumsum(-1)
    before = torch.empty_like(running).scatter_(-1, order, running - ranked)
    return before, running[..., -1:]


RULE = Mass()
