"""Rule "nm": the N nearest of every 4 consecutive keys of a row."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.core.rules.base import CountingRule, Scored

GROUP = 4
"""M of N:M: number of consecutive keys per group."""


class NM(CountingRule):
    """Dynamic N:M structured attention (Chen et al., "DFSS", PPoPP 2023, arXiv 2203.00091); sparsity 0.5 is its 2:4.

    Ties go to the lower index. Keys that are not valid rank last in their group, so padding never takes a place.
    """

    def kept(self, pairs: Scored) -> Tensor:
        """The N nearest of each group."""
        keys = pairs.distance.shape[-1]
        ranked = pairs.distance.float().masked_fill(~pairs.valid, math.inf)
        ranked = F.pad(ranked, (0, -keys % GROUP), value=math.inf)
        place = ranked.unflatten(-1, (-1, GROUP)).sort(dim=-1, stable=True).indices.argsort(-1)
        keep: Tensor = (place < kept_of_group(pairs.spec.sparsity)).flatten(-2)[..., :keys]
        return keep

    def cut(self, pairs: Scored) -> Tensor:
        """The keys kept of each group."""
        return torch.full((1, 1, 1, 1), kept_of_group(pairs.spec.sparsity))

    def share(self, sparsity: float) -> float:
        """The share that a whole number of keys per group gives."""
        return 1 - kept_of_group(sparsity) / GROUP


def kept_of_group(sparsity: float) -> int:
    """N, 1 to 4. Never prunes more than requested, except for `sparsity` above 0.75, which N:4 cannot reach."""
    return max(1, GROUP - math.floor(sparsity * GROUP))


RULE = NM()
