"""Trained thresholds: a soft gate in place of the cut during training, and a penalty on the pairs that it passes.

After Li et al., "Accelerating Attention through Gradient-Based Learned Runtime Pruning" (LeOPArd, ISCA 2022, arXiv
2204.03227): one threshold on the scores of each attention module is trained with the weights, a differentiable count of
surviving scores is added to the loss, and inference uses a hard cut. Implemented from that description, with three
differences. Thresholds are relative to the row maximum (softmax ignores an offset of scores), so inference is that of
rule "relative". The gate scales the exponential of a score, as a sigmoid, instead of the score. The penalty ends at the
requested sparsity, so that runs can be compared at equal sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.arguments import pair_mask, some_key
from attnpress.core.attention import repeat_heads
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.fake_quantize import scores_operands, static_scale
from attnpress.core.quantizer import quantize_straight_through

SHARPNESS = 10.0
"""Slope of the gate per nat: it rises from 0.1 to 0.9 within a quarter of a nat on either side of the threshold."""

GAIN = 500.0
"""Nats per unit of the trained parameter, since optimizers such as Adam move it by about the learning rate."""

SLOWEST = 100.0
"""Nats below the row maximum beyond which exponentials are zero; keeps those of invalid pairs finite."""


def soft_gate_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention of quantized Q, K, V and P whose pairs pass a soft gate; for training only.

    Args:
        call: as for `fake_quantize.fake_quantize_attention`, except for `cutoff`: float32 [1], nats below the row
            maximum, with gradient. Rows that are not `real` do not count for the density.

    Returns:
        Output, float32 [B, Hq, Sq, D]; and the share of valid pairs that the gate passes, a scalar with gradient.
    """
    key, value, valid = some_key(call.key, call.value, pair_mask(call.valid, call.query, call.key))
    call, heads, spec = call.with_(key=key, value=value, valid=valid), call.query.shape[1], call.spec
    q, k, alpha = scores_operands(call)
    assert call.cutoff is not None
    nats, allowed = _nats_below(q @ repeat_heads(k, heads).mT * alpha, valid)
    gate = torch.sigmoid((call.cutoff - nats) * SHARPNESS) * allowed
    weights = _coded(torch.exp(-nats) * gate, spec)
    total = weights.sum(-1, keepdim=True)
    probs = F.dropout(weights / torch.where(total > 0, total, 1.0), call.dropout)
    output = probs @ repeat_heads(_quantized_value(value, call.scales, spec), heads)
    counted = allowed if call.real is None else allowed & call.real
    return output, (gate * counted).sum() / counted.sum().clamp(min=1)


def density_penalty(densities: Sequence[Tensor], sparsity: Sequence[float]) -> Tensor:
    """Excess of the modules' mean density over the requested one; 0 if there is none.

    Args:
        densities: of each module, from `soft_gate_attention`.
        sparsity: requested of each module.
    """
    allowed = 1 - sum(sparsity) / len(sparsity)
    return torch.relu(torch.stack(list(densities)).mean() - allowed)


def _nats_below(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distance of each score below its row's maximum (without gradient), and a mask of valid pairs."""
    allowed = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.expand_as(scores)
    row_max = scores.detach().masked_fill(~allowed, -math.inf).amax(-1, keepdim=True)
    nats = row_max.masked_fill(row_max == -math.inf, 0.0) - scores
    return nats.masked_fill(~allowed, SLOWEST), allowed


def _coded(weights: Tensor, spec: AttentionSpec) -> Tensor:
    """P codes as multiples of 1 / qmax, gradients straight through the rounding."""
    if spec.p.bits is None:
        return weights
    return weights + ((weights * spec.p.qmax).round() / spec.p.qmax - weights).detach()


def _quantized_value(value: Tensor, scales: Scales, spec: AttentionSpec) -> Tensor:
    if spec.v.bits is None:
        return value.float()
    scale = static_scale(scales.v, value, spec.v.qmax)
    return quantize_straight_through(value, scale, spec.v.qmax) * scale
