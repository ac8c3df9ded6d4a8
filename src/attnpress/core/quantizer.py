"""Symmetric linear quantization (numerics, section 1): scales, codes, and gradients straight through the rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-40, 2.0**40
"""Range in which 1 / scale and products of scales stay well inside float32."""

EXACT = 2**24
"""float32 represents every integer up to this magnitude."""

_EDGE = 1 + 2.0**-21
"""Tolerance for the rounding of x * (1 / scale), so that the value that defines the scale is not clipped."""

MEAN_GRID, MEAN_LIMIT = 2.0**20, 2.0**36
"""K smoothing averages multiples of 2^-20 up to 2^16: float64 sums of up to 2^17 of them are exact in any order."""

_MANTISSA = 2**23 - 1


def positive_scale(scale: Tensor, *, power_of_two: bool = False) -> Tensor:
    """A valid float32 scale: clamped to the legal range, 1 if all data are zero, rounded up to 2^-f if requested."""
    scale = scale.float()
    scale = torch.where(scale > 0, scale.clamp(SMALLEST_SCALE, LARGEST_SCALE), torch.ones_like(scale))
    if not power_of_two:
        return scale
    # On the bits, since floating-point log2 rounds numbers just above a power of two to that power.
    return ((scale.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)


def token_scale(x: Tensor, qmax: int, *, power_of_two: bool = False) -> Tensor:
    """Dynamic scale of each row, from its largest finite magnitude.

    Args:
        x: [..., S, D], any float dtype.

    Returns:
        float32 [..., S, 1].
    """
    magnitude = x.detach().float().abs().nan_to_num_(nan=0.0, posinf=0.0)
    # Divide by a tensor: on a GPU, PyTorch multiplies by the reciprocal of a number, which rounds twice.
    divisor = torch.full((), float(qmax), device=x.device)
    return positive_scale(magnitude.amax(-1, keepdim=True) / divisor, power_of_two=power_of_two)


def quantize(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Codes of `x`: clamp(round_half_to_even(x * (1 / scale)), -qmax, +qmax).

    NaN becomes code 0. An infinity saturates like any other large value.

    Args:
        x: any shape and float dtype; converted to float32 first.
        scale: positive float32, broadcastable to `x`.

    Returns:
        float32 tensor holding integers, so that a float matrix product of codes is exact.
    """
    codes = x.float() * (1.0 / scale)
    return codes.round_().clamp_(-qmax, qmax).nan_to_num_(nan=0.0)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale."""
    return codes * scale


class _StraightThrough(torch.autograd.Function):
    """`quantize` with a gradient that ignores the rounding and is zero outside the clipping range.

    The derivative with respect to the scale, combined with that of dequantization, is learned step size quantization
    (Esser et al., ICLR 2020, equation 3); see numerics, section 7.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmax: int) -> Tensor:
        magnitude = (x.float() * (1.0 / scale)).abs_()
        # A byte instead of a bool: PyTorch's products with booleans are many times slower on a CPU.
        inside = torch.le(magnitude, qmax * _EDGE, out=torch.empty(x.shape, dtype=torch.uint8, device=x.device))
        ctx.save_for_backward(inside, scale, x if scale.requires_grad else None)
        ctx.dtype = x.dtype
        return quantize(x, scale, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inside, scale, x = ctx.saved_tensors
        through = grads[0] * inside.float() / scale
        # Outside the range x may be infinite or NaN, and 0 * x would be NaN.
        steps = None if x is None else (x.float() / scale).masked_fill(inside == 0, 0.0)
        grad_scale = None if steps is None else -(through * steps).sum_to_size(scale.shape)
        return through.to(ctx.dtype), grad_scale, None


def quantize_straight_through(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """`quantize` with gradients: to `x` inside the clipping range, and to `scale` if it is learned."""
    if not torch.is_grad_enabled():
        return quantize(x, scale, qmax)
    codes: Tensor = _StraightThrough.apply(x, scale, qmax)  # type: ignore[no-untyped-call]
    return codes


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def learned_step(scale: Tensor, count: int, qmax: int) -> Tensor:
    """The scale itself, with its gradient divided by sqrt(count * qmax) (LSQ, section 2.2).

    Args:
        scale: learned scale, kept positive by `positive_scale`.
        count: number of values that share one scale; 0 in an empty batch.
    """
    stepped: Tensor = _ScaleGradient.apply(scale, (max(count, 1) * qmax) ** -0.5)  # type: ignore[no-untyped-call]
    return stepped


def smooth_key(key: Tensor, valid: Tensor | None) -> Tensor:
    """K minus its mean over the valid keys of the same head (SageAttention's K smoothing; softmax does not change).

    The mean does not depend on the order of summation: each value is rounded to a multiple of 2^-20, at most 2^16 in
    magnitude (0 if not finite), summed and divided by the number of keys in float64, then rounded to float32. What
    rounding loses is subtracted from all keys alike, which softmax ignores.

    Args:
        key: [B, Hkv, Sk, D].
        valid: bool, broadcastable to [B, Hkv, Sk, 1], at least [Sk or 1, 1]; None if every key is valid.

    Returns:
        float32 [B, Hkv, Sk, D]. The mean carries no gradient, since each row of score gradients sums to zero.
    """
    with torch.no_grad():
        finite = key.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        steps = (finite * MEAN_GRID).round_().clamp_(-MEAN_LIMIT, MEAN_LIMIT)
        if valid is None:
            count = torch.tensor(float(max(1, key.shape[-2])), dtype=torch.float64, device=key.device)
        else:
            valid = valid.expand(*valid.shape[:-2], key.shape[-2], 1)  # each key counts, even with one flag for all
            steps = steps.masked_fill(~valid, 0.0)
            count = valid.double().sum(-2, keepdim=True).clamp(min=1)
        mean = (steps.sum(-2, keepdim=True, dtype=torch.float64) / count / MEAN_GRID).float()
    return key.float() - mean
