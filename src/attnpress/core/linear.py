"""Linear layers in 8 bits: what their integers are, and the product in full view.

    codes = clamp(round_half_to_even(x * (1 / scale)) + zero_point, 0, 255)         uint8, one step for the whole tensor
    w_codes = clamp(round_half_to_even(w * (1 / w_scale)), -127, 127)               int8, one scale for each output
    out = ((codes - zero_point) . w_codes) * scale * w_scale + bias                 the sum in int32, exact

Inputs are unsigned with a zero point because what comes out of a GELU hardly goes below zero: symmetric codes would
leave half of the range empty. Processors with VNNI multiply exactly such a pair, bytes without and with a sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.core.quantizer import positive_scale, quantize

LEVELS = 255
WEIGHT_QMAX = 127


@dataclass(frozen=True)
class Step:
    """How a tensor becomes uint8: one step and the code of zero."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class ProductPlan:
    """One product of an encoder layer, as calibration found it.

    Attributes:
        low, high: smallest and largest input, over real tokens.
        error: relative change of the model's output where this product alone is in 8 bits; None if nobody looked.
        quantized: False if it stays in float.
    """

    low: float
    high: float
    error: float | None = None
    quantized: bool = True

    @property
    def step(self) -> Step:
        """Of the product's input."""
        return step_of(self.low, self.high)


def step_of(low: float, high: float) -> Step:
    """The step that covers [low, high], widened to hold zero, which then has a code of its own.

    Raises:
        ValueError: a bound is not finite, or they are in the wrong order.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"inputs of a linear layer range from {low} to {high}: no step covers that")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(positive_scale(torch.tensor((high - low) / LEVELS)))
    return Step(scale, max(0, min(LEVELS, round(-low / scale))))


def input_codes(x: Tensor, step: Step) -> Tensor:
    """Codes of a layer's input: uint8, the shape of `x`; NaN becomes the code of zero."""
    codes = (x.float() * (1.0 / torch.tensor(step.scale))).round_().nan_to_num_(nan=0.0)
    return (codes + step.zero_point).clamp_(0, LEVELS).to(torch.uint8)


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [N, K]: int8 [N, K], float32 [N]."""
    scale = positive_scale(weight.detach().float().abs().amax(1, keepdim=True) / WEIGHT_QMAX)
    return quantize(weight.detach(), scale, WEIGHT_QMAX).to(torch.int8), scale.squeeze(1)


def linear(codes: Tensor, step: Step, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product, readable: exact integers, then float32.

    Args:
        codes: uint8 [..., K], from `input_codes`.
        weight, weight_scale: from `weight_codes`.
        bias: float32 [N], or None.

    Returns:
        float32 [..., N].
    """
    # A float64 product of integers this small is exact in any order of summation.
    total = (codes.double() - step.zero_point) @ weight.double().mT
    out = total.float() * (torch.tensor(step.scale) * weight_scale)
    return out if bias is None else out + bias


def fake_quantize_linear(x: Tensor, weight: Tensor, bias: Tensor | None, step: Step) -> Tensor:
    """The same product in floating point, as fast as that of floats anywhere; in the dtype of `x`.

    Args:
        x: [..., K], not yet coded.
        weight: [N, K], not yet coded.
    """
    codes, scale = weight_codes(weight)
    seen = (input_codes(x, step).float() - step.zero_point) * step.scale
    return F.linear(seen.to(x.dtype), (codes * scale.unsqueeze(1)).to(x.dtype), bias)
