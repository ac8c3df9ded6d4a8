"""Inputs of one attention call: what they are, synthetic ones of a stated sparsity, and their file."""

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
from attnpress.core.attention import Scales, TailedScales
from attnpress.core.quantizer import positive_scale
from attnpress.core.tail import Moments, Tail, fit_directions, sees_whole_score
from attnpress.kernels import ops


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention call, and where they are from.

    Attributes:
        query: float [B, Hq, S, D], as models store it: its transpose [B, S, Hq, D] is contiguous.
        key, value: [B, Hkv, S, D].
        valid: bool [B or 1, 1 or Hq, 1 or S, S], or None if every query may attend to every key.
        scales, cutoff, spec, scaling: see `kernels.ops.attention`.
        sparsity: measured, over valid pairs.
        source: "synthetic", or the run folder.
        layer: name of the module in the model; None if synthetic.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    scales: Scales
    cutoff: Tensor | None
    spec: AttentionSpec
    scaling: float
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
    """Normal Q, K, V with absmax scales, and the cutoff that prunes `sparsity` of the pairs, on a sample of rows.

    `spec` gives the bits and the tail: 8 everywhere and none if None.
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
    bare = Problem(query, key, value, None, scales, cutoff, replace(spec, tail="none"), scaling, sparsity)
    codes = _first_codes(bare)
    p = codes["p_codes"]
    scales = _with_tail(scales, spec, codes["q_codes"], codes["k_codes"])
    return replace(bare, spec=spec, scales=scales, sparsity=1 - int(p.count_nonzero()) / p.numel())


def _fitted_cutoff(query: Tensor, key: Tensor, sparsity: float, scaling: float) -> Tensor:
    scores = query[0, :, :: max(1, query.shape[2] // 64)] @ key[0].mT * scaling
    below = (scores.amax(-1, keepdim=True) - scores).flatten(1).sort(-1).values
    return below[:, round((1 - sparsity) * (below.shape[1] - 1))].contiguous()


def _first_codes(problem: Problem) -> dict[str, Tensor]:
    """The integers of the first batch element, in which all pairs are valid."""
    p = problem
    return ops.compiled_integers(p.query[:1], p.key[:1], p.value[:1], None, p.scales, p.cutoff, p.spec, p.scaling)


def _with_tail(scales: Scales, spec: AttentionSpec, q_codes: Tensor, k_codes: Tensor) -> Scales:
    """The scales with directions fitted to these codes where the tail wants them; its lift, which is free, is 0."""
    if spec.tail == "none":
        return scales
    heads, dim = q_codes.shape[1], q_codes.shape[3]
    tail = Tail(torch.zeros(heads))
    if spec.tail == "linear" and not sees_whole_score(spec, dim):
        moments = Moments.none_yet(heads, dim, q_codes.device)
        moments.add(q_codes, k_codes, *(torch.ones(1, 1, x.shape[2], 1) for x in (q_codes, k_codes)))
        tail = replace(tail, directions=fit_directions(moments, spec.tail_rank))
    return TailedScales(scales.q, scales.k, scales.v, tail)


def without_tail(problem: Problem) -> Problem:
    """The same problem, whose rows have no tail."""
    return replace(problem, spec=replace(problem.spec, tail="none"))


def save_problem(problem: Problem, file: Path) -> None:
    """Write a problem, so that every side is timed on the same inputs."""
    p = problem
    named = {"valid": p.valid, "q_scale": p.scales.q, "k_scale": p.scales.k, "v_scale": p.scales.v, "cutoff": p.cutoff}
    if (tail := TailedScales.tail_of(p.scales)) is not None:
        named |= tail.tensors()
    stored = {"query": p.query.transpose(1, 2), "key": p.key.transpose(1, 2), "value": p.value.transpose(1, 2)}
    tensors = {name: x.detach().contiguous().clone() for name, x in {**stored, **named}.items() if x is not None}
    plain = {"scaling": p.scaling, "sparsity": p.sparsity, "source": p.source, "layer": p.layer}
    save_file(tensors, file, {"plain": json.dumps(plain), "spec": json.dumps(spec_to_dict(p.spec))})


def load_problem(file: Path) -> Problem:
    """A problem from `save_problem`, laid out in memory as it was."""
    with safe_open(file, "pt") as opened:
        named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        metadata = opened.metadata()
    spec = parse_spec(AttentionSpec, json.loads(metadata["spec"]))
    query, key, value = (named[name].transpose(1, 2) for name in ("query", "key", "value"))
    scales = Scales(named.get("q_scale"), named.get("k_scale"), named.get("v_scale"))
    if (tail := Tail.of_tensors(named)) is not None:
        scales = TailedScales(scales.q, scales.k, scales.v, tail)
    plain = json.loads(metadata["plain"])
    return Problem(query, key, value, named.get("valid"), scales, named.get("cutoff"), spec, **plain)
