"""The model as an ONNX graph, with compressed attention in standard operators.

The graph is traced from `core` (scores, integer exponential, pruning rule), so it follows the reference. Only
quantization and dequantization use operators of the runtime, a `Coder`. Codes are computed at scale 1 from x *
inv_scale (numerics, section 1). Sums of codes are then integers, exact in float32, for any scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.onnx import ops

from attnpress.config import ProbsSpec
from attnpress.core.attention import Pairs, key_validity, prune_and_code, query_scale, repeat_heads, score_step
from attnpress.core.call import Attend, AttentionCall
from attnpress.core.exponential import ONE, exponent_rate, power_table
from attnpress.core.quantizer import EXACT, smooth_key
from attnpress.core.rules import rule_of, rules_of
from attnpress.core.tail import (
    Directions,
    Tail,
    active_tail,
    score_steps,
    scored_codes,
    sum_tail,
    weighted_values,
    with_tail,
)
from attnpress.export.errors import ExportError
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attending, attentions
from attnpress.models.modes import evaluation_mode

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 21

Coder = Callable[[Tensor, torch.dtype, int], Tensor]
"""Function that rounds real numbers, in units of their scale and within the range of codes, to codes, as float32.

Its arguments include the integer type that holds the codes, and the largest code.
"""


def quantize_dequantize(x: Tensor, dtype: torch.dtype, _: int) -> Tensor:
    """ONNX's QuantizeLinear and DequantizeLinear: round half to even."""
    scale, zero = torch.ones((), device=x.device), torch.zeros((), dtype=dtype, device=x.device)
    codes = ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=dtype, shape=x.shape)
    return ops.symbolic("DequantizeLinear", (codes, scale, zero), dtype=torch.float32, shape=x.shape)


def openvino_fake_quantize(x: Tensor, dtype: torch.dtype, _: int) -> Tensor:
    """Codes by Round, followed by OpenVINO's FakeQuantize, which marks an int8 product and does not change integers.

    If FakeQuantize rounds itself, it adds an offset first, which moves values near the border between two codes. In a
    small test with dynamic shapes and one scale per head, OpenVINO 2026.4 then gave correct outputs for head 0 only.
    The cause was not traced; possibly it merges the scales into its bounds and uses those of the first head for all.
    """
    limits = torch.iinfo(dtype)
    low, high = -float(limits.max) if dtype.is_signed else 0.0, float(limits.max)
    bounds = [torch.full((), bound, device=x.device) for bound in (low, high, low, high)]
    return ops.symbolic(
        "org.openvinotoolkit::FakeQuantize",
        (x.round(), *bounds),
        {"levels": int(high - low) + 1},
        dtype=torch.float32,
        shape=x.shape,
        version=1,
    )


def graph_attention(coder: Coder) -> Attend:
    """A strategy for `CompressedAttention.attend` that is traced into the runtime's operators."""
    power_table(torch.device("cpu"))  # computed now, it becomes a constant of the graph instead of operators

    def attend(call: AttentionCall) -> Tensor:
        query, key, valid, scales, spec = call.query, call.key, call.valid, call.scales, call.spec
        heads, q_scale = query.shape[1], query_scale(query, scales, spec.q)
        assert scales.k is not None
        assert scales.v is not None
        if spec.smooth_key:
            key = smooth_key(key, key_validity(valid))
        # Each tensor is quantized right before its product, where runtimes look for codes.
        q = coder(_in_steps(query, q_scale, spec.q.qmax), torch.int8, spec.q.qmax)
        keys = repeat_heads(_in_steps(key, scales.k, spec.k.qmax), heads)
        k = coder(keys.mT, torch.int8, spec.k.qmax)
        v = coder(repeat_heads(_in_steps(call.value, scales.v, spec.v.qmax), heads), torch.int8, spec.v.qmax)
        alpha = score_step(q_scale, scales.k, call.scaling, heads)
        pairs = prune_and_code(q @ k, valid, alpha, call.cutoff, spec)
        p = coder(_probabilities(pairs, spec.p), torch.uint8, spec.p.qmax)
        weighted, divisor = p @ v, _divisor(p, spec.p)
        tail = active_tail(spec, scales.tail, call.cutoff, query)
        if tail is not None:
            tail = _for_each_query_head(tail, heads)
            # Quantize K again: ONNX Runtime 1.32 assigns the wrong type to a transpose after DequantizeLinear.
            scored = scored_codes(q, keys.round(), spec, tail)
            sums = sum_tail(
                pairs.valid & (p == 0), pairs.distance, v, scored, exponent_rate(alpha), tail.lift, spec.p.qmax
            )
            values = weighted_values(sums, score_steps(alpha, tail, heads))
            weighted, divisor = with_tail(weighted, divisor, sums, values)
        return weighted * repeat_heads(scales.v, heads) / divisor

    return attend


def _for_each_query_head(tail: Tail, heads: int) -> Tail:
    """The tail with the directions of key heads repeated, like K and V."""
    found = tail.directions
    if found is None:
        return tail
    group = heads // len(found.step)
    parts = (found.query, found.key, found.offset, found.step)
    return Tail(tail.lift, Directions(*(x.repeat_interleave(group, 0) for x in parts)))


def _in_steps(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    return (x.float() * (1.0 / scale)).clamp(-qmax, qmax)


def _probabilities(pairs: Pairs, spec: ProbsSpec) -> Tensor:
    """P in units of one code before rounding: exact in mode "row", the reference's float32 steps in mode "unit".

    In mode "row" the reference rounds half up, runtimes half to even. A tie occurs only at p~ = 1/2, since qmax is odd;
    qmax / 2 rounds to the same code either way, except for qmax 1, which `check_exportable` refuses.
    """
    if spec.mode == "row":
        # A floating-point table, since OpenVINO 2026.4 cannot compile an integer table with a conversion.
        steps = power_table(pairs.exponent.device).float() * (spec.qmax / ONE)
        return steps.index_select(0, pairs.exponent.view(-1)).view(pairs.exponent.shape) * pairs.keep
    total = pairs.probability.sum(-1, keepdim=True, dtype=torch.int64).clamp(min=1)
    return pairs.probability.float() * (spec.qmax / total.float()) * pairs.keep


def _divisor(p: Tensor, spec: ProbsSpec) -> Tensor:
    if spec.mode == "unit" and not spec.renormalize:
        return torch.full((), float(spec.qmax), device=p.device)
    return p.sum(-1, keepdim=True).clamp(min=1)  # exact in float32 up to LONGEST keys


LONGEST = EXACT // 255
"""Maximum number of keys for which float32 sums of P codes are exact: 65,793."""


def check_exportable(model: nn.Module, runtime: str = "onnx") -> None:
    """Refuse options that the operators cannot express. Layers that compress nothing keep the framework's attention.

    Args:
        runtime: "onnx" or "openvino"; they support different rules.

    Raises:
        ExportError: names the module and the option.
    """
    modules = {name: module for name, module in attentions(model).items() if not module.spec.is_dense}
    for name, module in modules.items():
        module.require_calibrated(name)
    if not modules:
        raise ExportError("the model has no compressed attention: export takes a model after bind and calibrate")
    for name, module in modules.items():
        reason = _refusal(module, runtime)
        if reason:
            raise ExportError(f"{name}: {reason}")


def _refusal(module: CompressedAttention, runtime: str) -> str | None:
    spec = module.spec
    if None in spec.bits.values():
        return f"a graph of codes needs bits for all of q, k, v and p; found {spec.bits}"
    if runtime not in rule_of(spec).kernels and (spec.sparsity > 0 or spec.threshold is not None):
        return f"rule {spec.rule!r} cannot be exported here, only {', '.join(rules_of(runtime))}"
    if spec.predictor_bits is not None and (spec.sparsity > 0 or spec.threshold is not None):
        return f"a predicted mask (predictor_bits {spec.predictor_bits}) cannot be exported here"
    if spec.q.granularity == "token" and spec.q.power_of_two:
        return "q.granularity 'token' with power_of_two reads the bits of a float, which ONNX has no operator for"
    if spec.p.qmax == 1:
        return "p of 2 bits, signed, has the codes 0 and 1 only, which runtimes round differently at one half"
    return None


def trace_graph(model: nn.Module, batch: Mapping[str, Tensor], coder: Coder, runtime: str = "onnx") -> ONNXProgram:
    """The model's graph, for any batch size and length.

    Args:
        model: bound and calibrated, on the CPU.
        batch: an example: inputs [B, S] by name, at least two rows and two tokens, with padding.

    Raises:
        ExportError: for the reasons of `check_exportable`, or if the exporter could not trace the model.
    """
    check_exportable(model, runtime)
    with (
        evaluation_mode(model),
        attending(dict.fromkeys(attentions(model).values(), graph_attention(coder))),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the exporter warns about itself
        try:
            program = torch.onnx.export(
                model,
                (),
                kwargs=dict(batch),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=list(batch),
                output_names=output_names(model, batch),
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in batch},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{type(model).__name__}: could not be traced into a graph: {error}") from error
    assert program is not None
    return program


def output_names(model: nn.Module, batch: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that the model returns."""
    return [name for name, value in model(**batch).items() if isinstance(value, Tensor)]
