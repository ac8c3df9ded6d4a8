"""Work of a bound model: pair counts summed over modules, and operations of Q K^T, P V and tails."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from attnpress.core.cost import PairCounts, Work, attention_work, tail_work
from attnpress.models.attention import CompressedAttention


def summed(counts: Iterable[PairCounts]) -> PairCounts:
    """Sum of the counts of several modules."""
    return PairCounts(*(torch.stack(parts).sum(0) for parts in zip(*(each.tensors() for each in counts), strict=True)))


def pairs_work(module: CompressedAttention, count: PairCounts) -> Work:
    """Work of Q K^T and P V of a module, without its tail; counts are summed over heads."""
    pairs, survivors, spec = int(count.pairs), int(count.pairs - count.zeros), module.spec
    if spec.predictor_bits is None or (spec.sparsity == 0 and spec.threshold is None):
        return attention_work(pairs, survivors, module.head_dim, spec.bits)
    kept = int(count.pairs - count.pruned)
    return attention_work(pairs, survivors, module.head_dim, spec.bits, kept, spec.predictor_bits)


def tails_work(module: CompressedAttention, count: PairCounts) -> Work:
    """Additional work of a module's tail."""
    # In self-attention there are as many keys as rows, for each key head.
    rows, share = int(count.rows), module.kv_heads / module.heads
    survivors, sequences = int(count.pairs - count.zeros), int(count.sequences * share)
    return tail_work(rows, round(rows * share), survivors, sequences, module.spec, module.head_dim)
