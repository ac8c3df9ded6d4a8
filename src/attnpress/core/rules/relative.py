"""Rule "relative": pairs with p~ >= tau times that of the row maximum; the default."""

from __future__ import annotations

from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.rules.base import Rule, as_integer


class Relative(Rule):
    """p~ >= tau is distance <= -ln tau / alpha: one float32 division a head, before any exponential.

    The floor of numerics section 4 is implied: an integer distance is at most x exactly if it is at most floor(x).
    """

    skips = True
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
        """Pairs within the cut."""
        return valid if cutoff is None else (distance <= self.distance_cut(cutoff, alpha)) & valid

    def integer_cut(
        self, spec: AttentionSpec, probability: Tensor, valid: Tensor, alpha: Tensor, cutoff: Tensor | None
    ) -> Tensor | None:
        """The largest distance kept."""
        return None if cutoff is None else as_integer(self.distance_cut(cutoff.view(1, -1, 1, 1), alpha).floor())

    def distance_cut(self, cutoff: Tensor, alpha: Tensor) -> Tensor:
        """cutoff / alpha."""
        return cutoff.float() / alpha


RULE = Relative()
