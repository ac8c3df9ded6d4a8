"""Counts of pairs and work: sparsity by its four names, multiply-accumulates, bit operations, bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.arguments import four_dims

TILE_ROWS, TILE_KEYS = 16, 64
FLOAT_BITS = 32


@dataclass
class PairCounts:
    """Running counts of one attention module; float64 [H] holding integers, so sums over ranks are exact.

    Attributes:
        pairs: valid pairs (query and key are real tokens and the mask allows them).
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
        """Counts summed over heads; [1] each."""
        return PairCounts(*(count.sum(0, keepdim=True) for count in self.tensors()))

    def sparsity(self) -> Tensor:
        """Fraction of valid pairs whose P code is zero: the headline figure (numerics, section 5)."""
        return self.zeros / self.pairs.clamp(min=1)

    def pruned_fraction(self) -> Tensor:
        """Fraction of valid pairs removed by the rule."""
        return self.pruned / self.pairs.clamp(min=1)

    def padded_sparsity(self, length: int) -> Tensor:
        """Fraction of zeros if every sequence were padded to `length`, counting padding. Never quote it alone."""
        return 1 - (self.pairs - self.zeros) / (self.sequences * length**2).clamp(min=1)

    def tile_sparsity(self) -> Tensor:
        """Fraction of tiles without a survivor."""
        return self.empty_tiles / self.tiles.clamp(min=1)

    def keys_per_row(self) -> Tensor:
        """Mean number of surviving keys of a real query row."""
        return (self.pairs - self.zeros) / self.rows.clamp(min=1)


def count_pairs(codes: Tensor, pruned: Tensor | None, valid: Tensor) -> PairCounts:
    """Counts of one batch.

    Args:
        codes: P codes, not negative, [B, H, Sq, Sk].
        pruned: positive (or True) where the rule removes a pair, same shape; None removes none.
        valid: bool, broadcastable to [B, H, Sq, Sk].
    """
    batch, heads, rows, keys = codes.shape
    counted = four_dims(valid).expand(batch, -1, rows, keys).float()
    allowed, survivors = _strips(counted), _strips(codes.sign() * counted)
    pairs, tiles, occupied = _per_head(allowed), _tiles(allowed), _tiles(survivors)
    counts = (
        pairs,
        pairs - _per_head(survivors),
        pairs.new_zeros(1) if pruned is None else _per_head(_strips(pruned.sign() * counted)),
        _per_head(allowed.sum(-1, keepdim=True) > 0),
        _per_head(tiles),
        _per_head(tiles & ~occupied),
        pairs.new_full((1,), float(batch)),
    )
    return PairCounts(*(count.expand(heads) for count in counts))


def _per_head(counts: Tensor) -> Tensor:
    return counts.sum((0, 2, 3), dtype=torch.float64)


def _strips(mask: Tensor) -> Tensor:
    """Number of pairs of each row in each tile: float32 [.., Sq, tiles]. A product, since reducing bool is slow."""
    keys = torch.arange(mask.shape[-1], device=mask.device)
    tiles = torch.arange(-(-len(keys) // TILE_KEYS), device=mask.device)
    return mask @ (keys.unsqueeze(1) // TILE_KEYS == tiles).float()


def _tiles(strips: Tensor) -> Tensor:
    padded = F.pad(strips, (0, 0, 0, -strips.shape[-2] % TILE_ROWS))
    occupied: Tensor = padded.unflatten(-2, (-1, TILE_ROWS)).sum(-2) > 0
    return occupied


@dataclass(frozen=True)
class Work:
    """Work of Q K^T and P V over valid pairs, dense and remaining; the latter includes the tail (`tail_work`).

    Attributes:
        macs_dense, macs_remaining: multiply-accumulates; a pruned pair is skipped in P V, but its score is computed,
            exactly or predicted.
        bit_operations_dense, bit_operations_remaining: each MAC weighted by the product of its operands' bits.
        bytes_dense, bytes_remaining: P alone, at its own bits; survivors with a 16-bit index each.
    """

    macs_dense: int
    macs_remaining: int
    bit_operations_dense: int
    bit_operations_remaining: int
    bytes_dense: int
    bytes_remaining: int


def total_work(parts: Iterable[Work]) -> Work:
    """Sum of the work of several attention modules."""
    listed = list(parts)
    return Work(*(sum(getattr(part, field.name) for part in listed) for field in fields(Work)))


def attention_work(
    pairs: int,
    survivors: int,
    head_dim: int,
    bits: dict[str, int | None],
    kept: int | None = None,
    predictor_bits: int | None = None,
) -> Work:
    """Work of attention over `pairs` valid pairs of which `survivors` have a nonzero code.

    Args:
        bits: of q, k, v and p; None counts as 32.
        kept: with a predicted mask, pairs whose exact scores are computed; None is all of them.
        predictor_bits: of the predicting product over all pairs; matrices with fewer bits are used as they are.
    """
    wide = {name: FLOAT_BITS if value is None else value for name, value in bits.items()}
    dense, skipped = pairs * head_dim, survivors * head_dim
    foretold = 0 if predictor_bits is None else dense
    scored = dense if kept is None else kept * head_dim
    narrow = [min(wide[name], predictor_bits or 0) for name in ("q", "k")]
    sparse_bytes = survivors * (wide["p"] + 16) // 8
    return Work(
        macs_dense=2 * dense,
        macs_remaining=foretold + scored + skipped,
        bit_operations_dense=2 * dense * FLOAT_BITS**2,
        bit_operations_remaining=foretold * narrow[0] * narrow[1]
        + scored * wide["q"] * wide["k"]
        + skipped * wide["p"] * wide["v"],
        bytes_dense=pairs * FLOAT_BITS // 8,
        bytes_remaining=min(sparse_bytes, pairs * wide["p"] // 8),
    )


SUM_BITS, DIRECTION_BITS, PROJECTED_BITS = 32, 16, 8
"""Operand widths of the tail: sums, directions, and codes of projections."""


def tail_work(rows: int, keys: int, survivors: int, sequences: int, spec: AttentionSpec, head_dim: int) -> Work:
    """Additional remaining work of the tail, with an addition counted as a multiply-accumulate; its dense work is zero.

    Each key is added to the sums of K and V; with `linear` it is also projected and added to the product of projections
    and V. Each row multiplies with these sums. Each survivor is subtracted again. Bytes are those of the level of each
    row, and of the sums.

    Args:
        rows, keys, survivors: of all query heads; keys of all key heads.
        sequences: times key heads.
    """
    bits = {name: FLOAT_BITS if value is None else value for name, value in spec.bits.items()}
    if spec.tail == "none" or (spec.sparsity == 0 and spec.threshold is None):
        return Work(0, 0, 0, 0, 0, 0)
    # Kind of work: number of vectors of D, and the bits of both operands.
    kinds = [(keys, bits["k"]), (keys, bits["v"]), (survivors, bits["v"])]
    kinds += [(rows, bits["q"] * SUM_BITS), (rows, FLOAT_BITS**2)]
    rank = 0 if spec.tail == "mean" else min(spec.tail_rank, head_dim)
    if rank:
        kinds += [(keys * rank, PROJECTED_BITS * bits["v"]), (rows * rank, PROJECTED_BITS * SUM_BITS)]
        kinds += [(survivors, DIRECTION_BITS * bits["v"])]
    if 0 < rank < head_dim:
        kinds += [(keys * rank, DIRECTION_BITS * bits["k"]), (rows * rank, DIRECTION_BITS * bits["q"])]
    return Work(
        0,
        sum(count for count, _ in kinds) * head_dim,
        0,
        sum(count * width for count, width in kinds) * head_dim,
        0,
        rows * FLOAT_BITS // 8 + sequences * (2 + rank) * head_dim * SUM_BITS // 8,
    )
