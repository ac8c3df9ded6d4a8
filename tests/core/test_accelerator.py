"""The analytic model: its formulas by hand, and what bits, pruning and buffers do to them."""

from __future__ import annotations

import dataclasses

import pytest

from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.core.accelerator import (
    Accelerator,
    Shape,
    estimate,
    lane_array_cycles,
    off_chip_bytes,
    packed_products,
    systolic_cycles,
)

MACHINE = Accelerator(rows=32, columns=32, buffer=64 * 1024)
BITS = {"q": 8, "k": 8, "v": 8, "p": 8}
FOUR = AttentionSpec(q=TensorSpec(4), k=TensorSpec(4), v=TensorSpec(4), p=ProbsSpec(4), sparsity=0.95)


def test_one_fold_fills_streams_and_drains() -> None:
    assert systolic_cycles(MACHINE, m=55, n=20, k=32) == 2 * 32 + 32 + 55 - 2
    assert systolic_cycles(MACHINE, m=55, n=33, k=33) == 4 * (2 * 32 + 32 + 55 - 2)
    assert systolic_cycles(MACHINE, m=55, n=33, k=33, products=4) == 2 * (2 * 32 + 32 + 55 - 2)


@pytest.mark.parametrize(("left", "right", "products"), [(8, 8, 1), (4, 4, 4), (4, 8, 2), (2, 2, 16), (3, 7, 2)])
def test_few_bits_share_a_multiplier(left: int, right: int, products: int) -> None:
    assert packed_products(MACHINE, left, right) == products


def test_survivors_keep_lanes_busy_as_far_as_they_are_balanced() -> None:
    shape = Shape(64, 32, survivors=640)
    assert lane_array_cycles(MACHINE, shape) == 94 + 640 / 32
    assert lane_array_cycles(MACHINE, dataclasses.replace(shape, balance=0.5)) == 94 + 2 * 640 / 32
    assert lane_array_cycles(MACHINE, shape, products=4) == 94 + 640 / 32 / 4


def test_keys_and_values_are_read_again_where_they_do_not_fit() -> None:
    small, rows = Accelerator(buffer=8 * 1024), 512 * 64
    assert off_chip_bytes(Accelerator(buffer=1 << 20), Shape(512, 64, 512**2), BITS) == 4 * rows
    assert off_chip_bytes(small, Shape(512, 64, 512**2), BITS) == 2 * rows + 2 * rows * (2 * rows / 4096)


def test_pruning_saves_what_the_tail_costs_a_little_of() -> None:
    pruned, tailed = AttentionSpec(sparsity=0.95), AttentionSpec(sparsity=0.95, tail="mean")
    dense = estimate(MACHINE, Shape(384, 64, 384**2), AttentionSpec())
    sparse = estimate(MACHINE, Shape(384, 64, 0.05 * 384**2, 0.7), pruned)
    with_tail = estimate(MACHINE, Shape(384, 64, 0.05 * 384**2, 0.7), tailed)
    assert sparse.scores == dense.scores
    assert sparse.values < dense.values / 4
    assert (dense.tail, sparse.tail) == (0, 0)
    assert sparse.cycles < with_tail.cycles < dense.cycles
    assert sparse.on_chip == pytest.approx(0.05 * 384**2 * 3)


def test_fewer_bits_take_fewer_cycles_and_bytes() -> None:
    shape = Shape(384, 64, 0.05 * 384**2, 0.7)
    eight, four = estimate(MACHINE, shape, AttentionSpec(sparsity=0.95)), estimate(MACHINE, shape, FOUR)
    assert four.scores == eight.scores / 4
    assert four.off_chip < eight.off_chip
    assert four.on_chip == pytest.approx(shape.survivors * 20 / 8)


def test_floating_point_is_refused() -> None:
    with pytest.raises(ValueError, match="needs bits for all"):
        estimate(MACHINE, Shape(8, 8, 64), AttentionSpec(v=TensorSpec(None)))
    with pytest.raises(ValueError, match="without predictor_bits"):
        estimate(MACHINE, Shape(8, 8, 64), AttentionSpec(sparsity=0.5, predictor_bits=4))
