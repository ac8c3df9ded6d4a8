"""Rule "relative" (default): pairs with p~ >= tau, relative to the row maximum."""

from __future__ import annotations

from torch import Tensor

from attnpress.core.rules.base import Rule, Scored, as_integer, present


class Relative(Rule):
    """p~ >= tau means distance <= -ln tau / alpha: one float32 division per head, before any exponential.

    The floor of numerics section 4 is implicit: an integer distance is at most x exactly if it is at most floor(x).
    """

    skips = True
    kernels = frozenset({"cpu", "gpu", "onnx", "openvino"})

    def kept(self, pairs: Scored) -> Tensor:
        """Pairs within the cut."""
        return pairs.distance <= self.distance_cut(present(pairs.cutoff), pairs.alpha)

    def cut(self, pairs: Scored) -> Tensor:
        """The largest distance kept."""
        return as_integer(self.distance_cut(present(pairs.cutoff), pairs.alpha).floor())

    def distance_cut(self, cutoff: Tensor, alpha: Tensor) -> Tensor:
        """cutoff / alpha."""
        return cutoff.float() / alpha


RULE = Relative()
