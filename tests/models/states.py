"""A state of compressed attention, and tensors for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpress.config import AttentionSpec, RuleName
from attnpress.core.cost import PairCounts
from attnpress.models.attention import CompressedAttention
from attnpress.models.watchers import Counting, Fitting, Observing, watched

RULES: tuple[RuleName, ...] = ("relative", "threshold", "topk", "mass", "nm")


HEADS, KV_HEADS, DIM = 4, 2, 8


HALF = AttentionSpec(sparsity=0.5)


def make_state(spec: AttentionSpec = HALF) -> CompressedAttention:
    return CompressedAttention(spec, HEADS, KV_HEADS, DIM)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(seed: int = 0, lengths: Sequence[int] = (11, 6)) -> Inputs:
    """Query, key, value, valid pairs and real rows of a padded batch."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(lengths), max(lengths)
    query, key, value = (
        2 * torch.randn(batch, heads, length, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    real = torch.arange(length) < torch.tensor(lengths).view(-1, 1)
    valid = real.view(batch, 1, 1, length).expand(batch, 1, length, length)
    return query, key, value, valid, real.view(batch, 1, length, 1)


def calibrated(spec: AttentionSpec, inputs: Inputs) -> CompressedAttention:
    """A state with scales and thresholds from these inputs."""
    state = make_state(spec)
    observing = Observing(state)
    observing.see(state, state.call(*inputs, DIM**-0.5))
    with torch.no_grad():
        for name, observer in observing.observers.items():
            getattr(state, f"{name}_scale").copy_(observer.scale())
    watch(state, inputs, slice(None))
    state.take_seen(0.0)
    state.set_sparsity(spec.sparsity)
    return state


def watch(state: CompressedAttention, inputs: Inputs, rows: slice) -> None:
    with watched([(state, Fitting(rows))]):
        state(state.call(*inputs, DIM**-0.5))


def call(state: CompressedAttention, inputs: Inputs, dropout: float = 0.0) -> Tensor:
    output: Tensor = state(state.call(*inputs, DIM**-0.5, dropout))
    return output


def counts_of(state: CompressedAttention, inputs: Inputs) -> PairCounts:
    counting = Counting(state)
    with watched([(state, counting)]):
        call(state, inputs)
    return counting.counts
