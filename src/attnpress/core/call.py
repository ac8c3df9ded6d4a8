"""One call of compressed attention: all inputs of its result, as one object."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.tail import Tail


@dataclass(frozen=True)
class Scales:
    """Static scales, float32, broadcastable to their tensors; None if not quantized or dynamic (Q by token).

    `tail` holds the fitted parameters of the tail; without them, a tail has no lift.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    tail: Tail | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class AttentionCall:
    """Inputs of compressed attention.

    Attributes:
        query: float32, bfloat16 or float16 [B, Hq, Sq, D]; any strides.
        key, value: [B, Hkv, Sk, D], Hq a multiple of Hkv.
        valid: bool broadcastable to [B, Hq, Sq, Sk], True where the query may attend to the key; None allows all.
        scales: from calibration.
        cutoff: float32 [Hq], thresholds in the unit of the rule (`thresholds.fit_cutoff`); None prunes nothing.
        spec: bits, modes and rule.
        scaling: factor of the scores, usually 1 / sqrt(D).
        real: bool [B or 1, 1, Sq, 1], rows of real tokens, for statistics only; None if all are real.
        dropout: probability of dropping a P code, after quantization; for training.
        bounds: int64 [sequences + 1], nondecreasing from 0 to Sq: bounds of packed sequences in a batch of 1, each
            attending only to itself; for kernels. None without packing.
        causal: also mask each query from later keys; the last query sees all. For kernels.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    scales: Scales
    cutoff: Tensor | None
    spec: AttentionSpec
    scaling: float
    real: Tensor | None = None
    dropout: float = 0.0
    bounds: Tensor | None = None
    causal: bool = False

    def with_(self, **changes: Any) -> Self:
        """A copy with the named fields replaced."""
        return replace(self, **changes)


class Attend(Protocol):
    """A function that computes a call; the output is float32 [B, Hq, Sq, D]."""

    def __call__(self, call: AttentionCall) -> Tensor:
        """Compute it."""
