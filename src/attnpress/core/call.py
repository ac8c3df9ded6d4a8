"""One call of compressed attention: all that its result depends on, as one object."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.tail import Tail


@dataclass(frozen=True)
class Scales:
    """Static scales, float32, broadcastable to their tensors; None where not quantized or dynamic (Q by token).

    `tail` holds what calibration fits for the tail; without it, a tail has no lift.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    tail: Tail | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class AttentionCall:
    """What compressed attention is given.

    Attributes:
        query: float32, bfloat16 or float16 [B, Hq, Sq, D]; any strides.
        key, value: [B, Hkv, Sk, D], Hq a multiple of Hkv.
        valid: bool broadcastable to [B, Hq, Sq, Sk], True where the query may attend to the key; None allows all.
        scales: from calibration.
        cutoff: float32 [Hq], thresholds in the unit of the rule (`thresholds.fit_cutoff`); None prunes nothing.
        spec: bits, modes and rule.
        scaling: factor of the scores, usually 1 / sqrt(D).
        real: bool [B or 1, 1, Sq, 1], rows of real tokens, for statistics only; None if all are.
        dropout: probability of dropping a P code, after quantization; for training.
        bounds: int64 [sequences + 1], from 0 to Sq, never falling: sequences that lie end to end in one row of a
            batch of 1, each attending to itself alone; for kernels. None if there is one in each row of the batch.
        causal: also keep each query from the keys after it; the last query sees all. For kernels.
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
        """The same call but for what is named."""
        return replace(self, **changes)


class Attend(Protocol):
    """A way to compute a call; the output is float32 [B, Hq, Sq, D]."""

    def __call__(self, call: AttentionCall) -> Tensor:
        """Compute it."""
