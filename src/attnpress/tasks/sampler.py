"""Order of training rows: shuffled, with batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthSampler(Sampler[int]):
    """Shuffled rows in batches of similar length, which reduces padding.

    The order depends only on seed and epoch, so a resumed run sees the same batches as an uninterrupted one.

    Args:
        lengths: tokens of each row.
        batch_size: rows per training step, over all ranks.
        seed: of the shuffle.
        epoch: function that returns the current epoch. With several ranks, a data loader that skips the batches of a
            resumed run does not pass the epoch on.
    """

    POOL = 25
    """Number of batches of random rows that are sorted together."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = torch.tensor(lengths), batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        pools = torch.randperm(len(self), generator=generator).split(self.POOL * self.batch_size)
        batches = [batch for pool in pools for batch in pool[self.lengths[pool].argsort()].split(self.batch_size)]
        short = [batch for batch in batches if len(batch) < self.batch_size]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        order = torch.randperm(len(whole), generator=generator).tolist()
        # A short batch in the middle would misalign all later batches.
        yield from torch.cat([*(whole[index] for index in order), *short]).tolist()
