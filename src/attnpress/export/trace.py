"""The exact integers of one batch, layer by layer, for whoever builds an accelerator: docs/trace.md has the layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnpress.config import AttentionSpec
from attnpress.core.attention import (
    IntegerAttention,
    Pairs,
    Scales,
    TailedScales,
    integer_attention,
    prune_and_code,
    query_scale,
    repeat_heads,
    score_step,
)
from attnpress.core.exponential import exponent_rate
from attnpress.core.tail import Directions, Tail, active_tail, score_steps, scored_codes, sum_tail, with_tail
from attnpress.export.agreement import usable_backend
from attnpress.export.errors import ExportError
from attnpress.kernels import ops
from attnpress.models.attention import Attend, CompressedAttention
from attnpress.models.binding import attentions
from attnpress.models.modes import evaluation_mode
from attnpress.recipe import parse_spec, spec_to_dict

FILE = "trace.safetensors"
FORMAT = "2"

NOTES = ("Every integer is that of the reference, core/attention.py; the layout is described in docs/trace.md.",)

Tensors = dict[str, Tensor]


def write_trace(model: nn.Module, batch: Mapping[str, Tensor], folder: Path) -> str:
    """Run one batch through the reference and write `trace.safetensors`.

    Args:
        model: bound and calibrated, on the CPU.
        batch: keyword arguments of its forward.

    Returns:
        What the integers were compared with, in words.

    Raises:
        ExportError: a matrix is not quantized, a module is called more than once, or the integers disagree.
    """
    modules = attentions(model)
    for name, module in modules.items():
        module.require_calibrated(name)
    backend = usable_backend(modules.values())
    with evaluation_mode(model), torch.no_grad():
        layers = {name: _traced(name, module, model, batch, backend) for name, module in modules.items()}
        answers = {f"model.{key}": x for key, x in model(**batch).items() if isinstance(x, Tensor)}
    tensors = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.items()}
    tensors |= {f"input.{name}": tensor for name, tensor in batch.items()} | answers
    specs = {name: spec_to_dict(module.spec) for name, module in modules.items()}
    header = {"format": FORMAT, "attention": json.dumps(specs), "layers": json.dumps(list(layers))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, header)
    check_trace(folder / FILE)
    return "the training forward" + (" and the compiled kernel" if backend == "cpu" else "") + ", bit for bit"


def check_trace(file: Path) -> None:
    """Recompute a trace from its own Q, K and V codes with the reference.

    Raises:
        ExportError: another format, or a tensor that is not what the reference gives; names the layer and the tensor.
    """
    with safe_open(file, "pt") as trace:
        header = trace.metadata() or {}
        if header.get("format") != FORMAT:
            raise ExportError(f"{file}: format {header.get('format')!r}; this version reads format {FORMAT}")
        for layer, plain in json.loads(header["attention"]).items():
            spec = parse_spec(AttentionSpec, plain)
            names = [name for name in trace.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118, not a mapping
            _check_layer(layer, spec, {name.removeprefix(f"{layer}."): trace.get_tensor(name) for name in names})


def _traced(name: str, module: CompressedAttention, model: nn.Module, batch: Mapping[str, Tensor], backend: str) -> Tensors:  # fmt: skip # noqa: E501
    """The tensors of one layer, after what runs in training and in deployment gave the same."""
    if None in module.spec.bits.values():
        raise ExportError(f"{name}: a trace of integers needs bits for all of q, k, v and p; found {module.spec.bits}")
    calls: list[Tensors] = []
    own, module.attend = module.attend, _recording(name, module.attend, backend, calls)
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        module.attend = own
    if len(calls) != 1:
        raise ExportError(f"{name}: called {len(calls)} times a batch; a trace holds modules that are called once")
    return calls[0]


def _recording(name: str, attend: Attend, backend: str, calls: list[Tensors]) -> Attend:
    def record(
        query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales, cutoff: Tensor | None,
        spec: AttentionSpec, scaling: float, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        arguments = (query, key, value, valid, scales, cutoff, spec, scaling)
        found = integer_attention(*arguments)
        trained = attend(*arguments)
        _expect(name, "output", found.output, trained)
        if backend == "cpu":
            _expect_integers(name, found, ops.compiled_integers(*arguments), valid)
        calls.append(_tensors(found, *arguments))
        return trained

    return record


def _tensors(
    found: IntegerAttention, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales,
    cutoff: Tensor | None, spec: AttentionSpec, scaling: float,
) -> Tensors:  # fmt: skip
    q_scale = query_scale(query, scales, spec.q)
    assert scales.k is not None
    assert scales.v is not None
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if valid is None else valid
    tensors = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    tensors |= {"valid": allowed.expand(query.shape[0], -1, query.shape[2], key.shape[2])}
    tensors |= {"q_scale": q_scale, "k_scale": scales.k, "v_scale": scales.v}
    tensors["alpha"] = score_step(q_scale, scales.k, scaling, query.shape[1])
    tail = active_tail(spec, TailedScales.tail_of(scales), cutoff, query)
    if tail is not None:
        tensors["tail_lift"] = tail.lift
        if tail.directions is not None:
            tensors |= {f"tail_{name}": x for name, x in vars(tail.directions).items()}
    if cutoff is not None:
        tensors["cutoff"] = cutoff
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def _expect(layer: str, name: str, expected: Tensor, found: Tensor) -> None:
    if not torch.equal(expected, found.to(expected.dtype)):
        raise ExportError(f"{layer}.{name}: not what the reference gives, so nothing was written; please report it")


def _expect_integers(layer: str, found: IntegerAttention, kernel: Mapping[str, Tensor], valid: Tensor | None) -> None:
    tailed = [name for name in kernel if name.startswith("tail_")]
    for name in ("q_codes", "row_max", "p_codes", "code_sum", "weighted", "output", *tailed):
        _expect(layer, name, getattr(found, name), kernel[name])


def _check_layer(layer: str, spec: AttentionSpec, t: Tensors) -> None:
    heads = t["q_codes"].shape[1]
    k, v = (repeat_heads(t[name], heads).double() for name in ("k_codes", "v_codes"))
    acc = (t["q_codes"].double() @ k.mT).to(torch.int32)
    pairs = prune_and_code(acc, t["valid"], t["alpha"], t.get("cutoff"), spec)
    weighted = pairs.codes.double() @ v
    numerator, divisor, tail = weighted.float(), pairs.divisor, dict[str, Tensor]()
    if "tail_lift" in t:
        numerator, divisor, tail = _tailed(t, spec, pairs, v, numerator)
    recomputed: dict[str, Any] = {
        "acc": acc, "keep": pairs.keep, "p_codes": pairs.codes.to(torch.uint8), "weighted": weighted.long(),
        "code_sum": pairs.codes.sum(-1, keepdim=True, dtype=torch.float64).long(),
        "output": (numerator * repeat_heads(t["v_scale"], heads)) / divisor, **tail,
    }  # fmt: skip
    for name, expected in recomputed.items():
        _expect(layer, name, expected, t[name])


def _tailed(
    t: Tensors, spec: AttentionSpec, pairs: Pairs, v: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Numerator and divisor of the output with the tail of a trace, and the tail's integers by name."""
    parts = [t.get(f"tail_{field.name}") for field in dataclasses.fields(Directions)]
    found = [part for part in parts if part is not None]
    tail = Tail(t["tail_lift"], Directions(*found) if len(found) == len(parts) else None)
    scored = scored_codes(t["q_codes"], t["k_codes"], spec, tail)
    rest = pairs.valid & (pairs.codes == 0)
    sums = sum_tail(rest, pairs.distance, v, scored, exponent_rate(t["alpha"]), tail.lift, spec.p.qmax)
    made = with_tail(weighted, pairs.divisor, sums, score_steps(t["alpha"], tail, v.shape[1]))
    named = {
        "tail_count": sums.count.int(), "tail_distance": sums.distance.long(), "tail_exponent": sums.exponent,
        "tail_level": sums.level, "tail_value": sums.value.long(),
    }  # fmt: skip
    if sums.score is not None and sums.slope is not None:
        named |= {"tail_score": sums.score.long(), "tail_slope": sums.slope.long()}
    return *made, named
