"""Linear layers in 8 bits: what their integers are, and the product in full view.

    scale = (high - low) / 255      zero = round(-low / scale)                       for each token; low <= 0 <= high
    codes = clamp(round_half_to_even(x * (1 / scale)) + zero, 0, 255)                uint8
    w_codes = clamp(round_half_to_even(w * (1 / w_scale)), -127, 127)                int8, one scale for each output
    out = (codes . w_codes - zero * sum(w_codes)) * scale * w_scale + bias           the sums in int32, exact

Inputs are unsigned with a zero point because what comes out of a GELU hardly goes below zero: symmetric codes would
leave half of the range empty. Processors with VNNI multiply exactly such a pair, bytes without and with a sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.core.quantizer import positive_scale, quantize

LEVELS = 255
WEIGHT_QMAX = 127


class Coded(NamedTuple):
    """Tokens as a product of codes takes them.

    Attributes:
        codes: uint8 [..., K].
        scale, zero: float32 [...], of each token; the code of zero is a whole number.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class ProductPlan:
    """One product of an encoder layer, as `calibrate_linear` judged it.

    Attributes:
        error: relative change of the model's output where this product alone is in 8 bits; None if nobody looked.
        quantized: False if it stays in float.
    """

    error: float | None = None
    quantized: bool = True


def token_codes(x: Tensor) -> Coded:
    """Codes of a layer's input [..., K]; each token's range is widened to hold zero. NaN becomes the code of zero."""
    x = x.float()
    seen = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    low, high = (bound.unsqueeze(-1) for bound in (seen.amin(-1).clamp(max=0), seen.amax(-1).clamp(min=0)))
    scale = positive_scale((high - low) / LEVELS)
    inverse = 1.0 / scale
    zero = -(low * inverse).clamp(min=-LEVELS).round()
    codes = torch.maximum(torch.minimum((x * inverse).nan_to_num(nan=0.0), LEVELS - zero), -zero).round() + zero
    return Coded(codes.to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1).abs())


def decode(coded: Coded) -> Tensor:
    """What codes stand for: float32 [..., K]."""
    return (coded.codes.float() - coded.zero.unsqueeze(-1)) * coded.scale.unsqueeze(-1)


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [N, K]: int8 [N, K], float32 [N]."""
    scale = positive_scale(weight.detach().float().abs().amax(1, keepdim=True) / WEIGHT_QMAX)
    return quantize(weight.detach(), scale, WEIGHT_QMAX).to(torch.int8), scale.squeeze(1)


def linear(coded: Coded, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product, readable: exact integers, then float32.

    Args:
        coded: tokens [..., K].
        weight, weight_scale: from `weight_codes`.
        bias: float32 [N], or None.

    Returns:
        float32 [..., N].
    """
    # A float64 product of integers this small is exact in any order of summation.
    total = (coded.codes.double() - coded.zero.double().unsqueeze(-1)) @ weight.double().mT
    out = total.float() * weight_scale * coded.scale.unsqueeze(-1)
    return out if bias is None else out + bias


def fake_quantize_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same product in floating point, as fast as that of floats anywhere; in the dtype of `x`.

    Args:
        x: [..., K], not yet coded.
        weight: [N, K], not yet coded.
    """
    codes, scale = weight_codes(weight)
    return F.linear(decode(token_codes(x)).to(x.dtype), (codes * scale.unsqueeze(1)).to(x.dtype), bias)
