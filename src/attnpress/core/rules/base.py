"""Interface of pruning rules (numerics, section 4). Each rule has its own module in this folder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.exponential import STEPS_PER_OCTAVE

BINS = 4608
BIN_WIDTH = 8
"""A histogram bin spans 8/1024 octave (0.54 % of a probability); 4608 bins reach 2^-36, below any P code."""

NATS_PER_BIN = BIN_WIDTH / STEPS_PER_OCTAVE * math.log(2)

CUT_MAX = 2.0**40
"""A cut that keeps every pair, beyond any distance or mass."""


@dataclass(frozen=True)
class Scored:
    """Pairs with known scores, before pruning.

    Attributes:
        spec: its sparsity determines the number of keys of a counting rule.
        distance: integers [B, H, Sq, Sk]; +inf or any large value if not valid.
        probability: 16-bit fixed point, same shape; 0 if not valid.
        valid: bool, same shape.
        alpha: broadcastable float32, score units per integer step.
        cutoff: float32 [1, H, 1, 1]; None prunes nothing.
    """

    spec: AttentionSpec
    distance: Tensor
    probability: Tensor
    valid: Tensor
    alpha: Tensor
    cutoff: Tensor | None


class Rule(ABC):
    """Which valid pairs of a row survive. A rule depends only on the row's own valid pairs.

    A mask therefore never depends on padding or on other rows of the batch. Distances and probabilities are integers,
    in int or exactly in float tensors; ties are common. A rule that keeps a number of keys is a `CountingRule`.

    The cutoff of a head is a float32 in the unit of its rule: by default -ln of a probability; +inf keeps every pair.
    Only this class converts it.

    Attributes:
        per_bin: units of the cutoff per bin of the histogram that it is fitted to.
        skips: True if the distance below the row maximum alone decides, so that pruned pairs need no exponential;
            `distance_cut` then returns the largest distance kept.
        kernels: the backends and exports that support it besides the reference.
    """

    per_bin: ClassVar[float] = NATS_PER_BIN
    skips: ClassVar[bool] = False
    kernels: ClassVar[frozenset[str]] = frozenset()

    def keep(self, pairs: Scored) -> Tensor:
        """The keep mask over valid pairs; bool, True = keep."""
        return pairs.valid if self.prunes_nothing(pairs) else self.kept(pairs) & pairs.valid

    def integer_cut(self, pairs: Scored) -> Tensor | None:
        """The integer threshold of each row, for hardware that compares integers.

        Returns:
            int64, broadcastable to [B, H, Sq, 1], see `cut`; None if nothing is pruned.
        """
        return None if self.prunes_nothing(pairs) else self.cut(pairs)

    def prunes_nothing(self, pairs: Scored) -> bool:
        """True if every valid pair is kept, for any scores."""
        return pairs.cutoff is None

    @abstractmethod
    def kept(self, pairs: Scored) -> Tensor:
        """Mask of kept pairs, if valid; called only if something may be pruned."""

    @abstractmethod
    def cut(self, pairs: Scored) -> Tensor:
        """The value of `integer_cut` if something may be pruned; its meaning depends on the rule."""

    def distance_cut(self, cutoff: Tensor, alpha: Tensor) -> Tensor:
        """For a rule that `skips`: the largest distance kept, float32.

        Args:
            cutoff: float32 [1, H, 1, 1].
            alpha: float32, score units per integer step.
        """
        raise NotImplementedError(f"{type(self).__name__} is not decided on distances alone")

    def bins(self, t: Tensor, probability: Tensor, distance: Tensor) -> Tensor:
        """Histogram bin of each pair: 0 is kept at any cutoff; -log2 p~ by default.

        Args:
            t: exponents from `exponent`, int32.

        Returns:
            int64 bins, 0 to BINS - 1.
        """
        return t.long() // BIN_WIDTH

    @property
    def bins_by_exponent(self) -> bool:
        """True if `bins` depends on the exponent only."""
        return type(self).bins is Rule.bins

    def pruned(self, spec: AttentionSpec, histogram: Tensor, cutoff: Tensor | None) -> Tensor:
        """Number of the pairs in a histogram beyond the cutoff; float64 [H].

        Args:
            spec: as for `keep`.
            histogram: float64 [H, BINS]; pairs are assumed evenly spread within a bin.
            cutoff: float32 [H]; None prunes nothing.
        """
        total = histogram.sum(-1)
        if cutoff is None:
            return torch.zeros_like(total)
        starts = torch.arange(BINS, dtype=torch.float64, device=histogram.device)
        kept = ((cutoff.double() / self.per_bin).unsqueeze(-1) - starts).clamp(0, 1)
        return total - (histogram * kept).sum(-1)

    def to_cutoff(self, threshold: float) -> float:
        """The cutoff for tau, theta or gamma."""
        return -math.log(threshold)

    def to_threshold(self, cutoff: Tensor) -> Tensor:
        """tau, theta or gamma of a cutoff."""
        return torch.exp(-cutoff)

    def usable(self, cutoff: Tensor) -> tuple[Tensor, str]:
        """Which cutoffs of a saved state are valid; bool of their shape, and the requirement in words."""
        widest = BINS * self.per_bin
        inside = (cutoff >= 0) & (cutoff <= widest * (1 + 1e-6))
        return inside | (cutoff == torch.inf), f"0 to {widest:.4g} nats, or infinity,"

    def kernel_cutoff(self, cutoff: Tensor) -> Tensor:
        """The value that the kernels' operators take for the cutoff."""
        return cutoff


class CountingRule(Rule):
    """A rule that keeps a number of keys by the current sparsity; it has no cutoff."""

    def prunes_nothing(self, pairs: Scored) -> bool:
        """True if no sparsity is requested."""
        return pairs.spec.sparsity == 0

    @abstractmethod
    def share(self, sparsity: float) -> float:
        """The fraction of pairs that it prunes at the requested sparsity."""

    def pruned(self, spec: AttentionSpec, histogram: Tensor, cutoff: Tensor | None) -> Tensor:
        """The share that it prunes, for any pairs."""
        return histogram.sum(-1) * self.share(spec.sparsity)

    def to_threshold(self, cutoff: Tensor) -> Tensor:
        """There is no threshold: 0."""
        return torch.zeros_like(cutoff)


def present(cutoff: Tensor | None) -> Tensor:
    """The cutoff of a rule that prunes something."""
    assert cutoff is not None
    return cutoff


def as_integer(cut: Tensor) -> Tensor:
    """A cut as integers, int64; NaN (a row without scores) becomes 0, +inf becomes CUT_MAX."""
    return cut.double().nan_to_num(0.0).clamp(max=CUT_MAX).long()


def row_total(probability: Tensor) -> Tensor:
    """The sum of p~ of each row, int64 [B, H, Sq, 1]."""
    return probability.sum(-1, keepdim=True, dtype=torch.int64)
