"""The training forward: the integers of `attention.integer_attention`, computed by float products, with gradients.

Codes are small integers, so their float32 products are exact, and any hardware trains on the integers of a kernel. The
backward pass needs one byte per pair (the P code), not the float matrices of eager attention. Batches are processed in
slices that fit a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.arguments import some_key
from attnpress.core.attention import (
    checked_mask,
    key_validity,
    prune_and_code,
    query_scale,
    repeat_heads,
    score_step,
    warn_of_nan,
)
from attnpress.core.call import AttentionCall
from attnpress.core.exponential import code_table, exponent, exponent_rate
from attnpress.core.predictor import foretold_scores, foretold_step
from attnpress.core.quantizer import EXACT as EXACT
from attnpress.core.quantizer import learned_step, quantize_straight_through, smooth_key
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BIN_WIDTH
from attnpress.core.tail import (
    Tail,
    TailSums,
    active_tail,
    project_straight_through,
    score_steps,
    scored_codes,
    weighted_values,
    with_tail,
)
from attnpress.core.tail_training import (
    TailRows,
    add_all_pairs,
    add_tail_gradients,
    sees_all_alike,
    sum_tail_by_products,
    tail_pairs,
    tail_slopes,
)

FINITE = torch.finfo(torch.float32).max

SATURATION = 2.0**56
"""Clamp of floating-point Q and K, so that their products stay finite."""

SLICE = 2**18
"""Pairs processed at a time on a CPU: about a megabyte of float32, which fits its cache."""

COMPILED_SLICE = 2**22
"""Pairs that a kernel codes at a time. It fits the cache by itself; many small results would fragment the heap."""

ACCELERATOR_SLICE = 2**24
"""Pairs processed at a time on an accelerator, where each pass costs a launch: 64 MiB of float32."""


class CodedRows(NamedTuple):
    """The integers of some rows of a call, as float products or a kernel compute them.

    Attributes:
        codes: P codes [B, Hq, Sq, Sk], uint8 or float32.
        divisor: sums of codes, at least 1, float32 [B, Hq, Sq, 1]; 1 if P is not quantized.
        tail: sums of the tails; None without a tail.
        weighted: sums of code * v_code, float32 [B, Hq, Sq, D]; None if they are still to be computed.
    """

    codes: Tensor
    divisor: Tensor
    tail: TailSums | None
    weighted: Tensor | None = None


class Survivors(NamedTuple):
    """What the gradients of pairs with a code are made of; all contiguous.

    Attributes:
        grad: gradient of the output times the scale of V, float32 [B, Hq, Sq, D].
        q, k, v: codes, float32, with keys and values repeated for their query heads.
        codes, kept: P codes, and those that dropout keeps (None without dropout), uint8 [B, Hq, Sq, Sk].
        factor: of a code that dropout keeps.
        terms: of each row, float32 [B, Hq, Sq, 3 to 6]: see `csrc/gradients.h`.
    """

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    codes: Tensor
    kept: Tensor | None
    factor: float
    terms: Tensor


class StepKernel(NamedTuple):
    """A kernel for training steps.

    Attributes:
        code_rows: the integers of a call.
        survivor_gradients: gradients of the codes of Q, K and V from pairs with a code.
    """

    code_rows: Callable[[AttentionCall], CodedRows]
    survivor_gradients: Callable[[Survivors], tuple[Tensor, Tensor, Tensor]]


def fake_quantize_attention(call: AttentionCall, kernel: StepKernel | None = None) -> Tensor:
    """Compressed attention with gradients to query, key, value and learned scales (numerics, section 7).

    Args:
        call: as for `attention.integer_attention`, but any matrix may stay in floating point (bits None).
        kernel: must support the call; float products are used if None.

    Returns:
        float32 [B, Hq, Sq, D], stored so that its transpose [B, Sq, Hq, D] is contiguous.

    Raises:
        ValueError: an argument is invalid. The message names it.
    """
    valid = checked_mask(call)
    warn_of_nan(call.query, call.key, call.value, valid)
    key, value, valid = some_key(call.key, call.value, valid)
    call = call.with_(key=key, value=value, valid=valid)
    query, spec, scales, cutoff = call.query, call.spec, call.scales, call.cutoff
    heads = query.shape[1]
    q_codes, k_codes, alpha = scores_operands(call)
    v_codes, v_scale = value.float(), torch.ones(1, 1, 1, 1, device=value.device)
    if spec.v.bits is not None:
        v_scale = static_scale(scales.v, value, spec.v.qmax)
        v_codes = quantize_straight_through(value, v_scale, spec.v.qmax)
        v_scale = repeat_heads(v_scale, heads)
    tail = active_tail(spec, scales.tail, cutoff, query)
    scored = None
    if tail is not None and tail.directions is not None:
        scored = scored_codes(q_codes, k_codes, spec, tail, project_straight_through)
    k_codes, v_codes = (repeat_heads(codes, heads).expand(-1, heads, -1, -1) for codes in (k_codes, v_codes))
    output: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        q_codes, k_codes, v_codes, alpha, v_scale, *(scored or (None, None)), tail, call, kernel
    )
    return output


def scores_operands(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of Q and K with straight-through gradients, and alpha; the values themselves if bits are None.

    In both cases NaN counts as 0, and infinities saturate.
    """
    query, key, spec, heads = call.query, call.key, call.spec, call.query.shape[1]
    if spec.smooth_key:
        key = smooth_key(key, key_validity(call.valid))
    if spec.q.bits is None:
        one = torch.ones(1, 1, 1, 1, device=query.device)
        q, k = (x.float().nan_to_num(nan=0.0).clamp(-SATURATION, SATURATION) for x in (query, key))
        return q, k, score_step(one, one, call.scaling, heads)
    q_scale = query_scale(query, call.scales, spec.q)
    if spec.q.granularity != "token":
        q_scale = static_scale(q_scale, query, spec.q.qmax)
    k_scale = static_scale(call.scales.k, key, spec.k.qmax)
    q_codes = quantize_straight_through(query, q_scale, spec.q.qmax)
    k_codes = quantize_straight_through(key, k_scale, spec.k.qmax)
    return q_codes, k_codes, score_step(q_scale, k_scale, call.scaling, heads)


def static_scale(scale: Tensor | None, x: Tensor, qmax: int) -> Tensor:
    """The scale, with LSQ's gradient factor if it is learned."""
    if scale is None:
        raise ValueError("a static scale is missing: run calibrate(model, batches) first")
    return learned_step(scale, x.numel() // scale.numel(), qmax) if scale.requires_grad else scale


class _Attend(torch.autograd.Function):
    """Codes of Q, K, V and the step alpha -> output. Keep masks are constants; softmax differentiates over survivors.

    With w = code / divisor, dropout mask m / (1 - r) and G the gradient of the output, the gradient of a score is
    w (m G.v - G.out) * alpha: the softmax Jacobian at the quantized point. A pair whose code is zero gets no gradient,
    unless there is a tail.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        v_scale: Tensor,
        q_scored: Tensor | None,
        k_scored: Tensor | None,
        tail: Tail | None,
        call: AttentionCall,
        kernel: StepKernel | None,
    ) -> Tensor:
        spec, valid = call.spec, call.valid
        batch, heads, rows, keys = *q.shape[:3], k.shape[2]
        code_dtype = torch.float32 if spec.p.bits is None else torch.uint8
        codes = torch.empty(batch, heads, rows, keys, dtype=code_dtype, device=q.device)
        kept, keep_share = dropout_mask(codes, call.dropout)
        divisor = torch.empty(batch, heads, rows, 1, device=q.device)
        output = torch.empty(batch, rows, heads, v.shape[-1], device=q.device).transpose(1, 2)
        bias = None if valid is None or kernel is not None else additive_mask(valid)
        allowed = None if valid is None or tail is None else valid.float()
        tails = None if tail is None else TailRows.empty(q, v, linear=spec.tail == "linear")
        for part in batch_slices(codes.shape, q.device, None if kernel is None else COMPILED_SLICE):
            step = batch_part(alpha, part)
            if kernel is not None:
                found = kernel.code_rows(call_part(call, part))
            else:
                masks = batch_part(valid, part), batch_part(bias, part), batch_part(allowed, part)
                scored = _scored_part((q, k), (q_scored, k_scored), spec, part)
                found = _code_by_products(q[part], k[part], v[part], scored, *masks, step, call.cutoff, tail, spec)
            codes[part], divisor[part], weighted = found.codes, found.divisor, found.weighted
            if kept is not None:
                weighted = _weighted(found.codes.float() * kept[part].float() / keep_share, v[part])
            elif weighted is None:
                weighted = _weighted(found.codes, v[part])
            if found.tail is not None and tail is not None and tails is not None:
                values = weighted_values(found.tail, score_steps(step, tail, heads))
                weighted, divisor[part] = with_tail(weighted, divisor[part], found.tail, values)
                tails.fill(part, found.tail, values, divisor[part])
            output[part] = (weighted * v_scale) / divisor[part]
        saved = [] if tails is None else tails.tensors()
        ctx.save_for_backward(
            q, k, v, alpha, v_scale, codes, kept, divisor, output, q_scored, k_scored, allowed, *saved
        )
        ctx.keep_share, ctx.tail, ctx.spec, ctx.kernel = keep_share, tail, spec, kernel
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # gradient checkpointing lets them be read once
        saved, tail_rows = _Saved(*tensors[: len(_Saved._fields)]), tensors[len(_Saved._fields) :]
        tails = TailRows.of(list(tail_rows)) if tail_rows else None
        grad = grads[0].float()
        runs = ctx.kernel is not None and saved.q_scored is None and (tails is None or sees_all_alike(saved.allowed))
        if runs:
            grad_q, grad_k, grad_v = _gradients_by_kernel(grad, saved, tails, ctx)
            grad_scored: list[Tensor] = []
        else:
            grad_q, grad_k, grad_v, *grad_scored = _gradients_by_products(grad, saved, tails, ctx)
        grad_alpha = grad_v_scale = None
        if ctx.needs_input_grad[3]:
            moved = (grad_q * saved.q).sum(-1, keepdim=True)
            if grad_scored and saved.q_scored is not None:
                moved = moved + (grad_scored[0] * saved.q_scored).sum(-1, keepdim=True)
            grad_alpha = (moved / saved.alpha).sum_to_size(saved.alpha.shape)
        if ctx.needs_input_grad[4]:
            grad_v_scale = (grad * saved.output / saved.v_scale).sum_to_size(saved.v_scale.shape)
        rest = (None,) * 3
        return grad_q, grad_k, grad_v, grad_alpha, grad_v_scale, *(grad_scored or (None, None)), *rest


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass, besides `TailRows`."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    v_scale: Tensor
    codes: Tensor
    kept: Tensor | None
    divisor: Tensor
    output: Tensor
    q_scored: Tensor | None
    k_scored: Tensor | None
    allowed: Tensor | None


def _gradients_by_kernel(
    grad: Tensor, saved: _Saved, tails: TailRows | None, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the codes of Q, K and V: a kernel adds the pairs with a code, and products of D x D the others."""
    scaled, own = grad * saved.v_scale, (grad * saved.output).sum(-1, keepdim=True)
    terms = [saved.alpha.expand_as(saved.divisor) / saved.divisor, own, 1 / saved.divisor]
    slopes = None if tails is None else tail_slopes(tails, saved.alpha, ctx.tail, scaled, own)
    if slopes is not None:
        terms += slopes.terms()
    scaled, q, k, v = (x.contiguous() for x in (scaled, saved.q, saved.k, saved.v))
    survivors = Survivors(scaled, q, k, v, saved.codes, saved.kept, 1 / ctx.keep_share, torch.cat(terms, -1))
    found: tuple[Tensor, Tensor, Tensor] = ctx.kernel.survivor_gradients(survivors)
    if slopes is not None:
        add_all_pairs(slopes, saved.allowed, scaled, (q, k, v), found)
    return found


def _gradients_by_products(grad: Tensor, saved: _Saved, tails: TailRows | None, ctx: Any) -> list[Tensor]:
    """Gradients of the codes of Q, K and V, and of those that directions see, if any."""
    q, k, v, kept = saved.q, saved.k, saved.v, saved.kept
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_scored = [torch.zeros_like(x) for x in (saved.q_scored, saved.k_scored) if x is not None]
    for part in batch_slices(saved.codes.shape, q.device):
        scaled, step = grad[part] * saved.v_scale, batch_part(saved.alpha, part)
        survivors = saved.codes[part].float()
        weights = survivors / saved.divisor[part]
        inner = scaled @ v[part].mT
        own = (grad[part] * saved.output[part]).sum(-1, keepdim=True)
        change, dropped = inner, weights
        if kept is not None:
            factor = kept[part].float().div_(ctx.keep_share)
            change = inner * factor
            dropped = factor.mul_(weights)
        change = torch.sub(change, own).mul_(weights).mul_(step)
        if tails is not None:
            found = add_tail_gradients(
                TailRows.of([x if x is None else x[part] for x in tails.tensors()]),
                tail_pairs(survivors, batch_part(saved.allowed, part)),
                _scored_part((q, k), (saved.q_scored, saved.k_scored), ctx.spec, part),
                step,
                ctx.tail,
                scaled,
                inner,
                own,
                dropped,
                change,
            )
            for whole, one in zip(grad_scored, found or (), strict=True):
                whole[part] = one
        grad_v[part] = dropped.mT @ scaled
        grad_q[part] = change @ k[part]
        grad_k[part] = change.mT @ q[part]
    return [grad_q, grad_k, grad_v, *grad_scored]


def _code_by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scored: tuple[Tensor, Tensor] | None,
    valid: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    alpha: Tensor,
    cutoff: Tensor | None,
    tail: Tail | None,
    spec: AttentionSpec,
) -> CodedRows:
    """Integers of a slice by float products; see `code_pairs` and `tail_training.sum_tail_by_products`."""
    codes, divisor, _, row_max = code_pairs(q, k, valid, bias, alpha, cutoff, spec)
    if tail is None:
        return CodedRows(codes, divisor, None)
    rest = tail_pairs(codes, allowed)
    sums = sum_tail_by_products(rest, row_max, q, k, v, scored, exponent_rate(alpha), tail, spec.p.qmax)
    return CodedRows(codes, divisor, sums)


class CodedPairs(NamedTuple):
    """Result of `code_pairs` for a slice.

    Attributes:
        codes: P codes, float32 [B, Hq, Sq, Sk].
        divisor: float32 [B, Hq, Sq, 1].
        beyond: positive where the rule prunes; None if it does not.
        row_max: of the scores, float32 [B, Hq, Sq, 1]; 0 in a row without a valid key.
    """

    codes: Tensor
    divisor: Tensor
    beyond: Tensor | None
    row_max: Tensor


def code_pairs(
    q: Tensor,
    k: Tensor,
    valid: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    cutoff: Tensor | None,
    spec: AttentionSpec,
) -> CodedPairs:
    """P codes from codes of Q and K, equal to those of `attention.prune_and_code`.

    Args:
        q, k, alpha: from `scores_operands`, with keys repeated for their query heads.
        valid: bool, broadcastable, and bias, its `additive_mask`; None allows all pairs.
        cutoff: float32 [Hq]; None prunes nothing.
    """
    acc = q @ k.mT
    rule = rule_of(spec)
    foretold = foretold_scores(q, k, spec)
    if not rule.skips or spec.p.mode != "row" or None in spec.bits.values() or foretold is not None:
        pairs = prune_and_code(acc, valid, alpha, cutoff, spec, foretold)
        return CodedPairs(pairs.codes, pairs.divisor, (~pairs.keep).float(), pairs.row_max)
    # Only sums and products, since comparisons and masked fills are many times slower. A pair that is not valid has
    # infinite distance; one beyond the cut gets an exponent beyond T_MAX. Both have code 0.
    (distance, row_max), beyond = _distance(acc, bias), None
    if cutoff is not None:
        cut = rule.distance_cut(cutoff.view(1, -1, 1, 1), alpha).clamp(max=FINITE)
        beyond = (distance - cut).clamp_(min=0)
    t = exponent(distance, exponent_rate(alpha), beyond)
    codes = code_table(spec.p.qmax, t.device).index_select(0, t.view(-1)).view(t.shape).float()
    wide = torch.float64 if codes.shape[-1] * spec.p.qmax >= EXACT else torch.float32
    return CodedPairs(codes, codes.sum(-1, keepdim=True, dtype=wide).float().clamp_(min=1), beyond, row_max)


def unpruned_bins(
    q: Tensor, k: Tensor, valid: Tensor | None, bias: Tensor | None, alpha: Tensor, spec: AttentionSpec
) -> Tensor:
    """Histogram bins of the unpruned pairs, like `Rule.bins`; see `code_pairs`.

    Returns:
        Integers [B, Hq, Sq, Sk]; arbitrary where a pair is not valid.
    """
    foretold = foretold_scores(q, k, spec)
    if foretold is None:
        acc = q @ k.mT
    else:
        acc, alpha = foretold, foretold_step(alpha, spec)
    rule = rule_of(spec)
    if not rule.bins_by_exponent:
        pairs = prune_and_code(acc, valid, alpha, None, spec)
        return rule.bins(pairs.exponent, pairs.probability, pairs.distance)
    return exponent(_distance(acc, bias)[0], exponent_rate(alpha)) // BIN_WIDTH


def _distance(acc: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores below their row maximum, in place, infinite where `bias` forbids a pair; and that maximum."""
    if bias is not None:
        acc.add_(bias)
    row_max = acc.amax(-1, keepdim=True)
    row_max.masked_fill_(row_max == -torch.inf, 0.0)
    return torch.sub(row_max, acc, out=acc), row_max


def _scored_part(
    codes: tuple[Tensor, Tensor], projected: tuple[Tensor | None, Tensor | None], spec: AttentionSpec, part: slice
) -> tuple[Tensor, Tensor] | None:
    """`tail.scored_codes` of a slice; codes of Q and K unless they are projected."""
    if spec.tail == "mean":
        return None
    q, k = projected
    return (codes[0][part], codes[1][part]) if q is None or k is None else (q[part], k[part])


def additive_mask(valid: Tensor) -> Tensor:
    """0 where a pair is valid, -inf elsewhere; float32, shape of `valid`."""
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, -torch.inf)


def dropout_mask(codes: Tensor, dropout: float) -> tuple[Tensor | None, float]:
    """Codes that dropout keeps (uint8, shape of `codes`), and the share that it keeps; None without dropout.

    The probability is rounded to 1/256: one random byte per pair is much cheaper than a Bernoulli draw. The returned
    share is exact, so expectations are unbiased.
    """
    dropped = min(round(dropout * 256), 255)
    if dropped == 0:
        return None, 1.0
    words = torch.empty(-(-codes.numel() // 8), dtype=torch.int64, device=codes.device).random_(-(2**63), None)
    random = words.view(torch.uint8)[: codes.numel()].view(codes.shape)
    return torch.ge(random, dropped, out=torch.empty_like(random)), 1 - dropped / 256


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    may_be_inexact = weights.numel() > 0 and weights.shape[-1] * 255 * 127 >= EXACT
    if may_be_inexact and float(weights.sum(-1).amax()) * 127 >= EXACT:
        return (weights.double() @ v.double()).float()
    return weights @ v


def batch_slices(shape: Sequence[int], device: torch.device, pairs: int | None = None) -> list[slice]:
    """Slices of the batch, of `shape` [B, H, Sq, Sk], with about `pairs` pairs; None takes what suits the device."""
    batch, heads, rows, keys = shape
    pairs = pairs or (SLICE if device.type == "cpu" else ACCELERATOR_SLICE)
    step = max(1, pairs // max(1, heads * rows * keys))
    return [slice(start, start + step) for start in range(0, batch, step)]


def call_part(call: AttentionCall, part: slice) -> AttentionCall:
    """The call of a slice of the batch."""
    return call.with_(
        query=call.query[part], key=call.key[part], value=call.value[part], valid=batch_part(call.valid, part)
    )


def batch_part(x: Tensor | None, part: slice) -> Any:
    """The slice of a tensor that has a batch dimension; others are returned unchanged."""
    return x if x is None or x.shape[0] == 1 else x[part]
