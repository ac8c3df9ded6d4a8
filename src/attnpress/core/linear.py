"""Linear layers in 8 bits: their integers, and a readable product.

    levels = 2^bits - 1, 127 or 255                                                  of the codes of inputs
    scale = (high - low) / levels      zero = round(-low / scale)                    for each token; low <= 0 <= high
    codes = clamp(round_half_to_even(x * (1 / scale)) + zero, 0, levels)             uint8
    w_codes = clamp(round_half_to_even(w * (1 / w_scale)), -127, 127)                int8, one scale for each output
    out = (codes . w_codes - zero * sum(w_codes)) * w_scale * scale + bias           the sums in int32, exact

Inputs are unsigned with a zero point, since outputs of a GELU are rarely negative: symmetric codes would leave half of
the range unused. Processors with VNNI multiply such pairs of unsigned and signed bytes exactly. Others with AVX2 add
pairs of products in 16 bits, which 7-bit codes cannot overflow: 2 * 127 * 127 < 2^15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.core.ordered import fma
from attnpress.core.quantizer import positive_scale, quantize

Bits = Literal[7, 8]
"""Of the codes of a product's input."""

ACTIVATION_BITS: Bits = 7
"""Default width of input codes: exact with the same instructions on every x86 with AVX2 (decision 25)."""

LEVELS = 255
"""The largest 8-bit code."""

WEIGHT_QMAX = 127


class Coded(NamedTuple):
    """Tokens as codes.

    Attributes:
        codes: uint8 [..., K].
        scale, zero: float32 [...], of each token; the code of zero is an integer.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class ProductPlan:
    """One product of an encoder layer, as `calibrate_linear` rated it.

    Attributes:
        error: relative change of the model's output if only this product is in 8 bits; None if not measured.
        quantized: False if it stays in float.
        bits: of its input codes, 7 or 8; weights always have 8. Unused for the word embedding.
    """

    error: float | None = None
    quantized: bool = True
    bits: Bits = ACTIVATION_BITS


def token_codes(x: Tensor, bits: int = 8) -> Coded:
    """Codes of a layer's input [..., K]; each token's range includes zero. NaN gets the code of zero."""
    x, levels = x.float(), float(2**bits - 1)
    seen = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    low, high = (bound.unsqueeze(-1) for bound in (seen.amin(-1).clamp(max=0), seen.amax(-1).clamp(min=0)))
    scale = positive_scale((high - low) / levels)
    inverse = 1.0 / scale
    zero = -(low * inverse).clamp(min=-levels).round()
    codes = torch.maximum(torch.minimum((x * inverse).nan_to_num(nan=0.0), levels - zero), -zero).round() + zero
    return Coded(codes.to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1).abs())


def decode(coded: Coded) -> Tensor:
    """Values of codes: float32 [..., K]."""
    return (coded.codes.float() - coded.zero.unsqueeze(-1)) * coded.scale.unsqueeze(-1)


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [N, K]: int8 [N, K], float32 [N]."""
    scale = positive_scale(weight.detach().float().abs().amax(1, keepdim=True) / WEIGHT_QMAX)
    return quantize(weight.detach(), scale, WEIGHT_QMAX).to(torch.int8), scale.squeeze(1)


def column_sums(weight: Tensor) -> Tensor:
    """Sums of a weight's codes [N, K] over the inputs: float32 [N], each rounded once from its integer."""
    # In blocks of rows, since torch adds bytes in a copy that is eight times as large.
    return torch.cat([rows.sum(1) for rows in weight.split(128)]).float()


def finish(sums: Tensor, coded: Coded, column: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the layer's output from sums of products of codes, in two steps of `core.ordered.fma` and one product.

    Args:
        sums: float32 [..., N], each rounded once from its integer.
        coded: the tokens; only scale and zero are used.
        column: from `column_sums`.
    """
    centred = fma(-coded.zero.unsqueeze(-1), column, sums)
    # A missing bias is a bias of zeros: -0 + 0 is +0 everywhere.
    shift = torch.zeros_like(weight_scale) if bias is None else bias
    return fma(centred * weight_scale, coded.scale.unsqueeze(-1), shift)


def linear(coded: Coded, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The readable product: exact integers, then float32.

    Args:
        coded: tokens [..., K].
        weight, weight_scale: from `weight_codes`.
        bias: float32 [N], or None.

    Returns:
        float32 [..., N].
    """
    # A float64 product of integers this small is exact in any order of summation.
    sums = (coded.codes.double() @ weight.double().mT).float()
    return finish(sums, coded, column_sums(weight), weight_scale, bias)


def fake_quantize_linear(x: Tensor, weight: Tensor, bias: Tensor | None, bits: int = 8) -> Tensor:
    """The same product in floating point, at the speed of a float product, in the dtype of `x`.

    Args:
        x: [..., K], not quantized.
        weight: [N, K], not quantized.
        bits: of the codes of `x`.
    """
    codes, scale = weight_codes(weight)
    return F.linear(decode(token_codes(x, bits)).to(x.dtype), (codes * scale.unsqueeze(1)).to(x.dtype), bias)
