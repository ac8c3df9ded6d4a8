"""Counts against brute force, and work against its formulas."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, fields
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.cost import TILE_KEYS, TILE_ROWS, PairCounts, attention_work, count_pairs, tail_work, total_work
from tests.core.factories import SEEDS, generator

Batch = tuple[Tensor, Tensor, Tensor]


def make_batch(seed: int, batch: int = 2, heads: int = 3, rows: int = 5, keys: int = 7, density: float = 0.6) -> Batch:
    """Codes, what is pruned, and mask of valid pairs; codes are zero where pruned, and sometimes elsewhere."""
    shape = (batch, heads, rows, keys)
    draws = [torch.rand(shape, generator=generator(seed + i)) for i in range(3)]
    valid, keep = draws[0] < 0.8, draws[1] < density
    codes = torch.randint(0, 4, shape, generator=generator(seed + 3)) * keep
    return codes.float(), ~keep, valid


def brute_force(codes: Tensor, pruned: Tensor, valid: Tensor) -> dict[str, list[float]]:
    """Every count, pair by pair and tile by tile."""
    batch, heads, rows, keys = codes.shape
    found = {field.name: [0.0] * heads for field in fields(PairCounts)}
    for b, h in product(range(batch), range(heads)):
        tiles: dict[tuple[int, int], bool] = {}
        found["sequences"][h] += 1
        for i in range(rows):
            allowed = [j for j in range(keys) if valid[b, h, i, j]]
            found["rows"][h] += bool(allowed)
            for j in allowed:
                survives, tile = bool(codes[b, h, i, j] != 0), (i // TILE_ROWS, j // TILE_KEYS)
                found["pairs"][h] += 1
                found["zeros"][h] += not survives
                found["pruned"][h] += bool(pruned[b, h, i, j])
                tiles[tile] = tiles.get(tile, False) or survives
        found["tiles"][h] += len(tiles)
        found["empty_tiles"][h] += sum(not survives for survives in tiles.values())
    return found


def as_lists(counts: PairCounts) -> dict[str, list[float]]:
    return {name: count.tolist() for name, count in vars(counts).items()}


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 35), st.integers(1, 12), st.sampled_from([0.0, 0.02, 0.6, 1.0]))
def test_counts_are_those_of_brute_force(seed: int, rows: int, keys: int, density: float) -> None:
    batch = make_batch(seed, rows=rows, keys=keys, density=density)
    assert as_lists(count_pairs(*batch)) == brute_force(*batch)


@pytest.mark.parametrize(("rows", "keys"), [(16, 64), (17, 65), (15, 130)])
def test_tiles_of_sixteen_by_sixty_four_are_counted_at_the_edges_too(rows: int, keys: int) -> None:
    batch = make_batch(1, batch=1, heads=1, rows=rows, keys=keys, density=0.001)
    assert as_lists(count_pairs(*batch)) == brute_force(*batch)


def test_a_tile_counts_only_where_it_has_a_valid_pair() -> None:
    valid = torch.zeros(1, 1, 32, 128, dtype=torch.bool)
    valid[..., :16, :] = True
    codes = torch.zeros(1, 1, 32, 128)
    codes[..., 3, 70] = 5
    codes[..., 20, 70] = 5  # not valid, so it is no survivor
    counts = count_pairs(codes, None, valid)
    assert (counts.tiles.item(), counts.empty_tiles.item()) == (2, 1)
    assert counts.tile_sparsity().item() == 0.5


@given(SEEDS)
def test_counts_add_up_over_batches_and_heads(seed: int) -> None:
    batches = [make_batch(seed + 10 * i) for i in range(3)]
    total = PairCounts.none_yet(3)
    for batch in batches:
        total += count_pairs(*batch)
    together = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    assert as_lists(total) == as_lists(count_pairs(*together))
    assert as_lists(total.total()) == {name: [sum(count)] for name, count in as_lists(total).items()}


def test_the_four_figures_of_a_known_case() -> None:
    valid = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    valid[0, 0, :3, :3] = True  # nine valid pairs
    valid[1, 0, :1, :1] = True  # and one
    keep = valid.clone()
    keep[0, 0, 0, 1] = keep[0, 0, 0, 2] = keep[0, 0, 1, 2] = False
    codes = keep * 3.0
    codes[0, 0, 2, 0] = 0  # kept, but rounded to zero
    counts = count_pairs(codes, ~keep, valid)
    assert counts.sparsity().item() == pytest.approx(4 / 10)
    assert counts.pruned_fraction().item() == pytest.approx(3 / 10)
    assert counts.padded_sparsity(4).item() == pytest.approx(1 - 6 / 32)
    assert counts.tile_sparsity().item() == 0
    assert counts.keys_per_row().item() == pytest.approx(6 / 4)


@given(SEEDS, st.integers(7, 50))
def test_padding_raises_padded_sparsity_alone(seed: int, length: int) -> None:
    codes, pruned, valid = make_batch(seed)
    padded = [torch.nn.functional.pad(x, (0, length - 7, 0, length - 5)) for x in (codes, pruned, valid)]
    plain, wide = count_pairs(codes, pruned, valid), count_pairs(*padded)
    assert torch.equal(plain.sparsity(), wide.sparsity())
    assert torch.equal(plain.keys_per_row(), wide.keys_per_row())
    figures = [float(plain.padded_sparsity(size)[0]) for size in (7, length, 2 * length)]
    assert figures == sorted(figures)
    zeros = float((codes[:, 0] == 0).logical_or(~valid[:, 0]).sum()) + 2 * (length**2 - 5 * 7)
    assert figures[1] == pytest.approx(zeros / (2 * length**2))


def test_nothing_counted_yet_gives_figures_all_the_same() -> None:
    counts = PairCounts.none_yet(2)
    figures = (counts.sparsity(), counts.pruned_fraction(), counts.tile_sparsity(), counts.keys_per_row())
    assert all(figure.tolist() == [0, 0] for figure in figures)
    empty = torch.zeros(0, 2, 3, 4, dtype=torch.bool)
    assert as_lists(count_pairs(empty, None, empty)) == as_lists(counts)


BITS = {"q": 8, "k": 8, "v": 4, "p": 8}


def test_work_of_a_known_case() -> None:
    work = attention_work(pairs=1000, survivors=100, head_dim=32, bits=dict(BITS))
    assert asdict(work) == {
        "macs_dense": 64_000,
        "macs_remaining": 35_200,
        "bit_operations_dense": 64_000 * 1024,
        "bit_operations_remaining": 32_000 * 64 + 3_200 * 32,
        "bytes_dense": 4000,
        "bytes_remaining": 300,
    }


@given(st.integers(0, 10**9), st.data())
def test_work_shrinks_with_survivors_from_all_to_none(pairs: int, data: st.DataObject) -> None:
    fewer, more = sorted(data.draw(st.tuples(st.integers(0, pairs), st.integers(0, pairs))))
    works = [asdict(attention_work(pairs, survivors, 32, dict(BITS))) for survivors in (0, fewer, more, pairs)]
    for name in ("macs_remaining", "bit_operations_remaining", "bytes_remaining"):
        figures = [work[name] for work in works]
        assert figures == sorted(figures)
        assert figures[-1] <= works[0][name.replace("remaining", "dense")]
    assert works[0]["macs_remaining"] * 2 == works[0]["macs_dense"], "scores are needed even of pruned pairs"
    assert works[-1]["macs_remaining"] == works[-1]["macs_dense"]


def test_what_is_not_quantized_counts_as_thirty_two_bits() -> None:
    floating = attention_work(100, 100, 8, dict.fromkeys("qkvp"))
    assert floating.bit_operations_remaining == floating.bit_operations_dense
    assert floating.bytes_remaining == floating.bytes_dense


def test_work_of_a_tail_by_hand() -> None:
    spec = AttentionSpec(sparsity=0.9, tail="mean")
    mean = tail_work(rows=10, keys=6, survivors=12, sequences=2, spec=spec, head_dim=32)
    assert mean.macs_remaining == 32 * (2 * 6 + 2 * 10 + 12)
    assert mean.bytes_remaining == 10 * 4 + 2 * 2 * 32 * 4
    assert mean.bit_operations_remaining == 32 * (6 * 8 + 6 * 8 + 12 * 8 + 10 * 8 * 32 + 10 * 32 * 32)
    linear = tail_work(10, 6, 12, 2, dataclasses.replace(spec, tail="linear", tail_rank=4), 32)
    assert linear.macs_remaining - mean.macs_remaining == 32 * (2 * 4 * 6 + 2 * 4 * 10 + 12)
    assert linear.bytes_remaining - mean.bytes_remaining == 2 * 4 * 32 * 4
    whole = tail_work(10, 6, 12, 2, dataclasses.replace(spec, tail="linear", tail_rank=64), 32)
    assert whole.macs_remaining - mean.macs_remaining == 32 * (32 * 6 + 32 * 10 + 12)
    assert total_work([mean, linear]).macs_dense == 0


@pytest.mark.parametrize("spec", [AttentionSpec(sparsity=0.9), AttentionSpec(tail="mean")])
def test_without_a_tail_or_pruning_there_is_no_such_work(spec: AttentionSpec) -> None:
    assert set(asdict(tail_work(10, 6, 12, 2, spec, 32)).values()) == {0}
