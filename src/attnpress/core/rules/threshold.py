"""Rule "threshold": pairs with P >= theta, the reading of the published method."""

from __future__ import annotations

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.exponential import STEPS_PER_OCTAVE
from attnpress.core.rules.base import BIN_WIDTH, BINS, Rule, as_integer, row_total


class Threshold(Rule):
    """P = probability / total >= theta = exp(-cutoff), and the row maximum whatever its P."""

    kernels = frozenset({"cpu", "gpu", "onnx", "openvino"})

    def keep(
        self,
        spec: AttentionSpec,
        distance: Tensor,
        probability: Tensor,
        valid: Tensor,
        alpha: Tensor,
        cutoff: Tensor | None,
    ) -> Tensor:
        """Pairs of at least theta, and the row maximum."""
        if cutoff is None:
            return valid
        least = least_probability(cutoff) * row_total(probability).float()
        return ((probability.float() >= least) | (distance == 0)) & valid

    def integer_cut(
        self, spec: AttentionSpec, probability: Tensor, valid: Tensor, alpha: Tensor, cutoff: Tensor | None
    ) -> Tensor | None:
        """The least p~ kept, beside the row maximum."""
        if cutoff is None:
            return None
        return as_integer((least_probability(cutoff.view(1, -1, 1, 1)) * row_total(probability).float()).ceil())

    def bins(self, t: Tensor, probability: Tensor, distance: Tensor) -> Tensor:
        """-log2 P, from the very integers that the rule compares, since t is finer than small probabilities."""
        total = row_total(probability).clamp(min=1)
        position = torch.log2(total.double() / probability.double()) * (STEPS_PER_OCTAVE / BIN_WIDTH)
        return position.clamp_(0, BINS - 1).long()

    def kernel_cutoff(self, cutoff: Tensor) -> Tensor:
        """theta itself."""
        return least_probability(cutoff)


def least_probability(cutoff: Tensor) -> Tensor:
    """theta = exp(-cutoff); float32, rounded from float64."""
    return torch.exp(-cutoff.double()).float()


RULE = Threshold()
