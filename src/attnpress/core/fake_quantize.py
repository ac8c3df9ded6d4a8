"""The training forward: the integers of `attention.integer_attention`, produced by float products, with gradients.

Codes are small integers, so float32 products of them are exact and any hardware trains on the very integers that a
kernel computes. What is kept for the backward pass is one byte a pair (the P code), not the float matrices of eager
attention; batches are worked through in slices that fit the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.attention import (
    Scales,
    key_validity,
    prune_and_code,
    query_scale,
    repeat_heads,
    score_step,
)
from attnpress.core.exponential import code_table, exponent, exponent_rate
from attnpress.core.pruner import relative_cut
from attnpress.core.quantizer import learned_step, quantize_straight_through, smooth_key

EXACT = 2**24
"""Float32 holds every integer up to here."""

SATURATION = 2.0**56
"""Where Q and K in floating point stop, so that their products stay finite."""

SLICE = 2**18
"""Pairs worked on at a time: about a megabyte of float32."""


def fake_quantize_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scales: Scales,
    cutoff: Tensor | None,
    spec: AttentionSpec,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compressed attention with gradients to query, key, value and learned scales (numerics, section 7).

    Args:
        query, key, value, valid, scales, cutoff, spec, scaling: as `attention.integer_attention`; here any matrix may
            stay in floating point (bits None).
        dropout: probability of dropping a P code, after quantization.

    Returns:
        float32 [B, Hq, Sq, D], stored so that its transpose [B, Sq, Hq, D] is contiguous.
    """
    heads = query.shape[1]
    q_codes, k_codes, alpha = scores_operands(query, key, valid, scales, spec, scaling)
    v_codes, v_scale = value.float(), torch.ones(1, 1, 1, 1, device=value.device)
    if spec.v.bits is not None:
        v_scale = static_scale(scales.v, value, spec.v.qmax)
        v_codes = quantize_straight_through(value, v_scale, spec.v.qmax)
        v_scale = repeat_heads(v_scale, heads)
    output: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        q_codes,
        repeat_heads(k_codes, heads),
        repeat_heads(v_codes, heads),
        alpha,
        v_scale,
        valid,
        cutoff,
        spec,
        dropout,
    )
    return output


def scores_operands(
    query: Tensor, key: Tensor, valid: Tensor | None, scales: Scales, spec: AttentionSpec, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of Q and K with straight-through gradients, and alpha; the values themselves where bits are None.

    Either way NaN counts as 0, and infinities saturate.
    """
    if spec.smooth_key:
        key = smooth_key(key, key_validity(valid))
    if spec.q.bits is None:
        one = torch.ones(1, 1, 1, 1, device=query.device)
        q, k = (x.float().nan_to_num(nan=0.0).clamp(-SATURATION, SATURATION) for x in (query, key))
        return q, k, score_step(one, one, scaling, query.shape[1])
    q_scale = query_scale(query, scales, spec.q)
    if spec.q.granularity != "token":
        q_scale = static_scale(q_scale, query, spec.q.qmax)
    k_scale = static_scale(scales.k, key, spec.k.qmax)
    q_codes = quantize_straight_through(query, q_scale, spec.q.qmax)
    k_codes = quantize_straight_through(key, k_scale, spec.k.qmax)
    return q_codes, k_codes, score_step(q_scale, k_scale, scaling, query.shape[1])


def static_scale(scale: Tensor | None, x: Tensor, qmax: int) -> Tensor:
    """The scale, with LSQ's gradient factor if it is learned."""
    if scale is None:
        raise ValueError("a static scale is missing: run calibrate(model, batches) first")
    return learned_step(scale, x.numel() // scale.numel(), qmax) if scale.requires_grad else scale


class _Attend(torch.autograd.Function):
    """Codes of Q, K, V and the step alpha -> output. Keep masks are constants; softmax differentiates over survivors.

    With w = code / divisor, dropout mask m / (1 - r) and G the gradient of the output, the gradient of a score is
    w (m G.v - G.out) * alpha: the softmax Jacobian at the quantized point. A pair whose code is zero gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, v_scale: Tensor,
        valid: Tensor | None, cutoff: Tensor | None, spec: AttentionSpec, dropout: float,
    ) -> Tensor:  # fmt: skip
        batch, heads, rows, keys = *q.shape[:3], k.shape[2]
        code_dtype = torch.float32 if spec.p.bits is None else torch.uint8
        codes = torch.empty(batch, heads, rows, keys, dtype=code_dtype, device=q.device)
        kept = torch.empty(codes.shape, dtype=torch.bool, device=q.device) if dropout > 0 else None
        divisor = torch.empty(batch, heads, rows, 1, device=q.device)
        output = torch.empty(batch, rows, heads, v.shape[-1], device=q.device).transpose(1, 2)
        for part in batch_slices(codes.shape):
            weights, divisor[part] = _codes(
                q[part], k[part], batch_part(valid, part), batch_part(alpha, part), cutoff, spec
            )
            codes[part] = weights
            if kept is not None:
                kept[part].bernoulli_(1 - dropout)
                weights = weights * kept[part] / (1 - dropout)
            output[part] = (_weighted(weights, v[part]) * v_scale) / divisor[part]
        ctx.save_for_backward(q, k, v, alpha, v_scale, codes, kept, divisor, output)
        ctx.dropout = dropout
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, alpha, v_scale, codes, kept, divisor, output = ctx.saved_tensors
        grad = grads[0].float()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in batch_slices(codes.shape):
            scaled = grad[part] * v_scale
            weights = codes[part] / divisor[part]
            inner = scaled @ v[part].mT
            dropped = weights
            if kept is not None:
                factor = kept[part] / (1 - ctx.dropout)
                inner.mul_(factor)
                dropped = weights * factor
            grad_v[part] = dropped.mT @ scaled
            inner.sub_((grad[part] * output[part]).sum(-1, keepdim=True)).mul_(weights)
            inner.mul_(batch_part(alpha, part))
            grad_q[part] = inner @ k[part]
            grad_k[part] = inner.mT @ q[part]
        grad_alpha = grad_v_scale = None
        if ctx.needs_input_grad[3]:
            grad_alpha = ((grad_q * q).sum(-1, keepdim=True) / alpha).sum_to_size(alpha.shape)
        if ctx.needs_input_grad[4]:
            grad_v_scale = (grad * output / v_scale).sum_to_size(v_scale.shape)
        return grad_q, grad_k, grad_v, grad_alpha, grad_v_scale, None, None, None, None


def _codes(
    q: Tensor, k: Tensor, valid: Tensor | None, alpha: Tensor, cutoff: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    acc = q @ k.mT
    if spec.rule != "relative" or spec.p.mode != "row" or spec.p.bits is None:
        pairs = prune_and_code(acc, valid, alpha, cutoff, spec)
        return pairs.codes, pairs.divisor
    # The default rule, in place and by one table look-up; pairs at infinite distance get exponent T_MAX and code 0.
    if valid is not None:
        acc.masked_fill_(~valid, -torch.inf)
    row_max = acc.amax(-1, keepdim=True)
    row_max.masked_fill_(row_max == -torch.inf, 0.0)
    distance = acc.neg_().add_(row_max)
    if cutoff is not None:
        distance.masked_fill_(distance > relative_cut(cutoff.view(1, -1, 1, 1), alpha), torch.inf)
    t = exponent(distance, exponent_rate(alpha))
    codes = code_table(spec.p.qmax, t.device).index_select(0, t.view(-1)).view(t.shape).float()
    return codes, codes.sum(-1, keepdim=True).clamp_(min=1)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    may_be_inexact = weights.shape[-1] * 255 * 127 >= EXACT
    if may_be_inexact and float(weights.sum(-1).amax()) * 127 >= EXACT:
        return (weights.double() @ v.double()).float()
    return weights @ v


def batch_slices(shape: Sequence[int]) -> list[slice]:
    """Slices of the batch of about `SLICE` pairs each, of `shape` [B, H, Sq, Sk]: passes then stay in the cache."""
    batch, heads, rows, keys = shape
    step = max(1, SLICE // max(1, heads * rows * keys))
    return [slice(start, start + step) for start in range(0, batch, step)]


def batch_part(x: Tensor | None, part: slice) -> Any:
    """The slice of a tensor that has a batch dimension of its own; others pass unchanged."""
    return x if x is None or x.shape[0] == 1 else x[part]
