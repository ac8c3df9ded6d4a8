"""Pairs of one row or many, drawn for tests of rules and thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.attention import Pairs, prune_and_code
from tests.core.factories import generator, make_cutoff, make_mask

SPARSITIES = st.floats(0.01, 0.99)


def make_pairs(
    spec: AttentionSpec, seed: int, shape: Sequence[int], mask: str = "pairs", levels: int = 12, alpha: float = 0.3
) -> Pairs:
    """Pairs of random integer scores; few levels make many ties."""
    batch, heads, rows, keys = shape
    acc = torch.randint(0, levels, (batch, heads, rows, keys), generator=generator(seed)).float()
    valid = make_mask(mask, seed + 1, batch, heads, rows, keys)
    return prune_and_code(acc, valid, torch.tensor(alpha).view(1, 1, 1, 1), make_cutoff(spec, heads, seed + 2), spec)


def kept_of(keep: Tensor) -> list[set[int]]:
    return [{i for i, kept in enumerate(row) if kept} for row in keep.flatten(0, 2).tolist()]
