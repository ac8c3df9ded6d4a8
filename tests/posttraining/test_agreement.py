"""Agreement of answers: exact on hand-made ones."""

from __future__ import annotations

import math

import pytest
import torch

from attnpress.posttraining.agreement import agreement, loss_of, same_order


def test_cosine_of_embeddings() -> None:
    dense = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    ours = torch.tensor([[1.0, 1.0], [0.0, 5.0]])
    found = agreement("embedder", dense, ours)
    assert found["cosine"] == pytest.approx((math.sqrt(0.5) + 1) / 2)
    assert found["lowest_cosine"] == pytest.approx(math.sqrt(0.5))
    assert loss_of("embedder", found) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_decisions_and_logits_of_a_classifier() -> None:
    dense = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    found = agreement("classifier", dense, torch.tensor([[3.0, 0.0], [5.0, 4.0]]))
    assert found == {"same_decisions": 0.5, "logit_change": 1.0}


def test_order_is_that_of_the_rows_of_one_query() -> None:
    dense, ours = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, 0.0])
    assert same_order(dense, ours, ["a", "a", "a", "b"]) == pytest.approx(2 / 3)
    assert same_order(dense, ours, ["a", "b", "c", "d"]) == pytest.approx(2 / 6)  # nothing to order among themselves
    assert same_order(dense, ours) == pytest.approx(2 / 6)


def test_equal_scores_ask_for_no_order_but_a_tie_in_place_of_one_is_wrong() -> None:
    tied = torch.tensor([1.0, 1.0])
    assert same_order(tied, torch.tensor([2.0, 1.0])) == 1
    assert same_order(torch.tensor([2.0, 1.0]), tied) == 0
