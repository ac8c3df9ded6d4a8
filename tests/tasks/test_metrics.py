"""Metrics against the formulas that define them, in points, and what undefined cases give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EvalPrediction

from attnpress.tasks.metrics import METRICS, score, sentence_metrics

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
VALUES = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=30)


@given(PAIRS)
def test_binary_metrics_follow_the_confusion_matrix(pairs: list[tuple[int, int]]) -> None:
    given_, wanted = np.array(pairs).T
    tp, tn, fp, fn = (pairs.count(cell) for cell in ((1, 1), (0, 0), (1, 0), (0, 1)))
    found = score(["accuracy", "f1", "matthews"], given_, wanted, 2)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["accuracy"] == pytest.approx(100 * (tp + tn) / len(pairs), abs=1e-4)
    assert found["f1"] == pytest.approx(200 * tp / max(2 * tp + fp + fn, 1), abs=1e-4)
    assert found["matthews"] == pytest.approx(100 * (tp * tn - fp * fn) / root if root else 0.0, abs=1e-3)


@given(VALUES)
def test_correlations_follow_their_formulas(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=np.float64).T
    found = score(["pearson", "spearman"], x, y, 0)
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(values) == one)) for one in values]) for values in (x, y)]
    for name, (left, right) in {"pearson": (x, y), "spearman": (ranks[0], ranks[1])}.items():
        constant = left.std() == 0 or right.std() == 0
        expected = 0.0 if constant else 100 * float(np.corrcoef(left, right)[0, 1])
        assert found[name] == pytest.approx(expected, abs=1e-3)


def test_correlation_keeps_its_digits_when_predictions_hardly_differ() -> None:
    x = np.array([1.0, 2.0, 3.0])
    assert score(["pearson"], 5 + 1e-9 * x, x, 0)["pearson"] == pytest.approx(100, abs=1e-3)


def test_f1_of_more_than_two_classes_is_the_mean_over_classes() -> None:
    per_class = [2 / 3, 2 / 3, 1.0]
    assert score(["f1"], [0, 1, 1, 2], [0, 0, 1, 2], 3)["f1"] == pytest.approx(100 * np.mean(per_class))


def test_logits_become_answers_and_the_headline_comes_first() -> None:
    logits = np.array([[0.1, 0.2, 0.3], [3.0, 2.0, 1.0], [0.0, 1.0, 0.0]], dtype=np.float16)
    compute = sentence_metrics(("matthews", "accuracy"), 3)
    labels = np.array([2, 0, 0])
    found = compute(EvalPrediction((logits, np.zeros((3, 7))), labels))  # type: ignore[arg-type]  # two outputs
    assert list(found) == ["matthews", "accuracy"]
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert found == compute(EvalPrediction(logits, labels)), "further outputs of the model change nothing"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [0, 2])
def test_a_diverged_model_gets_no_score(bad: float, classes: int) -> None:
    logits = np.zeros((4, max(classes, 1)))
    logits[2, 0] = bad
    names = ["pearson"] if classes == 0 else ["accuracy"]
    with pytest.raises(FloatingPointError, match=r"1 of 4 rows \(first: row 2\)"):
        sentence_metrics(names, classes)(EvalPrediction(logits, np.arange(4) % 2))


def test_every_metric_says_what_it_is() -> None:
    assert all(metric.about and metric.kind in ("classification", "regression") for metric in METRICS.values())
