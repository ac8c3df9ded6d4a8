"""Trained thresholds: a soft gate in place of the cut while training, and a penalty for what it lets through.

After Li et al., "Accelerating Attention through Gradient-Based Learned Runtime Pruning" (LeOPArd, ISCA 2022, arXiv
2204.03227): one threshold on the scores of each attention module, trained together with the weights; a differentiable
stand-in for the count of surviving scores is added to the loss; inference cuts hard. Written from that description, and
different from it in three points. Thresholds are measured from the row maximum (softmax does not see where scores
begin), so that inference is that of rule "relative". The gate scales the exponential of a score, as a sigmoid, instead
of the score. The penalty ends where the asked sparsity is reached, so that runs can be compared at equal sparsity.
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
"""Of the gate, per nat: within a quarter of a nat of the threshold it goes from a tenth to nine tenths."""

GAIN = 500.0
"""Nats for one unit of the trained parameter: optimizers such as Adam move a parameter by about the learning rate."""

SLOWEST = 100.0
"""Nats below the row maximum beyond which exponentials are zero; keeps those of pairs that are not valid finite."""


def soft_gate_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention of quantized Q, K, V and P whose pairs pass a soft gate; for training only.

    Args:
        call: as `fake_quantize.fake_quantize_attention` takes it, but for `cutoff`: float32 [1], nats below the row
            maximum; gradients reach it. Rows that are not `real` do not count for the density.

    Returns:
        Output, float32 [B, Hq, Sq, D]; and the share of valid pairs that the gate lets through, a scalar with gradient.
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
    """How far the mean density of the modules exceeds what is asked of them; 0 where it does not.

    Args:
        densities: of each module, as `soft_gate_attention` gives them.
        sparsity: asked of each module.
    """
    allowed = 1 - sum(sparsity) / len(sparsity)
    return torch.relu(torch.stack(list(densities)).mean() - allowed)


def _nats_below(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distance of each score below its row's maximum, which takes no gradient, and a mask of what is valid."""
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
