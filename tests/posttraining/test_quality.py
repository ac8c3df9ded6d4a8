"""Figures by what people know of texts, with values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from attnpress.posttraining.quality import exam, reciprocal_rank, spearman

PAIRS = [("a", "b"), ("c", "a"), ("c", "d")]


def test_an_embedder_is_judged_by_the_order_of_its_cosines() -> None:
    asked = exam("embedder", PAIRS, {("a", "b"): 5.0, ("c", "a"): 1.0, ("c", "d"): 3.0})
    assert asked.rows == asked.timed == [("a",), ("b",), ("c",), ("d",)]
    alike = torch.tensor([[1.0, 0.0], [7.0, 0.1], [0.0, 2.0], [1.0, 1.0]])
    assert asked.measure == "Spearman"
    assert asked.judge(alike) == pytest.approx(1.0, abs=1e-5), "ab, cd, ca, whatever the lengths of the vectors"
    assert asked.judge(alike[[0, 2, 1, 3]]) == pytest.approx(-1.0, abs=1e-5), "ca, cd, ab"


def test_ties_share_their_mean_rank() -> None:
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(
        math.sqrt(3) / 2, abs=1e-5
    )


def test_a_query_is_asked_of_all_passages() -> None:
    asked = exam("embedder", [("what", "one"), ("who", "two"), ("why", "two")], {})
    assert asked.timed == [("one",), ("two",)], "each once, and they take the time"
    assert asked.rows == [("one",), ("two",), ("what",), ("who",), ("why",)]
    assert asked.measure == "MRR@10"
    answers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0], [1.0, 0.5], [0.1, 0.5]])
    assert asked.judge(answers) == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_what_is_not_among_the_first_ten_is_not_found() -> None:
    found = torch.arange(12.0).expand(2, 12)
    assert reciprocal_rank(found, [2, 1]) == pytest.approx((1 / 10 + 0) / 2)


def test_a_reranker_is_judged_by_its_scores_and_by_nothing_without_them() -> None:
    asked = exam("reranker", PAIRS, dict(zip(PAIRS, (0.0, 1.0, 2.0), strict=True)))
    assert asked.rows == asked.timed == PAIRS
    assert asked.judge(torch.tensor([[-3.0], [0.5], [9.0]])) == pytest.approx(1.0, abs=1e-5)
    plain = exam("reranker", PAIRS, {})
    assert plain.measure is None
    assert math.isnan(plain.judge(torch.zeros(3, 1)))
    assert exam("embedder", [("a",), ("b",)], {}).measure is None
