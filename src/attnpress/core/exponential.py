r"""The integer exponential: probabilities over their row maximum, the same integer on every machine.

For a score at integer distance d >= 0 below its row maximum (numerics, section 3)

    p~ = 2^(-d * alpha * log2 e)

is evaluated in two steps, neither of which calls a library exponential:

1. `exponent`: t = min(round_half_to_even(float32(d) * rate), T_MAX), the distance in 1/1024 octaves. `rate` is
   float32(alpha * log2 e) * 1024, so this is one IEEE product and one rounding: identical on any hardware.
2. `power`: with t = 1024 n + f, a cubic in f by 16-bit "high half" products, then a rounded shift by n. The result
   is an unsigned 16-bit fixed-point number in [0, 65536]; 65536 stands for 1 and is reached exactly at d = 0.

Error against the real 2^(-t/1024): at most 2^-13 relative before the shift, 2^-17 absolute from the shift. Rounding t
adds at most 2^-11.5 relative. Together under max(2^-10 p~, 2^-16), which the tests check over every t.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

STEPS_PER_OCTAVE = 1024
ONE = 1 << 16
T_MAX = 18 * STEPS_PER_OCTAVE
"""Exponent at which implementations may saturate: its power is 0, like that of every t above 17 octaves."""

_FAR = 1e30
"""Factor that raises any positive float32 difference of distances above T_MAX."""

LOG2_E = 1.4426950408889634
# Cubic coefficients of 1 - 2^-x on [0, 1) in units of 2^-16, from a search over integers for the smallest maximum
# relative error (1.05e-4) of the integer evaluation.
_C1, _C2, _C3 = 45324, 15148, 2596


def exponent_rate(alpha: Tensor) -> Tensor:
    """Units of 1/1024 octave per unit of integer score distance; float32, shape of `alpha`."""
    return (alpha.float() * torch.tensor(LOG2_E, dtype=torch.float32)) * STEPS_PER_OCTAVE


def exponent(distance: Tensor, rate: Tensor, beyond: Tensor | None = None) -> Tensor:
    """Quantized exponent t of each distance.

    Args:
        distance: integers >= 0 (any dtype), or +inf in a float tensor for a pair with probability 0.
        rate: from `exponent_rate`, broadcastable.
        beyond: float, shape of `distance`; where it is positive, the exponent is T_MAX.

    Returns:
        int32, 0 to T_MAX; T_MAX for a NaN, which only real (unquantized) scores can hold.
    """
    scaled = distance.float() * rate
    if beyond is not None:
        scaled.add_(beyond, alpha=_FAR)
    return scaled.round_().clamp_(max=T_MAX).nan_to_num_(nan=T_MAX).to(torch.int32)


def power(t: Tensor) -> Tensor:
    """2^(-t/1024) in units of 2^-16: int32 in [0, 65536], for integer t in [0, T_MAX]."""
    t = t.to(torch.int32)
    octaves = t >> 10
    fraction = (t & 1023) << 6
    return ((ONE - _drop(fraction)) + ((1 << octaves) >> 1)) >> octaves


def _drop(fraction: Tensor) -> Tensor:
    inner = _C2 - _high(fraction, _C3)
    return _high(fraction, _C1 - _high(fraction, inner))


def _high(left: Tensor, right: Tensor | int) -> Tensor:
    # The high half of an unsigned 16 x 16 bit product: one instruction (pmulhuw) in a kernel, 64 bits here.
    return ((left.to(torch.int64) * right) >> 16).to(torch.int32)


def _kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Cache small tables, except while torch traces: compile warns of caches, and export creates fake tensors."""
    known: dict[tuple[object, ...], Tensor] = {}

    @functools.wraps(make)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (*args, *kwargs.values())
        if torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and key not in known):
            return make(*args, **kwargs)
        if key not in known:
            known[key] = make(*args, **kwargs)
        return known[key]

    return table


@_kept
def power_table(device: torch.device) -> Tensor:
    """`power` of every t from 0 to T_MAX; int32 [T_MAX + 1]."""
    return power(torch.arange(T_MAX + 1, device=device))


@_kept
def code_table(qmax: int, device: torch.device) -> Tensor:
    """P code of mode "row" for every t: round_half_up(p~ * qmax); uint8 [T_MAX + 1]."""
    return row_codes(power_table(device), qmax).to(torch.uint8)


def row_codes(probability: Tensor, qmax: int) -> Tensor:
    """Codes relative to the row maximum, from 16-bit probabilities: int32 in [0, qmax]."""
    return (probability * qmax + ONE // 2) >> 16
