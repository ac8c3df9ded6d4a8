"""Float32 passes with one order of summation and one rounding for each step: the same bits wherever they run.

A library's sums follow the width of its registers and the number of its threads, and its erf and tanh those of its
version. What stands between the integers of a deployed encoder is therefore defined here, in steps that IEEE 754
rounds in one way only: +, -, *, /, sqrt and fma of float32. fma(a, b, c) is a * b + c, rounded once.

    sum(x)      lane j of 64 adds x[j], x[j + 64], ... to 0, in that order; lanes are added j and j + 32, then j and
                j + 16, j + 8, j + 4; then (lane 0 + lane 1) + (lane 2 + lane 3)
    sum(x * y)  likewise, but that lane j becomes fma(x[i], y[i], lane j)
    norm(x)     c = x - sum(x) / K;  fma(c * (1 / sqrt(sum(c * c) / K + epsilon)), weight, bias)
    gelu(x)     fma(x/2, erf(x * 0.70710678), x/2), erf a quotient of polynomials with its argument within +-4
    tanh(x)     a quotient of polynomials with its argument within +-7.9053111
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 64

ERF_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
ERF_LIMIT = 4.0
TANH_ABOVE = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
TANH_LIMIT = 7.90531110763549805
"""Coefficients of the approximations in Eigen and XLA, highest power of the squared argument first."""


class Passes(NamedTuple):
    """The functions of this module, or compiled ones with the same results."""

    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gelu: Callable[[Tensor], Tensor]
    tanh: Callable[[Tensor], Tensor]


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd, which is safe before a second rounding: if it is inexact
    and its last bit even, it moves to the neighbour on the side of the lost part.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    moved = total - product
    lost = (product - (total - moved)) + (addend - moved)
    even = (total.view(torch.int64) & 1) == 0
    neighbour = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), lost))
    return torch.where(even & (lost != 0) & lost.isfinite(), neighbour, total).float()


def ordered_sum(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of float32 [..., K], or of its products with a weight [..., K], in the fixed order: float32 [...]."""
    padding = (0, -x.shape[-1] % LANES)
    blocks = torch.nn.functional.pad(x, padding).split(LANES, -1)
    shape = x.shape if weight is None else torch.broadcast_shapes(x.shape, weight.shape)
    lanes = x.new_zeros(*shape[:-1], LANES)
    if weight is None:
        for block in blocks:
            lanes = lanes + block
    else:
        for block, factors in zip(blocks, torch.nn.functional.pad(weight, padding).split(LANES, -1), strict=True):
            lanes = fma(block, factors, lanes)
    for half in (32, 16, 8, 4):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return (lanes[..., 0] + lanes[..., 1]) + (lanes[..., 2] + lanes[..., 3])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """float32 [..., K] normalized over the last dimension."""
    size = torch.tensor(float(x.shape[-1]))
    centred = x - (ordered_sum(x) / size).unsqueeze(-1)
    variance = ordered_sum(centred, centred) / size + torch.tensor(epsilon)
    # In float64, since torch's float32 root (of a vector library) is not always correctly rounded.
    factor = 1.0 / variance.double().sqrt().float()
    return fma(centred * factor.unsqueeze(-1), weight, bias)


def gelu(x: Tensor) -> Tensor:
    """x/2 (1 + erf(x / sqrt 2)) in float32, within a few units in the last place of the true value."""
    half = x * 0.5
    return fma(half, _quotient((x * 0.70710678).clamp(-ERF_LIMIT, ERF_LIMIT), ERF_ABOVE, ERF_BELOW), half)


def tanh(x: Tensor) -> Tensor:
    """tanh in float32, within a few units in the last place of the true value."""
    return _quotient(x.clamp(-TANH_LIMIT, TANH_LIMIT), TANH_ABOVE, TANH_BELOW)


def ordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A float32 linear layer, [..., K] -> [..., N]: ordered sums of products, then the bias."""
    rows = [ordered_sum(row, weight) for row in x.reshape(-1, x.shape[-1])]
    out = torch.stack(rows) if rows else x.new_zeros(0, len(weight))
    out = out.view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def _quotient(u: Tensor, above: tuple[float, ...], below: tuple[float, ...]) -> Tensor:
    """u * above(u * u) / below(u * u), by Horner's scheme."""
    square = u * u
    return u * _polynomial(square, above) / _polynomial(square, below)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, torch.full_like(x, coefficient))
    return value
