"""Record the exact integers of one batch, layer by layer, verified against training and deployment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnpress.config import AttentionSpec
from attnpress.core.arguments import pair_mask
from attnpress.core.attention import (
    IntegerAttention,
    Pairs,
    integer_attention,
    prune_and_code,
    query_scale,
    repeat_heads,
    score_step,
)
from attnpress.core.call import Attend, AttentionCall
from attnpress.core.exponential import exponent_rate
from attnpress.core.predictor import foretold_scores
from attnpress.core.rules import rule_of
from attnpress.core.sparse_rows import csr_of
from attnpress.core.tail import Tail, active_tail, score_steps, scored_codes, sum_tail, weighted_values, with_tail
from attnpress.export.agreement import usable_backend
from attnpress.export.errors import ExportError
from attnpress.kernels import ops
from attnpress.models.binding import attending, attentions
from attnpress.models.modes import evaluation_mode

Tensors = dict[str, Tensor]

CODES = ("q_codes", "k_codes", "v_codes")
GIVEN = (*CODES, "valid", "alpha", "v_scale")
"""Tensors that determine all others, with thresholds and the tail's parameters if there are any."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One batch.

    Attributes:
        layers: by name of the module, the tensors listed in docs/trace.md.
        calls: by name, the module's inputs: query, key and value in floating point, mask, scales, thresholds.
        answers: outputs of the model, by name.
        compared: what the integers were compared with, in words.
    """

    layers: dict[str, Tensors]
    calls: dict[str, AttentionCall]
    answers: Tensors
    compared: str


def record_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Recorded:
    """Pass one batch through the model and record the integers of its attention.

    Args:
        model: bound and calibrated, on the CPU.
        batch: keyword arguments of its forward.

    Raises:
        ExportError: a matrix is not quantized, a module is called more than once, or integers differ.
    """
    modules = attentions(model)
    for name, module in modules.items():
        module.require_calibrated(name)
        if None in module.spec.bits.values():
            raise ExportError(
                f"{name}: a trace of integers needs bits for all of q, k, v and p; found {module.spec.bits}"
            )
    backend = usable_backend(modules.values())
    calls: dict[str, list[tuple[Tensors, AttentionCall]]] = {name: [] for name in modules}
    recorders = {module: _recorder(name, module.attend, calls[name], backend) for name, module in modules.items()}
    with evaluation_mode(model), torch.no_grad(), attending(recorders):
        answers = {key: x for key, x in model(**batch).items() if isinstance(x, Tensor)}
    for name, found in calls.items():
        if len(found) != 1:
            raise ExportError(f"{name}: called {len(found)} times a batch; a trace holds modules that are called once")
    compared = "the training forward" + (" and the compiled kernel" if backend == "cpu" else "") + ", bit for bit"
    layers, given = ({name: found[0][part] for name, found in calls.items()} for part in (0, 1))
    return Recorded(layers, given, answers, compared)  # type: ignore[arg-type]


def _recorder(name: str, attend: Attend, calls: list[tuple[Tensors, AttentionCall]], backend: str) -> Attend:
    """`attend`, with each call verified and recorded."""

    def record(call: AttentionCall) -> Tensor:
        found, trained = integer_attention(call), attend(call)
        _expect(name, "output", found.output, trained)
        if backend == "cpu":
            kernel = ops.compiled_integers(call)
            tailed = [part for part in kernel if part.startswith("tail_")]
            for part in ("q_codes", "row_max", "p_codes", "code_sum", "weighted", "output", *tailed):
                _expect(name, part, getattr(found, part), kernel[part])
        calls.append((_tensors(name, found, call), call))
        return trained

    return record


def _tensors(name: str, found: IntegerAttention, call: AttentionCall) -> Tensors:
    query, key, scales, cutoff, spec = call.query, call.key, call.scales, call.cutoff, call.spec
    q_scale = query_scale(query, scales, spec.q)
    assert scales.k is not None
    assert scales.v is not None
    allowed = pair_mask(call.valid, query, key)
    pairs = torch.ones(1, 1, 1, 1, dtype=torch.bool) if allowed is None else allowed
    pairs = (pairs if call.real is None else pairs & call.real).expand(query.shape[0], -1, query.shape[2], key.shape[2])
    tensors: Tensors = {
        "q_codes": found.q_codes,
        "k_codes": found.k_codes,
        "v_codes": found.v_codes,
        "valid": pairs,
        "q_scale": q_scale,
        "k_scale": scales.k,
        "v_scale": scales.v,
        "alpha": score_step(q_scale, scales.k, call.scaling, query.shape[1]),
    }
    tail = active_tail(spec, scales.tail, cutoff, query)
    if tail is not None:
        tensors |= tail.tensors()
    if cutoff is not None:
        tensors["cutoff"] = cutoff
    tensors |= derived(tensors, spec)
    rows = pairs.any(-1).expand(-1, query.shape[1], -1)
    for field in dataclasses.fields(found):  # rows of padding are empty here; elsewhere both must agree
        if field.name not in CODES:
            _expect(name, field.name, getattr(found, field.name)[rows], tensors[field.name][rows])
    return {part: tensor.detach().clone() for part, tensor in tensors.items()}


def derived(t: Mapping[str, Tensor], spec: AttentionSpec) -> Tensors:
    """Everything that follows from a layer's codes, scales, thresholds and valid pairs, computed by the reference.

    Args:
        t: q_codes, k_codes, v_codes, valid, alpha, v_scale, and if present cutoff and the tail's parameters.
    """
    heads = t["q_codes"].shape[1]
    k, v = (repeat_heads(t[name], heads).double() for name in ("k_codes", "v_codes"))
    acc = (t["q_codes"].double() @ k.mT).to(torch.int32)
    foretold = foretold_scores(t["q_codes"], repeat_heads(t["k_codes"], heads), spec)
    pairs = prune_and_code(acc, t["valid"], t["alpha"], t.get("cutoff"), spec, foretold)
    weighted = pairs.codes.double() @ v
    numerator, divisor, tail = weighted.float(), pairs.divisor, Tensors()
    if (fitted := Tail.of_tensors(t)) is not None:
        numerator, divisor, tail = _tailed(t, fitted, spec, pairs, v, numerator)
    codes = pairs.codes.to(torch.uint8)
    cut = rule_of(spec).integer_cut(pairs.scored)
    return {
        "acc": acc,
        **({} if foretold is None else {"foretold": foretold.int()}),
        "row_max": pairs.row_max,
        "keep": pairs.keep,
        "p_codes": codes,
        "code_sum": pairs.codes.sum(-1, keepdim=True, dtype=torch.float64).long(),
        "weighted": weighted.long(),
        "output": (numerator * repeat_heads(t["v_scale"], heads)) / divisor,
        **tail,
        "survivors": (codes > 0).sum(-1, keepdim=True, dtype=torch.int32),
        **({} if cut is None else {"cut": cut}),
        "lengths": _lengths(pairs.valid, -1),
        "key_lengths": _lengths(pairs.valid, -2),
        **csr_of(codes),
    }


def _lengths(valid: Tensor, over: int) -> Tensor:
    """Real tokens of each sequence: rows (or columns) of a mask with a valid pair; int32 [B]."""
    return valid.any(over).any(1).sum(-1, dtype=torch.int32)


def _tailed(
    t: Mapping[str, Tensor], tail: Tail, spec: AttentionSpec, pairs: Pairs, v: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    """Numerator and divisor of the output with the tail of a trace, and the tail's integers by name."""
    scored = scored_codes(t["q_codes"], t["k_codes"], spec, tail)
    rest = pairs.valid & (pairs.codes == 0)
    sums = sum_tail(rest, pairs.distance, v, scored, exponent_rate(t["alpha"]), tail.lift, spec.p.qmax)
    values = weighted_values(sums, score_steps(t["alpha"], tail, v.shape[1]))
    made = with_tail(weighted, pairs.divisor, sums, values)
    return *made, sums.integers()


def _expect(layer: str, name: str, expected: Tensor, found: Tensor) -> None:
    if not torch.equal(expected, found.to(expected.dtype)):
        raise ExportError(f"{layer}.{name}: not what the reference gives, so nothing was written; please report it")


def check_layer(layer: str, t: Mapping[str, Tensor], spec: AttentionSpec, names: set[str] | None = None) -> None:
    """Recompute a recorded layer from its own codes.

    Args:
        names: tensors to compare; None compares all that follow from the codes.

    Raises:
        ExportError: a tensor is missing, or differs from the reference.
    """
    lacking = [name for name in GIVEN if name not in t]
    if lacking:
        raise ExportError(f"{layer}: {', '.join(lacking)} missing; export the trace again")
    for name, expected in derived(t, spec).items():
        if names is not None and name not in names and not name.startswith("tail_"):
            continue
        if name not in t:
            raise ExportError(f"{layer}.{name}: missing; export the trace again")
        if t[name].shape != expected.shape:
            raise ExportError(f"{layer}.{name}: shape {[*t[name].shape]}, the reference gives {[*expected.shape]}")
        _expect(layer, name, expected, t[name])
