"""The tail in the training forward: the sums of `tail.sum_tail` by float products, and their gradients.

All sums of codes are exact, in float32 or where necessary in float64, so training uses the integers of the reference.
See `fake_quantize` for the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnpress.core.quantizer import EXACT
from attnpress.core.tail import Tail, TailSums, level, mean_score, slope_of

LARGEST = 127


@dataclass
class TailRows:
    """Values of the tails of a call for the backward pass, filled slice by slice; float32.

    Attributes:
        level: u over the divisor, [B, Hq, Sq, 1]; count: pairs in the tail, likewise.
        keys, values: summed codes of K and V, [B, Hq, Sq, D].
        slope: X - sbar V_G, [B, Hq, Sq, D], and mean: sbar, [B, Hq, Sq, 1]; None with `mean`.
    """

    level: Tensor
    count: Tensor
    keys: Tensor
    values: Tensor
    slope: Tensor | None
    mean: Tensor | None

    @classmethod
    def empty(cls, q: Tensor, v: Tensor, *, linear: bool) -> TailRows:
        """Uninitialized values for the rows of q [B, Hq, Sq, D], with values as wide as v."""
        rows = q.shape[:3]
        one, wide = q.new_empty(*rows, 1), q.new_empty(*rows, v.shape[-1])
        extra = (torch.empty_like(wide), torch.empty_like(one)) if linear else (None, None)
        return cls(one, torch.empty_like(one), torch.empty_like(q), wide, *extra)

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> TailRows:
        """From `tensors`."""
        return cls(*tensors)  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor | None]:
        """In declaration order."""
        return [self.level, self.count, self.keys, self.values, self.slope, self.mean]

    def fill(self, part: slice, sums: TailSums, keys: Tensor, divisor: Tensor) -> None:
        """Store one slice of the batch."""
        self.level[part], self.count[part] = sums.level / divisor, sums.count
        self.keys[part], self.values[part] = keys, sums.value
        slope = slope_of(sums)
        if self.slope is not None and self.mean is not None and slope is not None:
            self.slope[part], self.mean[part] = slope, mean_score(sums)


def tail_pairs(codes: Tensor, allowed: Tensor | None) -> Tensor:
    """1.0 where a valid pair has no code, else 0.0. A subtraction, since comparisons are many times slower.

    Args:
        codes: P codes, float32 [B, Hq, Sq, Sk].
        allowed: 1.0 where a pair is valid, broadcastable; None if all are.
    """
    coded = codes.clamp(max=1)
    return coded.neg_().add_(1) if allowed is None else torch.sub(allowed, coded)


def sum_tail_by_products(
    rest: Tensor,
    row_max: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scored: tuple[Tensor, Tensor] | None,
    rate: Tensor,
    tail: Tail,
    qmax: int,
) -> tuple[TailSums, Tensor]:
    """`tail.sum_tail`, and the summed codes of K, [B, Hq, Sq, D].

    Args:
        rest: from `tail_pairs`.
        row_max: of the scores, integers [B, Hq, Sq, 1]; arbitrary in a row without a valid key.
        q, k, v: codes, with keys and values repeated for their query heads.
        scored, rate, tail, qmax: see `tail.sum_tail`.
    """
    dim = k.shape[-1]
    both = _product(rest, torch.cat([k, v], -1), rest.shape[-1] * LARGEST)
    keys, values = both[..., :dim], both[..., dim:]
    count = rest.sum(-1, keepdim=True)
    whole = _dot(q, keys)
    distance = count.double() * row_max.double() - whole
    t, u = level(distance, count, rate, tail.lift, qmax)
    if scored is None:
        return TailSums(count, distance, t, u, values), keys
    seen = (scored[0] @ scored[1].mT).mul_(rest)
    score = whole if tail.directions is None else seen.sum(-1, keepdim=True, dtype=torch.float64)
    return TailSums(count, distance, t, u, values, score, seen.double() @ v.double()), keys


def add_tail_gradients(
    rows: TailRows,
    rest: Tensor,
    q: Tensor,
    scored: tuple[Tensor, Tensor] | None,
    steps: tuple[Tensor, Tensor],
    scaled: Tensor,
    inner: Tensor,
    own: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor] | None:
    """Add the gradients through the tail to those of the codes of Q, K and V, in place.

    Args:
        rows: of this slice, like all other arguments.
        q: codes of Q; scored: see `tail.scored_codes`.
        steps: alpha and lambda, broadcastable to [B, Hq, Sq, 1].
        scaled: gradient of the output times the scale of V, [B, Hq, Sq, D].
        inner: its products with V, [B, Hq, Sq, Sk]; used only with `linear`.
        own: gradient times output, summed over D, [B, Hq, Sq, 1].

    Returns:
        Gradients of `scored`; None with `mean`.
    """
    (grad_q, grad_k, grad_v), (alpha, step) = grads, steps
    values = rows.values if rows.slope is None else rows.values + step * rows.slope
    some = rows.count.clamp(min=1)
    # Each pair of the tail changes the level by 1 / g of the change of its score.
    common = alpha * rows.level * ((scaled * values).sum(-1, keepdim=True) / some - own)
    common = common * (rows.count > 0)
    grad_q += common * rows.keys
    both = rest.mT @ torch.cat([common * q, rows.level * scaled], -1)
    grad_k += both[..., : q.shape[-1]]
    grad_v += both[..., q.shape[-1] :]
    if scored is None or rows.mean is None:
        return None
    # Factors of a row go to the narrow operands: passes over pairs cost most.
    factor = rows.level * step
    seen = (scored[0] @ scored[1].mT).sub_(rows.mean).mul_(rest)
    grad_v += seen.mT @ (scaled * factor)
    mean_inner = (scaled * rows.values).sum(-1, keepdim=True) / some
    moved = torch.sub(inner, mean_inner, out=seen).mul_(rest)
    return (moved @ scored[1]).mul_(factor), moved.mT @ (scored[0] * factor)


def _dot(q: Tensor, keys: Tensor) -> Tensor:
    """Dot products of q and keys by row, float64 [.., 1]."""
    return (q.double() * keys.double()).sum(-1, keepdim=True)


def _product(left: Tensor, right: Tensor, largest: float) -> Tensor:
    """A product of whole numbers whose sums are at most `largest`, float32; in float64 where float32 is not exact."""
    return left @ right if largest < EXACT else (left.double() @ right.double()).float()
