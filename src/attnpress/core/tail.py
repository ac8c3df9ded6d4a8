"""The tail of a row: contribution of pairs without a P code to the output (numerics, section 8).

Every such pair gets one common level, from the mean of their distances, without an exponential. With `linear`, a
first-order term in their score, seen in a few directions, is added. All sums are over integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.config.rules import RULES
from attnpress.core.exponential import ONE, STEPS_PER_OCTAVE, T_MAX, power_table

END = 64 * STEPS_PER_OCTAVE
"""Exponent from which the level is 0."""

OFF = -(2.0**20)
"""Lift of a head whose rule prunes nothing; its exponent exceeds END, so its level is 0."""

SHIFT = 12
"""Projections are sums of codes times directions, in units of 2^-12."""

DIRECTION_MAX, PROJECTED_MAX, OFFSET_MAX = 2**15 - 1, 127, 2**20

LARGEST_RANK = 256
"""Maximum number of directions for which the sums of `linear` fit."""

REACH = 6.0
"""Standard deviations of a projection covered by its codes."""

MASS_GRID = 2.0**30
"""Masses are summed as multiples of 2^-30 of a row; their float64 sums are exact in any order."""

SMALLEST_VARIANCE = 1e-6
"""Relative to the largest variance in Q; prevents the amplification of nearly constant directions."""


@dataclass(frozen=True)
class Directions:
    """Directions in which a key head's scores vary most; integers in float32, except `step`.

    Attributes:
        query, key: R_q and R_k, [Hkv, D, r].
        offset: o, [Hkv, r].
        step: score units of one unit of q' . k', [Hkv].
    """

    query: Tensor
    key: Tensor
    offset: Tensor
    step: Tensor


@dataclass(frozen=True)
class Tail:
    """Fitted parameters of the tail.

    Attributes:
        lift: float32 [Hq], integers in 1/1024 octaves.
        directions: None if the whole score is seen, or none of it.
    """

    lift: Tensor
    directions: Directions | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, as stored in files: "tail_lift", and with directions "tail_query" and so on."""
        parts = {} if self.directions is None else vars(self.directions)
        return {"tail_lift": self.lift, **{f"tail_{name}": x for name, x in parts.items()}}

    @classmethod
    def of_tensors(cls, named: Mapping[str, Tensor]) -> Tail | None:
        """The tail among tensors by name; None if there is none."""
        if "tail_lift" not in named:
            return None
        parts = [named[name] for one in fields(Directions) if (name := f"tail_{one.name}") in named]
        return cls(named["tail_lift"], Directions(*parts) if parts else None)


@dataclass(frozen=True)
class TailSums:
    """Integers of the tails of some rows, and values derived from them.

    Attributes:
        count: pairs in the tail, float32 [B, Hq, Sq, 1].
        distance: their summed distance, float64, same shape.
        exponent: t of the level, int32, same shape.
        level: u, float32, same shape.
        value: their summed values, float32 [B, Hq, Sq, D].
        score, slope: Y and X of `linear`, float64 [B, Hq, Sq, 1] and [B, Hq, Sq, D]; None with `mean`.
    """

    count: Tensor
    distance: Tensor
    exponent: Tensor
    level: Tensor
    value: Tensor
    score: Tensor | None = None
    slope: Tensor | None = None

    def integers(self) -> dict[str, Tensor]:
        """The integers and the level that traces and backends compare, by their names in `core.attention`."""
        found = {
            "tail_count": self.count.int(),
            "tail_distance": self.distance.long(),
            "tail_exponent": self.exponent,
            "tail_level": self.level,
            "tail_value": self.value.long(),
        }
        if self.score is not None and self.slope is not None:
            found |= {"tail_score": self.score.long(), "tail_slope": self.slope.long()}
        return found


def sees_whole_score(spec: AttentionSpec, head_dim: int) -> bool:
    """True if `linear` works on Q and K directly and needs no directions."""
    return spec.tail == "linear" and spec.tail_rank >= head_dim


def prunes(spec: AttentionSpec, cutoff: Tensor | None) -> bool:
    """True if the rule removes anything, so that there is a tail."""
    return spec.sparsity > 0 if RULES[spec.rule].counts else cutoff is not None


def active_tail(spec: AttentionSpec, tail: Tail | None, cutoff: Tensor | None, query: Tensor) -> Tail | None:
    """The tail of one call, with lift OFF for heads without pruning; None if no head has a tail.

    Args:
        tail: from calibration; None has a lift of 0.
        cutoff: float32 [Hq] or None.
        query: [B, Hq, Sq, D].

    Raises:
        ValueError: `linear` has no directions.
    """
    if spec.tail == "none" or not prunes(spec, cutoff):
        return None
    tail = Tail(query.new_zeros(query.shape[1], dtype=torch.float32)) if tail is None else tail
    if spec.tail == "linear" and tail.directions is None and not sees_whole_score(spec, query.shape[-1]):
        raise ValueError("tail 'linear' has no directions yet: run calibrate(model, batches) first")
    if cutoff is None or RULES[spec.rule].counts:
        return tail
    return Tail(tail.lift.masked_fill(cutoff == torch.inf, OFF), tail.directions)


def projected(codes: Tensor, directions: Tensor, offset: Tensor | None = None) -> Tensor:
    """q' or k': clamp(((codes . R + 2048) >> 12) - o, -127, 127), float32 holding integers.

    Args:
        codes: [B, H, S, D], integers in any dtype.
        directions: [H, D, r]; offset: [H, r].
    """
    inside, _ = _shifted(codes, directions, offset)
    return inside.clamp_(-PROJECTED_MAX, PROJECTED_MAX).float()


def _shifted(codes: Tensor, directions: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    sums = codes.double() @ directions.double()
    shifted = torch.floor((sums + 2.0 ** (SHIFT - 1)) / 2.0**SHIFT)
    moved = shifted if offset is None else shifted - offset.double().unsqueeze(-2)
    return moved, moved.abs() <= PROJECTED_MAX


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, directions: Tensor, offset: Tensor | None) -> Tensor:
        moved, inside = _shifted(codes, directions, offset)
        ctx.save_for_backward(inside, directions)
        return moved.clamp_(-PROJECTED_MAX, PROJECTED_MAX).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        inside, directions = ctx.saved_tensors
        return (grads[0] * inside) @ (directions.mT / 2.0**SHIFT), None, None


def project_straight_through(codes: Tensor, directions: Tensor, offset: Tensor | None = None) -> Tensor:
    """`projected` with a gradient that ignores the rounding and is zero where a code is at its limit."""
    if not torch.is_grad_enabled():
        return projected(codes, directions, offset)
    made: Tensor = _Project.apply(codes, directions, offset)  # type: ignore[no-untyped-call]
    return made


def level(distance: Tensor, count: Tensor, rate: Tensor, lift: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """t and u of each row: the weight of one pair of its tail, in P codes.

    Args:
        distance: summed distance of the tail, whole numbers [B, Hq, Sq, 1].
        count: pairs in it, same shape.
        rate: from `exponential.exponent_rate`, broadcastable.
        lift: float32 [Hq].

    Returns:
        int32 and float32, shape of `distance`; the level is 0 where the tail is empty.
    """
    count = count.float()
    mean = distance.float() / count.clamp(min=1)
    t = ((mean * rate).clamp(max=END).round_() - lift.view(1, -1, 1, 1)).clamp_(min=0).clamp_(max=END).to(torch.int32)
    # Powers of the fraction only: without whole octaves, nothing is shifted out.
    fraction = power_table(t.device).index_select(0, (t & (STEPS_PER_OCTAVE - 1)).view(-1)).view(t.shape)
    weight = (fraction * qmax).float() * _octaves(t.device).index_select(0, (t >> 10).view(-1)).view(t.shape)
    return t, weight.masked_fill((t >= END) | (count == 0), 0.0)


def _octaves(device: torch.device) -> Tensor:
    # A table, since a library's powers of two may be inexact.
    return torch.tensor([2.0**-octave / ONE for octave in range(END // STEPS_PER_OCTAVE + 1)], device=device)


def sum_tail(
    rest: Tensor,
    distance: Tensor,
    value: Tensor,
    scored: tuple[Tensor, Tensor] | None,
    rate: Tensor,
    lift: Tensor,
    qmax: int,
) -> TailSums:
    """The sums by definition, pair by pair: the readable reference.

    Args:
        rest: bool [B, Hq, Sq, Sk], pairs of the tail.
        distance: integers, same shape; arbitrary elsewhere.
        value: codes of V, [B, Hq, Sk, D].
        scored: codes of Q and K as seen by `linear`, [B, Hq, S, r] each; None with `mean`.
        rate, lift, qmax: see `level`.
    """
    mask, v = rest.double(), value.double()
    count = mask.sum(-1, keepdim=True)
    far = torch.where(rest, distance.double(), 0.0).sum(-1, keepdim=True)
    t, u = level(far, count, rate, lift, qmax)
    score = slope = None
    if scored is not None:
        seen = scored[0].double() @ scored[1].double().mT * mask
        score, slope = seen.sum(-1, keepdim=True), seen @ v
    return TailSums(count.float(), far, t, u, (mask @ v).float(), score, slope)


def scored_codes(
    q: Tensor, k: Tensor, spec: AttentionSpec, tail: Tail, project: Callable[..., Tensor] = projected
) -> tuple[Tensor, Tensor] | None:
    """Codes of Q and K as seen by `linear`, with keys repeated for their query heads; None with `mean`.

    Args:
        q, k: codes [B, Hq, Sq, D] and [B, Hkv, Sk, D].
        project: `projected`, or `project_straight_through`.
    """
    if spec.tail == "mean":
        return None
    group, found = q.shape[1] // k.shape[1], tail.directions
    if found is None:
        return q, k.repeat_interleave(group, 1)
    keys = project(k, found.key, found.offset)
    return project(q, found.query.repeat_interleave(group, 0)), keys.repeat_interleave(group, 1)


def weighted_values(sums: TailSums, step: Tensor | None) -> Tensor:
    """V_G with `mean`, V_G + lambda (X - sbar V_G) with `linear`: values of the tail by weight in it, [B, Hq, Sq, D].

    Args:
        sums: the second part is 0 where their level is.
        step: lambda, float32 broadcastable, change of a pair's weight per unit of s; only for `linear`.
    """
    if sums.score is None or sums.slope is None or step is None:
        return sums.value
    slope = sums.slope.float() - mean_score(sums) * sums.value
    return sums.value + step * slope.masked_fill(sums.level == 0, 0.0)  # 0 * inf would be NaN


def mean_score(sums: TailSums) -> Tensor:
    """sbar, float32 [B, Hq, Sq, 1]; 0 if the tail is empty."""
    assert sums.score is not None
    return sums.score.float() / sums.count.clamp(min=1)


def with_tail(weighted: Tensor, code_sum: Tensor, sums: TailSums, values: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and divisor of the output, from survivors and tail.

    Args:
        weighted: float32 [B, Hq, Sq, D], sum(code * v_code).
        code_sum: float32 [B, Hq, Sq, 1], sum(code), at least 1.
        sums: of the same rows, and values: their `weighted_values`.
    """
    return weighted + sums.level * values, code_sum + sums.level * sums.count


def score_steps(alpha: Tensor, tail: Tail, heads: int) -> Tensor:
    """lambda = alpha * step, float32 broadcastable to [B, Hq, Sq, 1]."""
    if tail.directions is None:
        return alpha
    return alpha * tail.directions.step.repeat_interleave(heads // len(tail.directions.step)).view(1, -1, 1, 1)


def tail_masses(probability: Tensor, rest: Tensor, level_of_one: Tensor, counted: Tensor) -> Tensor:
    """Probability of the tails, and the mass that levels without lift give them, summed over rows.

    Args:
        probability: p~ in units of 2^-16, 0 where not valid, [B, Hq, Sq, Sk].
        rest: bool or 0 and 1, pairs of the tail, same shape.
        level_of_one: u / qmax without lift, float32 [B, Hq, Sq, 1].
        counted: bool, broadcastable to [B, Hq, Sq, 1], rows that count.

    Returns:
        float64 [Hq, 2], multiples of 2^-30 of a row's probability.
    """
    whole = probability.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=1)
    held = (probability * rest).sum(-1, keepdim=True, dtype=torch.float64)
    estimated = level_of_one.double() * rest.sum(-1, keepdim=True, dtype=torch.float64) * ONE
    shares = (torch.cat([held, estimated], -1) / whole * MASS_GRID).round_()
    return (shares * counted).sum((0, 2))


def fit_lift(masses: Tensor) -> Tensor:
    """lift [Hq], float32, from summed masses [Hq, 2]; 0 if no tail was seen."""
    held, estimated = masses.unbind(-1)
    seen = (held > 0) & (estimated > 0)
    octaves = torch.log2(torch.where(seen, held, 1.0) / torch.where(seen, estimated, 1.0))
    return (octaves * STEPS_PER_OCTAVE).round().clamp(0, T_MAX).float()


@dataclass
class Moments:
    """Sums over the codes of real tokens, exact in float64 in any order.

    Attributes:
        query: of q q^T, [Hkv, D, D], and their number, rows [1].
        key: of k k^T, [Hkv, D, D]; mean: of k, [Hkv, D]; and their number, keys [1].
    """

    query: Tensor
    rows: Tensor
    key: Tensor
    mean: Tensor
    keys: Tensor

    @classmethod
    def none_yet(cls, heads: int, dim: int, device: torch.device) -> Moments:
        """Empty sums."""
        square = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
        one = square.new_zeros(1)
        return cls(square, one, square.clone(), square.new_zeros(heads, dim), one.clone())

    def tensors(self) -> list[Tensor]:
        """In declaration order."""
        return [self.query, self.rows, self.key, self.mean, self.keys]

    def add(self, q: Tensor, k: Tensor, rows: Tensor, keys: Tensor) -> None:
        """Add one call.

        Args:
            q, k: codes [B, Hq, Sq, D] and [B, Hkv, Sk, D].
            rows, keys: 1.0 for real tokens, [B, 1, Sq, 1] and [B, 1, Sk, 1].
        """
        q, k = q.double() * rows, k.double() * keys
        groups = q.unflatten(1, (len(self.key), -1))
        self.query += torch.einsum("bhgsd,bhgse->hde", groups, groups)
        self.key += torch.einsum("bhsd,bhse->hde", k, k)
        self.mean += k.sum((0, 2))
        self.rows += rows.sum(dtype=torch.float64) * (q.shape[1] // k.shape[1])
        self.keys += keys.sum(dtype=torch.float64)


def fit_directions(moments: Moments, rank: int) -> Directions:
    """The `rank` directions of each key head in which q . k varies most.

    Raises:
        ValueError: no real token was seen.
    """
    if float(moments.rows) == 0 or float(moments.keys) == 0:
        raise ValueError("no real token was seen, so directions cannot be fitted: calibrate on real batches first")
    mean = moments.mean / moments.keys
    spread = moments.key / moments.keys - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    root, inverse = _roots(moments.query / moments.rows)
    variance, vectors = torch.linalg.eigh(root @ spread @ root)
    vectors, variance = vectors.flip(-1)[..., :rank], variance.flip(-1)[..., :1].clamp(min=0)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    query, q_factor = _scaled(inverse @ vectors, torch.ones_like(variance))
    key, k_factor = _scaled(root @ vectors, variance.sqrt())
    offset = (mean.unsqueeze(-2) @ key).squeeze(-2) / 2.0**SHIFT
    step = 1 / (q_factor * k_factor)
    return Directions(
        query.float(), key.float(), offset.round().clamp(-OFFSET_MAX, OFFSET_MAX).float(), step.squeeze(-1).float()
    )


def _roots(square: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of symmetric matrices, without directions that hardly vary."""
    values, vectors = torch.linalg.eigh(square)
    values = values.clamp(min=float(values.amax().clamp(min=1e-12)) * SMALLEST_VARIANCE)
    return vectors * values.sqrt().unsqueeze(-2) @ vectors.mT, vectors / values.sqrt().unsqueeze(-2) @ vectors.mT


def _scaled(directions: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Integer directions, and the factor [H, 1] that maps REACH deviations to the largest code."""
    wanted = PROJECTED_MAX / (REACH * deviation.clamp(min=1e-6))
    possible = DIRECTION_MAX / 2.0**SHIFT / directions.abs().amax((-2, -1)).unsqueeze(-1).clamp(min=1e-12)
    factor = torch.minimum(wanted, possible)
    return (directions * (factor * 2.0**SHIFT).unsqueeze(-1)).round(), factor
