"""Inputs of one attention call: synthetic ones at a given sparsity, and their file format."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.config.recipe import parse_spec, spec_to_dict
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.quantizer import positive_scale
from attnpress.core.tail import Moments, Tail, fit_directions, sees_whole_score
from attnpress.kernels import ops


@dataclass(frozen=True)
class Problem:
    """One attention call to time, and its origin.

    Attributes:
        call: its query as models store it: the transpose [B, S, Hq, D] is contiguous.
        sparsity: measured, over valid pairs.
        source: "synthetic", or the run folder.
        layer: name of the module in the model; None if synthetic.
    """

    call: AttentionCall
    sparsity: float
    source: str = "synthetic"
    layer: str | None = None


def make_problem(
    length: int,
    batch: int,
    heads: int,
    head_dim: int,
    sparsity: float,
    seed: int = 0,
    spec: AttentionSpec | None = None,
) -> Problem:
    """Normal Q, K, V with absmax scales, and the cutoff that prunes `sparsity` of the pairs, fitted on sampled rows.

    `spec` gives the bits and the tail; None means 8 bits without a tail.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, length, heads, head_dim, generator=generator).transpose(1, 2) for _ in range(3)
    )
    spec, scaling = replace(spec or AttentionSpec(), sparsity=sparsity), head_dim**-0.5
    scales = Scales(
        *(
            positive_scale(x.abs().amax((0, 2, 3), keepdim=True) / each.qmax)
            for x, each in ((query, spec.q), (key, spec.k), (value, spec.v))
        )
    )
    cutoff = _fitted_cutoff(query, key, sparsity, scaling) if sparsity > 0 else None
    bare = AttentionCall(query, key, value, None, scales, cutoff, replace(spec, tail="none"), scaling)
    codes = _first_codes(bare)
    p = codes["p_codes"]
    scales = _with_tail(scales, spec, codes["q_codes"], codes["k_codes"])
    return Problem(bare.with_(spec=spec, scales=scales), 1 - int(p.count_nonzero()) / p.numel())


def _fitted_cutoff(query: Tensor, key: Tensor, sparsity: float, scaling: float) -> Tensor:
    scores = query[0, :, :: max(1, query.shape[2] // 64)] @ key[0].mT * scaling
    below = (scores.amax(-1, keepdim=True) - scores).flatten(1).sort(-1).values
    return below[:, round((1 - sparsity) * (below.shape[1] - 1))].contiguous()


def _first_codes(call: AttentionCall) -> dict[str, Tensor]:
    """The integers of the first batch element, whose pairs are all valid."""
    return ops.compiled_integers(call.with_(query=call.query[:1], key=call.key[:1], value=call.value[:1], valid=None))


def _with_tail(scales: Scales, spec: AttentionSpec, q_codes: Tensor, k_codes: Tensor) -> Scales:
    """The scales, with directions fitted to these codes if the tail needs them; the lift does not affect time."""
    if spec.tail == "none":
        return scales
    heads, dim = q_codes.shape[1], q_codes.shape[3]
    tail = Tail(torch.zeros(heads))
    if spec.tail == "linear" and not sees_whole_score(spec, dim):
        moments = Moments.none_yet(heads, dim, q_codes.device)
        moments.add(q_codes, k_codes, *(torch.ones(1, 1, x.shape[2], 1) for x in (q_codes, k_codes)))
        tail = replace(tail, directions=fit_directions(moments, spec.tail_rank))
    return replace(scales, tail=tail)


def without_tail(problem: Problem) -> Problem:
    """The same problem without a tail."""
    call = problem.call
    return replace(problem, call=call.with_(spec=replace(call.spec, tail="none")))


def save_problem(problem: Problem, file: Path) -> None:
    """Write a problem, so that every side is timed on the same inputs."""
    p = problem.call
    named = {"valid": p.valid, "q_scale": p.scales.q, "k_scale": p.scales.k, "v_scale": p.scales.v, "cutoff": p.cutoff}
    if (tail := p.scales.tail) is not None:
        named |= tail.tensors()
    stored = {"query": p.query.transpose(1, 2), "key": p.key.transpose(1, 2), "value": p.value.transpose(1, 2)}
    tensors = {name: x.detach().contiguous().clone() for name, x in {**stored, **named}.items() if x is not None}
    plain = {"sparsity": problem.sparsity, "source": problem.source, "layer": problem.layer}
    save_file(
        tensors,
        file,
        {"plain": json.dumps(plain), "scaling": repr(p.scaling), "spec": json.dumps(spec_to_dict(p.spec))},
    )


def load_problem(file: Path) -> Problem:
    """A problem from `save_problem`, with the original memory layout."""
    with safe_open(file, "pt") as opened:
        named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        metadata = opened.metadata()
    spec = parse_spec(AttentionSpec, json.loads(metadata["spec"]))
    query, key, value = (named[name].transpose(1, 2) for name in ("query", "key", "value"))
    scales = Scales(named.get("q_scale"), named.get("k_scale"), named.get("v_scale"), tail=Tail.of_tensors(named))
    scaling, plain = float(metadata["scaling"]), json.loads(metadata["plain"])
    call = AttentionCall(query, key, value, named.get("valid"), scales, named.get("cutoff"), spec, scaling)
    return Problem(call, **plain)
