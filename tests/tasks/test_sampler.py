"""The order of training rows: complete, repeatable, and with little padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnpress.tasks.sampler import LengthSampler


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 9), st.integers(0, 3))
def test_batches_of_similar_length_hold_every_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    order = list(LengthSampler(lengths, size, seed, lambda: epoch))
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(LengthSampler(lengths, size, seed, lambda: epoch))


def test_the_order_changes_with_epoch_and_seed_and_saves_padding() -> None:
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        return list(LengthSampler(lengths, 10, seed, lambda: epoch))

    def padded(rows: Sequence[int]) -> int:
        return sum(10 * max(lengths[row] for row in rows[first : first + 10]) for first in range(0, 1000, 10))

    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert padded(order(0, 0)) < 1.1 * sum(lengths) < 0.7 * padded(range(1000))
