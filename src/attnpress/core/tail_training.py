"""The tail in the training forward: the sums of `tail.sum_tail` by float products, and their gradients.

All sums of codes are exact, in float32 or where necessary in float64, so training uses the integers of the reference.
See `fake_quantize` for the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnpress.core.quantizer import EXACT
from attnpress.core.tail import Tail, TailSums, level, mean_score, score_steps

LARGEST = 127


@dataclass
class TailRows:
    """Values of the tails of a call for the backward pass, filled slice by slice; float32.

    Attributes:
        level: u over the divisor, [B, Hq, Sq, 1]; count: pairs in the tail, likewise.
        weighted: from `tail.weighted_values`, [B, Hq, Sq, D].
        values: summed codes of V, [B, Hq, Sq, D], and mean: sbar, [B, Hq, Sq, 1]; None with `mean`.
    """

    level: Tensor
    count: Tensor
    weighted: Tensor
    values: Tensor | None
    mean: Tensor | None

    @classmethod
    def empty(cls, q: Tensor, v: Tensor, *, linear: bool) -> TailRows:
        """Uninitialized values for the rows of q [B, Hq, Sq, D], with values as wide as v."""
        one, wide = q.new_empty(*q.shape[:3], 1), q.new_empty(*q.shape[:3], v.shape[-1])
        extra = (torch.empty_like(wide), torch.empty_like(one)) if linear else (None, None)
        return cls(one, torch.empty_like(one), wide, *extra)

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> TailRows:
        """From `tensors`."""
        return cls(*tensors)  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor | None]:
        """In declaration order."""
        return [self.level, self.count, self.weighted, self.values, self.mean]

    def fill(self, part: slice, sums: TailSums, weighted: Tensor, divisor: Tensor) -> None:
        """Store one slice of the batch."""
        self.level[part], self.count[part], self.weighted[part] = sums.level / divisor, sums.count, weighted
        if self.values is not None and self.mean is not None:
            self.values[part], self.mean[part] = sums.value, mean_score(sums)


def tail_pairs(codes: Tensor, allowed: Tensor | None) -> Tensor:
    """1.0 where a valid pair has no code, else 0.0. A subtraction, since comparisons are many times slower.

    Args:
        codes: P codes, float32 [B, Hq, Sq, Sk], 0 where a pair is not valid.
        allowed: 1.0 where a pair is valid, broadcastable; None if all are.
    """
    return ((1 if allowed is None else allowed) - codes).clamp_(min=0)


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
) -> TailSums:
    """`tail.sum_tail` by float products.

    Args:
        rest: from `tail_pairs`.
        row_max: of the scores, integers [B, Hq, Sq, 1]; arbitrary in a row without a valid key.
        q, k, v: codes, with keys and values repeated for their query heads.
        scored, rate, tail, qmax: see `tail.sum_tail`.
    """
    count = rest.sum(-1, keepdim=True)
    score = slope = None
    if scored is not None:
        seen = (scored[0] @ scored[1].mT).mul_(rest)
        score = seen.sum(-1, keepdim=True, dtype=torch.float64)
        slope = seen.double() @ v.double()
    if score is not None and tail.directions is None:  # the whole score is seen, so its sum gives the distance too
        whole, values = score, _product(rest, v, rest.shape[-1] * LARGEST)
    else:
        both = _product(rest, torch.cat([k, v], -1), rest.shape[-1] * LARGEST)
        keys, values = both[..., : k.shape[-1]], both[..., k.shape[-1] :]
        whole = (q.double() * keys.double()).sum(-1, keepdim=True)
    distance = count.double() * row_max.double() - whole
    t, u = level(distance, count, rate, tail.lift, qmax)
    return TailSums(count, distance, t, u, values, score, slope)


class TailSlopes(NamedTuple):
    """What a pair of the tail adds, with x the product of `scaled` and its value, and s its score; [B, Hq, Sq, 1] each.

    level + slope x to the gradient of the product of Q and K, and value_level + slope s to the weight of its value. The
    slope is None with `mean`. With directions, moved_level + slope x belongs to the gradient of the projected score,
    and `level` alone to that of the product.
    """

    level: Tensor
    value_level: Tensor
    slope: Tensor | None = None
    moved_level: Tensor | None = None

    def terms(self) -> list[Tensor]:
        """As columns of `fake_quantize.Survivors.terms`, where the whole score is seen."""
        return [x for x in (self.level, self.value_level, self.slope) if x is not None]


def tail_slopes(rows: TailRows, alpha: Tensor, tail: Tail, scaled: Tensor, own: Tensor) -> TailSlopes:
    """See `add_tail_gradients`."""
    some = rows.count.clamp(min=1)
    # Each pair of the tail changes the level by 1 / g of the change of its score.
    common = alpha * rows.level * ((scaled * rows.weighted).sum(-1, keepdim=True) / some - own) * (rows.count > 0)
    if rows.values is None or rows.mean is None:
        return TailSlopes(common, rows.level)
    slope = rows.level * score_steps(alpha, tail, scaled.shape[1])
    moved_level = slope * -(scaled * rows.values).sum(-1, keepdim=True) / some
    value_level = rows.level - slope * rows.mean
    if tail.directions is None:
        return TailSlopes(common + moved_level * (rows.count > 0), value_level, slope)
    return TailSlopes(common, value_level, slope, moved_level)


def add_tail_gradients(
    rows: TailRows,
    rest: Tensor,
    scored: tuple[Tensor, Tensor] | None,
    alpha: Tensor,
    tail: Tail,
    scaled: Tensor,
    inner: Tensor,
    own: Tensor,
    weights: Tensor,
    change: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Add the pairs of the tail to the weights of values and to the gradients of scores, in place.

    Args:
        rows: of this slice, like all other arguments.
        rest: from `tail_pairs`.
        scored: see `tail.scored_codes`.
        alpha: broadcastable to [B, Hq, Sq, 1].
        scaled: gradient of the output times the scale of V, [B, Hq, Sq, D].
        inner: its products with V, [B, Hq, Sq, Sk]; used only with `linear`.
        own: gradient times output, summed over D, [B, Hq, Sq, 1].
        weights: of the values in the output, [B, Hq, Sq, Sk].
        change: gradients of the products of Q and K, same shape.

    Returns:
        Gradients of `scored` where directions see the score; else None.
    """
    slopes = tail_slopes(rows, alpha, tail, scaled, own)
    if scored is None or slopes.slope is None:
        change.addcmul_(rest, slopes.level)
        weights.addcmul_(rest, slopes.value_level)
        return None
    seen = scored[0] @ scored[1].mT
    torch.addcmul(slopes.value_level, seen, slopes.slope, out=seen)
    weights.addcmul_(rest, seen)
    if slopes.moved_level is None:
        change.addcmul_(rest, torch.addcmul(slopes.level, inner, slopes.slope, out=seen))
        return None
    change.addcmul_(rest, slopes.level)
    moved = torch.addcmul(slopes.moved_level, inner, slopes.slope, out=seen).mul_(rest)
    return moved @ scored[1], moved.mT @ scored[0]


def sees_all_alike(allowed: Tensor | None) -> bool:
    """True if all rows of a head have the same valid keys, as `add_all_pairs` needs."""
    return allowed is None or allowed.shape[2] == 1


def add_all_pairs(
    slopes: TailSlopes,
    allowed: Tensor | None,
    scaled: Tensor,
    codes: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add to the gradients of the codes what all valid pairs have as pairs of the tail, in place.

    A kernel subtracts it for pairs that have a code. Sums over pairs become products of D x D matrices.

    Args:
        slopes: where the whole score is seen, or with `mean`.
        allowed: 1.0 where a pair is valid, [B or 1, Hq or 1, 1, Sk]; None if all are.
        scaled: gradient of the output times the scale of V, [B, Hq, Sq, D].
        codes: of Q, K and V, with keys and values repeated for their query heads.
        grads: their gradients.
    """
    q, k, v = codes
    grad_q, grad_k, grad_v = grads
    seen: Tensor | float = 1.0 if allowed is None else allowed.mT
    grad_q.add_(slopes.level * (k * seen).sum(-2, keepdim=True))
    for_key, for_value = ((x * y).sum(-2, keepdim=True) for x, y in ((slopes.level, q), (slopes.value_level, scaled)))
    if slopes.slope is not None:
        grad_q.add_(slopes.slope * (scaled @ ((v * seen).mT @ k)))
        for_key = for_key + v @ (scaled.mT @ (slopes.slope * q))
        for_value = for_value + k @ (q.mT @ (slopes.slope * scaled))
    grad_k.add_(seen * for_key)
    grad_v.add_(seen * for_value)


def _product(left: Tensor, right: Tensor, largest: float) -> Tensor:
    """A product of whole numbers whose sums are at most `largest`, float32; in float64 where float32 is not exact."""
    return left @ right if largest < EXACT else (left.double() @ right.double()).float()
