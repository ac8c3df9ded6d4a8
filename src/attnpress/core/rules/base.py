"""What every pruning rule is asked for (numerics, section 4); each has a module of its own beside this one."""

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
"""Beyond any distance or mass: a cut that keeps every pair."""


@dataclass(frozen=True)
class Scored:
    """Pairs whose scores are known, before any is pruned.

    Attributes:
        spec: for the sparsity that a counting rule keeps to.
        distance: integers [B, H, Sq, Sk]; +inf or anything large where not valid.
        probability: 16-bit fixed point, same shape; 0 where not valid.
        valid: bool, same shape.
        alpha: broadcastable float32, score units in one integer step.
        cutoff: float32 [1, H, 1, 1]; None prunes nothing.
    """

    spec: AttentionSpec
    distance: Tensor
    probability: Tensor
    valid: Tensor
    alpha: Tensor
    cutoff: Tensor | None


class Rule(ABC):
    """Which valid pairs of a row survive. A rule looks at one row's own valid pairs alone.

    So a mask never depends on padding or on batch-mates. Distances and probabilities are integers, in int or exactly
    in float tensors; ties are the normal case. A rule that keeps a count of keys is a `CountingRule`.

    The cutoff of a head is a float32 in the unit of its rule: -ln of a probability, unless the rule says otherwise;
    +inf keeps every pair. This class is the only place that converts it.

    Attributes:
        per_bin: units of the cutoff in one bin of the histogram that it is fitted on.
        skips: whether a pair's distance below the row maximum decides alone, so that what is pruned needs no
            exponential; then `distance_cut` has the largest distance kept.
        kernels: the backends and exports that run it besides the reference.
    """

    per_bin: ClassVar[float] = NATS_PER_BIN
    skips: ClassVar[bool] = False
    kernels: ClassVar[frozenset[str]] = frozenset()

    def keep(self, pairs: Scored) -> Tensor:
        """The keep mask over valid pairs; bool, True = keep."""
        return pairs.valid if self.prunes_nothing(pairs) else self.kept(pairs) & pairs.valid

    def integer_cut(self, pairs: Scored) -> Tensor | None:
        """The integer that each row of the mask comes down to, for those who build the comparison.

        Returns:
            int64, broadcastable to [B, H, Sq, 1], see `cut`; None where nothing is pruned.
        """
        return None if self.prunes_nothing(pairs) else self.cut(pairs)

    def prunes_nothing(self, pairs: Scored) -> bool:
        """Whether every valid pair is kept, whatever the scores."""
        return pairs.cutoff is None

    @abstractmethod
    def kept(self, pairs: Scored) -> Tensor:
        """Where pairs are kept, if they are valid; asked only where something may be pruned."""

    @abstractmethod
    def cut(self, pairs: Scored) -> Tensor:
        """What `integer_cut` returns where something may be pruned; each rule says what it means."""

    def distance_cut(self, cutoff: Tensor, alpha: Tensor) -> Tensor:
        """Of a rule that `skips`: the largest distance kept, float32.

        Args:
            cutoff: float32 [1, H, 1, 1].
            alpha: float32, score units in one integer step.
        """
        raise NotImplementedError(f"{type(self).__name__} is not decided on distances alone")

    def bins(self, t: Tensor, probability: Tensor, distance: Tensor) -> Tensor:
        """Histogram bin of each pair: how late the rule would keep it, 0 for the surest; -log2 p~ unless it says so.

        Args:
            t: exponents from `exponent`, int32.

        Returns:
            int64 bins, 0 to BINS - 1.
        """
        return t.long() // BIN_WIDTH

    @property
    def bins_by_exponent(self) -> bool:
        """Whether `bins` follows from the exponent alone."""
        return type(self).bins is Rule.bins

    def pruned(self, spec: AttentionSpec, histogram: Tensor, cutoff: Tensor | None) -> Tensor:
        """How many of the pairs in a histogram lie beyond the cutoff; float64 [H].

        Args:
            spec: as `keep`.
            histogram: float64 [H, BINS]; within a bin, pairs count as evenly spread.
            cutoff: float32 [H]; None prunes nothing.
        """
        total = histogram.sum(-1)
        if cutoff is None:
            return torch.zeros_like(total)
        starts = torch.arange(BINS, dtype=torch.float64, device=histogram.device)
        kept = ((cutoff.double() / self.per_bin).unsqueeze(-1) - starts).clamp(0, 1)
        return total - (histogram * kept).sum(-1)

    def to_cutoff(self, threshold: float) -> float:
        """The cutoff of tau, theta or gamma, as the rule's definition has it."""
        return -math.log(threshold)

    def to_threshold(self, cutoff: Tensor) -> Tensor:
        """tau, theta or gamma of a cutoff."""
        return torch.exp(-cutoff)

    def usable(self, cutoff: Tensor) -> tuple[Tensor, str]:
        """Which cutoffs of a saved state can be; bool of their shape, and what is allowed in words."""
        widest = BINS * self.per_bin
        inside = (cutoff >= 0) & (cutoff <= widest * (1 + 1e-6))
        return inside | (cutoff == torch.inf), f"0 to {widest:.4g} nats, or infinity,"

    def kernel_cutoff(self, cutoff: Tensor) -> Tensor:
        """What the operators of the kernels take in place of the cutoff."""
        return cutoff


class CountingRule(Rule):
    """A rule that keeps a number of keys by the sparsity in force: it has no cutoff."""

    def prunes_nothing(self, pairs: Scored) -> bool:
        """Whether no sparsity is asked for."""
        return pairs.spec.sparsity == 0

    @abstractmethod
    def share(self, sparsity: float) -> float:
        """The fraction of the pairs that it prunes when a sparsity is asked."""

    def pruned(self, spec: AttentionSpec, histogram: Tensor, cutoff: Tensor | None) -> Tensor:
        """The share that it can prune, whatever the pairs."""
        return histogram.sum(-1) * self.share(spec.sparsity)

    def to_threshold(self, cutoff: Tensor) -> Tensor:
        """None is in force: 0."""
        return torch.zeros_like(cutoff)


def present(cutoff: Tensor | None) -> Tensor:
    """The cutoff of a rule that has been found to prune something."""
    assert cutoff is not None
    return cutoff


def as_integer(cut: Tensor) -> Tensor:
    """A cut in whole numbers, int64; NaN, of a row without scores, as 0, +inf as CUT_MAX."""
    return cut.double().nan_to_num(0.0).clamp(max=CUT_MAX).long()


def row_total(probability: Tensor) -> Tensor:
    """The summed p~ of each row, int64 [B, H, Sq, 1]."""
    return probability.sum(-1, keepdim=True, dtype=torch.int64)
