"""Rule "threshold": pairs with P >= theta, our reading of the published method."""

from __future__ import annotations

import torch
from torch import Tensor

from attnpress.core.exponential import STEPS_PER_OCTAVE
from attnpress.core.rules.base import BIN_WIDTH, BINS, Rule, Scored, as_integer, present, row_total


class Threshold(Rule):
    """P = probability / total >= theta = exp(-cutoff), and always the row maximum."""

    kernels = frozenset({"cpu", "gpu", "onnx", "openvino"})

    def kept(self, pairs: Scored) -> Tensor:
        """Pairs of at least theta, and the row maximum."""
        return (pairs.probability.float() >= _least(pairs)) | (pairs.distance == 0)

    def cut(self, pairs: Scored) -> Tensor:
        """The smallest p~ kept, besides the row maximum."""
        return as_integer(_least(pairs).ceil())

    def bins(self, t: Tensor, probability: Tensor, distance: Tensor) -> Tensor:
        """-log2 P, from the integers that the rule compares, since t is finer than small probabilities."""
        total = row_total(probability).clamp(min=1)
        position = torch.log2(total.double() / probability.double()) * (STEPS_PER_OCTAVE / BIN_WIDTH)
        return position.clamp_(0, BINS - 1).long()

    def kernel_cutoff(self, cutoff: Tensor) -> Tensor:
        """theta itself."""
        return least_probability(cutoff)


def _least(pairs: Scored) -> Tensor:
    return least_probability(present(pairs.cutoff)) * row_total(pairs.probability).float()


def least_probability(cutoff: Tensor) -> Tensor:
    """theta = exp(-cutoff); float32, rounded from float64."""
    return torch.exp(-cutoff.double()).float()


RULE = Threshold()
