"""Attention in floating point (dense) and in integers (the reference), written alike; see also `fake_quantize`.

Shapes: query [B, Hq, Sq, D]; key, value [B, Hkv, Sk, D], Hq a multiple of Hkv; valid: bool broadcastable to [B, Hq, Sq,
Sk], True where the query may attend to the key, None for all pairs.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.core.arguments import (
    check_tail,
    check_tensors,
    check_values,
    four_dims,
    is_real,
    pair_mask,
    some_key,
)
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.exponential import T_MAX, exponent, exponent_rate, power_table, row_codes
from attnpress.core.predictor import foretold_scores, foretold_step
from attnpress.core.quantizer import quantize, smooth_key, token_scale
from attnpress.core.rules import Scored, rule_of
from attnpress.core.tail import TailSums, active_tail, score_steps, scored_codes, sum_tail, weighted_values, with_tail

FAR = 2**30
"""Distance of pairs that are not valid; their probability is 0 for any legal alpha."""


class NanWarning(UserWarning):
    """Attention met NaN, which has code 0: the output hides it and may look plausible."""


@dataclass(frozen=True)
class Pairs:
    """State of each pair of a query and a key.

    Attributes:
        valid, keep: bool [B, Hq, Sq, Sk].
        scored: scores for the rule: the exact or the predicted ones.
        row_max: of the scores, [B, Hq, Sq, 1]; 0 in a row without a valid key.
        exponent: int32, 1/1024 octaves below the row maximum; T_MAX if not valid.
        probability: int32, p~ in units of 2^-16, before pruning.
        distance: integers below the row maximum, FAR or inf if not valid.
        codes: P codes, float32 holding integers (or real weights if P is not quantized).
        divisor: of the weighted sum of V, [B, Hq, Sq, 1].

    With a predicted mask, only kept pairs have scores: all fields but `valid` and `scored` treat the others as
    not valid.
    """

    valid: Tensor
    keep: Tensor
    scored: Scored
    row_max: Tensor
    exponent: Tensor
    probability: Tensor
    distance: Tensor
    codes: Tensor
    divisor: Tensor


@dataclass(frozen=True)
class IntegerAttention:
    """All integers of one attention call, which kernels must equal bit for bit (numerics, section 6).

    Attributes:
        q_codes, k_codes, v_codes: int8 [B, Hq or Hkv, S, D].
        acc: int32 [B, Hq, Sq, Sk]; row_max: int32 [B, Hq, Sq, 1] (0 in a row without a valid key).
        keep: bool [B, Hq, Sq, Sk].
        p_codes: uint8 [B, Hq, Sq, Sk]; code_sum: int64 [B, Hq, Sq, 1].
        weighted: int64 [B, Hq, Sq, D], the sum of code * v_code.
        output: float32 [B, Hq, Sq, D].
    """

    q_codes: Tensor
    k_codes: Tensor
    v_codes: Tensor
    acc: Tensor
    row_max: Tensor
    keep: Tensor
    p_codes: Tensor
    code_sum: Tensor
    weighted: Tensor
    output: Tensor


@dataclass(frozen=True)
class TailedAttention(IntegerAttention):
    """`IntegerAttention` with a tail (numerics, section 8).

    Attributes:
        tail_count: int32 [B, Hq, Sq, 1], g; tail_distance: int64, T; tail_exponent: int32, t; all of that shape.
        tail_level: float32, u, likewise.
        tail_value: int64 [B, Hq, Sq, D], V_G.
    """

    tail_count: Tensor
    tail_distance: Tensor
    tail_exponent: Tensor
    tail_level: Tensor
    tail_value: Tensor


@dataclass(frozen=True)
class LinearTailedAttention(TailedAttention):
    """`TailedAttention` with tail `linear`.

    Attributes:
        tail_score: int64 [B, Hq, Sq, 1], Y.
        tail_slope: int64 [B, Hq, Sq, D], X.
    """

    tail_score: Tensor
    tail_slope: Tensor


@dataclass(frozen=True)
class ForetoldAttention(IntegerAttention):
    """`IntegerAttention` with a predicted mask (numerics, section 4).

    Attributes:
        foretold: int32 [B, Hq, Sq, Sk], the predicted low-bit scores.
    """

    foretold: Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float) -> Tensor:
    """softmax(Q K^T * scaling) V in floating point, [B, Hq, Sq, D]; rows without a valid key give zeros."""
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scores = query @ key.mT * scaling
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    probs = torch.softmax(scores, -1).nan_to_num(nan=0.0)
    return probs @ value


def integer_attention(call: AttentionCall) -> IntegerAttention:
    """Compressed attention in integers: the readable reference that defines correctness.

    Args:
        call: all four matrices must be quantized; `dropout`, `bounds` and `causal` are ignored.

    Raises:
        ValueError: a matrix is not quantized, or an argument is invalid. The message names it.
    """
    spec, scales, cutoff, query = call.spec, call.scales, call.cutoff, call.query
    if None in spec.bits.values():
        raise ValueError(f"integer attention needs bits for all of q, k, v and p; found {spec.bits}")
    valid, keys = checked_mask(call), slice(call.key.shape[2])
    warn_of_nan(call.query, call.key, call.value, valid)
    key, value, valid = some_key(call.key, call.value, valid)
    heads = query.shape[1]
    q_scale = query_scale(query, scales, spec.q)
    k_scale, v_scale = _present(scales.k, "k"), _present(scales.v, "v")
    q_codes = quantize(query, q_scale, spec.q.qmax)
    k_codes = quantize(smooth_key(key, key_validity(valid)) if spec.smooth_key else key, k_scale, spec.k.qmax)
    v_codes = quantize(value, v_scale, spec.v.qmax)
    # A float64 product of integers this small is exact in any order of summation.
    acc = (q_codes.double() @ repeat_heads(k_codes, heads).double().mT).to(torch.int32)
    alpha = score_step(q_scale, k_scale, call.scaling, heads)
    foretold = foretold_scores(q_codes, repeat_heads(k_codes, heads), spec)
    pairs = prune_and_code(acc, valid, alpha, cutoff, spec, foretold)
    weighted = pairs.codes.double() @ repeat_heads(v_codes, heads).double()
    sums, numerator, divisor = None, weighted.float(), pairs.divisor
    tail = active_tail(spec, scales.tail, cutoff, query)
    if tail is not None:
        scored, rate = scored_codes(q_codes, k_codes, spec, tail), exponent_rate(alpha)
        rest = pairs.valid & (pairs.codes == 0)
        sums = sum_tail(rest, pairs.distance, repeat_heads(v_codes, heads), scored, rate, tail.lift, spec.p.qmax)
        values = weighted_values(sums, score_steps(alpha, tail, heads))
        numerator, divisor = with_tail(numerator, divisor, sums, values)
    output = (numerator * repeat_heads(v_scale, heads)) / divisor
    found = IntegerAttention(
        q_codes.to(torch.int8),
        k_codes[:, :, keys].to(torch.int8),
        v_codes[:, :, keys].to(torch.int8),
        acc[..., keys],
        pairs.row_max,
        pairs.keep[..., keys],
        pairs.codes[..., keys].to(torch.uint8),
        pairs.codes.sum(-1, keepdim=True, dtype=torch.float64).long(),
        weighted.long(),
        output,
    )
    if foretold is not None:
        return ForetoldAttention(**_fields(found), foretold=foretold[..., keys].int())
    return found if sums is None else _tailed(found, sums)


def _tailed(found: IntegerAttention, sums: TailSums) -> TailedAttention:
    kind = TailedAttention if sums.score is None else LinearTailedAttention
    return kind(**_fields(found), **sums.integers())


def _fields(found: IntegerAttention) -> dict[str, Any]:
    return {one.name: getattr(found, one.name) for one in fields(found)}


def checked_mask(call: AttentionCall) -> Tensor | None:
    """Validate a call (see `AttentionCall`), and return `valid` like `arguments.pair_mask`.

    Raises:
        ValueError: names the argument, its requirement, and what was found.
    """
    query, key, value, scales = call.query, call.key, call.value, call.scales
    check_tensors(query, key, value)
    static = {"q": None if call.spec.q.granularity == "token" else scales.q, "k": scales.k, "v": scales.v}
    check_values(query, key, value, static, call.cutoff, call.scaling)
    if call.spec.tail != "none" and scales.tail is not None:
        check_tail(scales.tail, query, key)
    return pair_mask(call.valid, query, key)


def warn_of_nan(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
    """Warn of NaN in a query, or in a key or value that some query may attend to, since codes hide it.

    Checks only on the CPU, and not while a model is traced; on other devices, each check would wait for the device.
    """
    if not is_real(query) or math.isfinite(
        sum(float(x.detach().sum(dtype=torch.float32)) for x in (query, key, value))
    ):
        return
    seen = key_validity(valid)
    behind = key.isnan().any(-1, keepdim=True) | value.isnan().any(-1, keepdim=True)
    if bool(query.isnan().any()) or bool((behind if seen is None else behind & seen).any()):
        warnings.warn(
            "attention met NaN among its queries, keys or values and takes it for 0, so that the output hides it: look "
            "for NaN in the weights and inputs of the model, or for a dtype that overflows",
            NanWarning,
            stacklevel=3,
        )


def prune_and_code(
    acc: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    cutoff: Tensor | None,
    spec: AttentionSpec,
    foretold: Tensor | None = None,
) -> Pairs:
    """From scores to P codes, for any rule and mode (numerics, sections 3 and 4).

    Args:
        acc: integer scores [B, Hq, Sq, Sk] (real ones if Q and K are not quantized).
        alpha: float32 broadcastable, from `score_step`.
        cutoff: float32 [Hq] or None.
        foretold: from `foretold_scores`, scores for the rule instead of `acc`.
    """
    valid = torch.ones_like(acc, dtype=torch.bool) if valid is None else valid.expand_as(acc)
    per_head = None if cutoff is None else cutoff.view(1, -1, 1, 1)
    looked, step = (acc, alpha) if foretold is None else (foretold, foretold_step(alpha, spec))
    row_max, distance, t, probability = _below_maximum(looked, valid, step)
    scored = Scored(spec, distance, probability, valid, step, per_head)
    keep = rule_of(spec).keep(scored)
    if foretold is not None:
        row_max, distance, t, probability = _below_maximum(acc, keep, alpha)
    if spec.p.bits is None:
        real = torch.exp2(-distance.float() * exponent_rate(alpha) / 1024).masked_fill(~valid, 0.0)
        codes, divisor = real * keep, _real_divisor(real, keep, spec.p)
    else:
        codes = probs_codes(probability, spec.p) * keep
        divisor = code_divisor(codes, spec.p)
    return Pairs(valid, keep, scored, row_max, t, probability, distance, codes, divisor)


def _below_maximum(acc: Tensor, valid: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maximum, and of each pair the distance to it, its exponent and p~, as `Pairs` has them."""
    blocked = ~valid
    row_max = row_maximum(acc, valid)
    distance = (row_max - acc).masked_fill_(blocked, FAR)
    t = exponent(distance, exponent_rate(alpha)).masked_fill_(blocked, T_MAX).contiguous()
    return row_max, distance, t, power_table(t.device).index_select(0, t.view(-1)).view(t.shape)


def probs_codes(probability: Tensor, spec: ProbsSpec) -> Tensor:
    """P codes before pruning; float32 holding integers in [0, qmax], shape of `probability`."""
    if spec.mode == "row":
        return row_codes(probability, spec.qmax).float()
    total = probability.sum(-1, keepdim=True, dtype=torch.int64).clamp(min=1)
    return (probability.float() * (spec.qmax / total.float())).round_()


def code_divisor(codes: Tensor, spec: ProbsSpec) -> Tensor:
    """sum(code), or the fixed qmax of mode "unit"; at least 1, so that an empty row gives zeros. [B, Hq, Sq, 1]."""
    if spec.mode == "unit" and not spec.renormalize:
        return codes.new_full((*codes.shape[:-1], 1), float(spec.qmax))
    return codes.sum(-1, keepdim=True, dtype=torch.float64).clamp_(min=1).float()


def _real_divisor(real: Tensor, keep: Tensor, spec: ProbsSpec) -> Tensor:
    survivors = real if spec.mode == "unit" and not spec.renormalize else real * keep
    total = survivors.sum(-1, keepdim=True)
    return torch.where(total > 0, total, torch.ones_like(total))


def score_step(q_scale: Tensor, k_scale: Tensor, scaling: float, heads: int) -> Tensor:
    """alpha = (q_scale * k_scale) * scaling: the real score of one integer step; float32, broadcastable."""
    return (q_scale * repeat_heads(k_scale, heads)) * torch.tensor(scaling, dtype=torch.float32, device=q_scale.device)


def query_scale(query: Tensor, scales: Scales, spec: TensorSpec) -> Tensor:
    """The static scale of Q, or each row's own for granularity "token"."""
    if spec.granularity == "token":
        return token_scale(query, spec.qmax, power_of_two=spec.power_of_two)
    return _present(scales.q, "q")


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads for their query heads: [B, Hkv or 1, ...] -> [B, heads or 1, ...]."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def key_validity(valid: Tensor | None) -> Tensor | None:
    """Keys that some query may attend to: bool [B or 1, 1, Sk or 1, 1], from a mask of up to four dimensions."""
    return None if valid is None else four_dims(valid).any(-2, keepdim=True).any(1, keepdim=True).mT


def row_maximum(acc: Tensor, valid: Tensor) -> Tensor:
    """The largest score of each row, [B, Hq, Sq, 1]; 0 if no key is valid."""
    lowest = -torch.inf if acc.is_floating_point() else -FAR
    return acc.masked_fill(~valid, lowest).amax(-1, keepdim=True).masked_fill(~valid.any(-1, keepdim=True), 0)


def _present(scale: Tensor | None, name: str) -> Tensor:
    if scale is None:
        raise ValueError(f"{name} has no scale yet: run calibrate(model, batches) first")
    return scale
