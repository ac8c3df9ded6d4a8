"""`--to accelforge`: attention as a workload of AccelForge, with the survivors of each layer.

AccelForge 1.0 has no sparse tensors, so pruning is expressed by the sizes of ranks: P V runs over R keys per query, R
the mean number of survivors, as if all rows of a head kept the same keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from attnpress.config import AttentionSpec
from attnpress.export.errors import ExportError
from attnpress.export.sequences import AttendedSequence, by_layer
from attnpress.files import write_text

FILE = "attention.yaml"

NOTES = (
    "KEPT is the mean number of survivors of a row, rounded up, by layer; load the workload with KEPT=N_TOKENS for the "
    "dense case, or LAYER=2 for another layer. N_TOKENS squared is the mean number of pairs of a sequence.",
    "AccelForge 1.0 has no sparse tensors: rows of a head are taken to keep the same keys, so traffic of V is a lower "
    "bound. It needs Python 3.12.",
)

WORKLOAD = """# Attention of {layers} layers, as measured on {sequences} sequences.
# Density of P (survivors over valid pairs), layer by layer: {densities}
{{% set LAYER = LAYER | default(0) %}}
{{% set N_TOKENS = N_TOKENS | default({tokens}) %}}
{{% set BATCH_SIZE = BATCH_SIZE | default(1) %}}
{{% set KEPT = KEPT | default({kept}[LAYER]) %}}

workload:
  rank_sizes:
    B: {{{{BATCH_SIZE}}}}
    H: {heads}
    M: {{{{N_TOKENS}}}}
    P: {{{{N_TOKENS}}}}
    R: {{{{KEPT}}}}
    E: {dim}
    F: {dim}

  bits_per_value: {{Q: {q}, K: {k}, V: {v}, S: 32, A: {p}, O: 8}}

  einsums:
  - einsum: "S[b, h, m, p] = Q[b, h, m, e] * K[b, h, p, e]"
    renames: {{input: Q, weight: K, output: S}}
  - einsum: "O[b, h, m, f] = A[b, h, m, r] * V[b, h, r, f]"
    renames: {{input: A, weight: V, output: O}}
"""


def write_accelforge(
    sequences: Iterable[AttendedSequence], specs: Mapping[str, AttentionSpec], folder: Path
) -> dict[str, object]:
    """Write `attention.yaml`.

    Args:
        specs: of each layer, by name.

    Returns:
        tokens, and kept by layer.

    Raises:
        ExportError: layers differ in heads or bits, which one workload cannot express.
    """
    layers = by_layer(sequences)
    shapes = {(found[0].codes.shape[0], found[0].v_codes.shape[-1]) for found in layers.values()}
    bits = {tuple(specs[name].bits.items()) for name in layers}
    if len(shapes) > 1 or len(bits) > 1:
        raise ExportError("layers differ in heads or bits, which one AccelForge workload cannot say; use --to scalesim")
    (heads, dim), widths = shapes.pop(), dict(bits.pop())
    found = next(iter(layers.values()))
    tokens = round(math.sqrt(sum(one.codes.shape[1] * one.codes.shape[2] for one in found) / len(found)))
    kept = [_kept(layer) for layer in layers.values()]
    densities = ", ".join(f"{_density(layer):.4f}" for layer in layers.values())
    text = WORKLOAD.format(
        layers=len(layers),
        sequences=len(found),
        densities=densities,
        tokens=tokens,
        kept=kept,
        heads=heads,
        dim=dim,
        **widths,
    )
    write_text(folder / FILE, text)
    return {"tokens": tokens, "kept": kept}


def _kept(layer: Sequence[AttendedSequence]) -> int:
    """Mean number of survivors per row, rounded up."""
    return max(
        1, -(-sum(int(one.survivors.sum()) for one in layer) // max(1, sum(one.survivors.numel() for one in layer)))
    )


def _density(layer: Sequence[AttendedSequence]) -> float:
    return sum(int(one.survivors.sum()) for one in layer) / max(1, sum(int(one.pairs.sum()) for one in layer))
