"""Counting pairs and work: sparsity by its four names, multiply-accumulates, bit operations, bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS, TILE_KEYS = 16, 64
FLOAT_BITS = 32


@dataclass
class PairCounts:
    """Running counts of one attention module; float64 [H], whole numbers, so that sums over ranks are exact.

    Attributes:
        pairs: valid pairs (query and key real tokens, mask allows).
        zeros: valid pairs whose P code is zero.
        pruned: valid pairs removed by the rule.
        rows: real query rows.
        tiles, empty_tiles: 16 x 64 tiles with a valid pair, and those among them without a survivor.
        sequences: sequences seen (the same number for each head).
    """

    pairs: Tensor
    zeros: Tensor
    pruned: Tensor
    rows: Tensor
    tiles: Tensor
    empty_tiles: Tensor
    sequences: Tensor

    @classmethod
    def none_yet(cls, heads: int) -> PairCounts:
        """All counts zero."""
        return cls(*(torch.zeros(heads, dtype=torch.float64) for _ in fields(cls)))

    def tensors(self) -> list[Tensor]:
        """The counts in declaration order."""
        return [getattr(self, field.name) for field in fields(self)]

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(*(a.to(b.device) + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def total(self) -> PairCounts:
        """Summed over heads; [1] each."""
        return PairCounts(*(count.sum(0, keepdim=True) for count in self.tensors()))

    def sparsity(self) -> Tensor:
        """Fraction of valid pairs whose P code is zero: the headline figure (numerics, section 5)."""
        return self.zeros / self.pairs.clamp(min=1)

    def pruned_fraction(self) -> Tensor:
        """Fraction of valid pairs removed by the rule."""
        return self.pruned / self.pairs.clamp(min=1)

    def padded_sparsity(self, length: int) -> Tensor:
        """Fraction of zeros if every sequence were padded to `length`, padding counted. Never quote it alone."""
        return 1 - (self.pairs - self.zeros) / (self.sequences * length**2).clamp(min=1)

    def tile_sparsity(self) -> Tensor:
        """Fraction of tiles without a survivor."""
        return self.empty_tiles / self.tiles.clamp(min=1)

    def keys_per_row(self) -> Tensor:
        """Mean number of surviving keys of a real query row."""
        return (self.pairs - self.zeros) / self.rows.clamp(min=1)


def count_pairs(codes: Tensor, keep: Tensor, valid: Tensor) -> PairCounts:
    """Counts of one batch.

    Args:
        codes: P codes [B, H, Sq, Sk]; keep, valid: bool, same shape.
    """
    survivor = (codes != 0) & valid
    occupied, tiles = _tiles(survivor), _tiles(valid)
    sequences = torch.full((codes.shape[1],), float(len(codes)), dtype=torch.float64, device=codes.device)
    return PairCounts(
        pairs=_per_head(valid),
        zeros=_per_head(valid & ~survivor),
        pruned=_per_head(valid & ~keep),
        rows=_per_head(valid.any(-1, keepdim=True)),
        tiles=_per_head(tiles),
        empty_tiles=_per_head(tiles & ~occupied),
        sequences=sequences,
    )


def _per_head(mask: Tensor) -> Tensor:
    counts: Tensor = mask.sum((0, 2, 3)).double()
    return counts


def _tiles(mask: Tensor) -> Tensor:
    rows, keys = mask.shape[-2:]
    padded = F.pad(mask, (0, -keys % TILE_KEYS, 0, -rows % TILE_ROWS))
    tiled = padded.unflatten(-1, (-1, TILE_KEYS)).unflatten(-3, (-1, TILE_ROWS))
    occupied: Tensor = tiled.any(-1).any(-2)
    return occupied


@dataclass(frozen=True)
class Work:
    """Work of Q K^T and P V over valid pairs, dense and remaining.

    Attributes:
        macs_dense, macs_remaining: multiply-accumulates; a pruned pair is skipped in P V, but its score was needed.
        bit_operations_dense, bit_operations_remaining: each MAC weighted by the product of its operands' bits.
        bytes_dense, bytes_remaining: P alone, at its own bits, survivors with a 16-bit index each.
    """

    macs_dense: int
    macs_remaining: int
    bit_operations_dense: int
    bit_operations_remaining: int
    bytes_dense: int
    bytes_remaining: int


def total_work(parts: Iterable[Work]) -> Work:
    """The work of several attention modules together."""
    listed = list(parts)
    return Work(*(sum(getattr(part, field.name) for part in listed) for field in fields(Work)))


def attention_work(pairs: int, survivors: int, head_dim: int, bits: dict[str, int | None]) -> Work:
    """Work of attention over `pairs` valid pairs of which `survivors` have a nonzero code.

    Args:
        bits: of q, k, v and p; None counts as 32.
    """
    wide = {name: FLOAT_BITS if value is None else value for name, value in bits.items()}
    dense, skipped = pairs * head_dim, survivors * head_dim
    sparse_bytes = survivors * (wide["p"] + 16) // 8
    return Work(
        macs_dense=2 * dense,
        macs_remaining=dense + skipped,
        bit_operations_dense=2 * dense * FLOAT_BITS**2,
        bit_operations_remaining=dense * wide["q"] * wide["k"] + skipped * wide["p"] * wide["v"],
        bytes_dense=pairs * FLOAT_BITS // 8,
        bytes_remaining=min(sparse_bytes, pairs * wide["p"] // 8),
    )
