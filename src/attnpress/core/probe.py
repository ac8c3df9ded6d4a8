"""Diagnostics of one attention call: P before and after compression, its error, and its distribution.

Neither training nor prediction uses this. A model passes its calls to a probe on a few examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnpress.config import DENSE, TensorSpec
from attnpress.core.arguments import pair_mask
from attnpress.core.attention import (
    Pairs,
    key_validity,
    prune_and_code,
    query_scale,
    repeat_heads,
)
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.exponential import exponent, exponent_rate
from attnpress.core.fake_quantize import scores_operands
from attnpress.core.predictor import foretold_scores
from attnpress.core.quantizer import dequantize, quantize, smooth_key
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BINS
from attnpress.core.tail import active_tail, mean_score, score_steps, scored_codes, sum_tail
from attnpress.core.thresholds import pair_histogram

COARSE = 32
"""Fine bins per bin of a probe's histogram: a quarter of an octave."""


@dataclass(frozen=True)
class Probe:
    """Result for one call.

    Attributes:
        before, after: P of floating-point and of compressed attention, float32 [B, Hq, Sq, Sk].
        codes: P codes of compressed attention, same shape.
        counted: bool, same shape: valid pairs of real rows.
        histogram: float64 [Hq, BINS / COARSE], pairs by the cutoff at which the rule would keep them (see `Rule.bins`).
        loss: float64 [2, Hq] for each of q, k, v, p and output: summed squares of the error, and of the exact values.
        mass: float64 [2, Hq]: exact P summed over the pairs without a P code, and over all.
    """

    before: Tensor
    after: Tensor
    codes: Tensor
    counted: Tensor
    histogram: Tensor
    loss: dict[str, Tensor]
    mass: Tensor


@torch.no_grad()
def probe(call: AttentionCall) -> Probe:
    """Run the call exactly and compressed, on the same Q, K and V.

    Args:
        call: from the model; any matrix may stay in floating point.
    """
    call = call.with_(valid=pair_mask(call.valid, call.query, call.key))
    dense, pairs = _pairs(call.with_(scales=Scales(), cutoff=None, spec=DENSE)), _pairs(call)
    before, after = dense.codes / dense.divisor, _compressed(call, pairs)
    counted = pairs.valid if call.real is None else pairs.valid & call.real
    looked = pairs.scored
    exponents = exponent(looked.distance, exponent_rate(looked.alpha))
    bins = pair_histogram(rule_of(call.spec).bins(exponents, looked.probability, looked.distance), counted)
    loss = _loss(call, before, after, counted)
    exact = before.double() * counted
    mass = torch.stack([(exact * (pairs.codes == 0)).sum((0, 2, 3)), exact.sum((0, 2, 3))])
    return Probe(before, after, pairs.codes, counted, bins.unflatten(-1, (BINS // COARSE, COARSE)).sum(-1), loss, mass)


def relative_error(loss: Tensor) -> Tensor:
    """Root of the summed squared errors over the root of the summed squares, [2, H] -> [H]; 0 if all are zero."""
    return (loss[0] / loss[1].clamp(min=torch.finfo(loss.dtype).tiny)).sqrt()


def _pairs(call: AttentionCall) -> Pairs:
    q, k, alpha = scores_operands(call)
    k = repeat_heads(k, q.shape[1])
    foretold = foretold_scores(q, k, call.spec)
    return prune_and_code(q @ k.mT, call.valid, alpha, call.cutoff, call.spec, foretold)


def _compressed(call: AttentionCall, pairs: Pairs) -> Tensor:
    """P as the output uses it: survivors by their codes, pairs of the tail by its level."""
    spec = call.spec
    tail = active_tail(spec, call.scales.tail, call.cutoff, call.query)
    if tail is None:
        return pairs.codes / pairs.divisor
    q, k, alpha = scores_operands(call)
    heads, scored = q.shape[1], scored_codes(q, k, spec, tail)
    rest = pairs.valid & (pairs.codes == 0)
    rate, qmax = exponent_rate(alpha), spec.p.qmax
    sums = sum_tail(rest, pairs.distance, repeat_heads(k, heads), scored, rate, tail.lift, qmax)
    share = rest.float()
    if scored is not None:
        step = score_steps(alpha, tail, heads)
        share = share * (1 + step * (scored[0] @ scored[1].mT - mean_score(sums)))
    return (pairs.codes + sums.level * share) / (pairs.divisor + sums.level * sums.count)


def _loss(call: AttentionCall, before: Tensor, after: Tensor, counted: Tensor) -> dict[str, Tensor]:
    spec, scales = call.spec, call.scales
    heads, keys = call.query.shape[1], key_validity(counted)
    rows = counted.any(-1, keepdim=True)
    key = smooth_key(call.key, key_validity(call.valid)) if spec.smooth_key else call.key.float()
    query, value = call.query.float(), call.value.float()
    q_scale = None if spec.q.bits is None else query_scale(query, scales, spec.q)
    coded = _coded(value, scales.v, spec.v)
    exact, compressed = (p @ repeat_heads(v, heads) for p, v in ((before, value), (after, coded)))
    wide = {name: repeat_heads(x, heads) for name, x in (("k", key), ("v", value), ("coded", coded))}
    coded_key = repeat_heads(_coded(key, scales.k, spec.k), heads)
    return {
        "q": _squares(query, _coded(query, q_scale, spec.q), rows),
        "k": _squares(wide["k"], coded_key, keys),
        "v": _squares(wide["v"], wide["coded"], keys),
        "p": _squares(before, after, counted),
        "output": _squares(exact, compressed, rows),
    }


def _coded(x: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
    return x if spec.bits is None or scale is None else dequantize(quantize(x, scale, spec.qmax), scale)


def _squares(exact: Tensor, compressed: Tensor, counted: Tensor | None) -> Tensor:
    error, power = (compressed - exact).double() ** 2, exact.double() ** 2
    if counted is not None:
        error, power = error * counted, power * counted
    return torch.stack([error.sum((0, 2, 3)), power.sum((0, 2, 3))])
