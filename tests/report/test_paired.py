"""Paired tests: McNemar's against sums by hand, the bootstrap against what the rows are."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from attnpress.records.row_scores import pack_rows
from attnpress.records.run import Record
from attnpress.report.evidence import evidence_markdown
from attnpress.report.paired import Pair, bootstrap, mcnemar, paired_words
from tests.report.test_evidence import record, stage

pytest.importorskip("scipy")


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (2, 8), (5, 5), (0, 6)])
def test_mcnemar_is_the_binomial_tail_of_the_rows_that_differ(gained: int, lost: int) -> None:
    ours = np.array([1.0] * gained + [0.0] * lost + [1.0, 0.0] * 20)
    theirs = np.array([0.0] * gained + [1.0] * lost + [1.0, 0.0] * 20)
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count
    assert mcnemar(ours, theirs) == pytest.approx(min(1.0, 2 * tail)) == mcnemar(theirs, ours)


def test_p_is_told_of_each_seed() -> None:
    same, other = pack_rows("right", [1, 1, 1, 1, 1, 1, 0]), pack_rows("right", [0, 0, 0, 0, 0, 0, 0])
    assert paired_words([Pair("f1", same, same), Pair("f1", other, same)]) == "p 1, 0.031"
    assert paired_words([]) == ""


def test_the_interval_of_a_mean_is_of_the_rows_and_of_the_mean_over_seeds() -> None:
    random = np.random.default_rng(0)
    theirs = random.random(400)
    ours = np.clip(theirs + random.normal(0.02, 0.1, 400), 0, 1)
    pair = Pair("f1", pack_rows("score", ours), pack_rows("score", theirs))
    low, high = bootstrap((pair,))
    difference = 100 * (ours - theirs)
    error = difference.std() / math.sqrt(400)
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.2 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    opposite = Pair("f1", pair.theirs, pair.ours)
    assert bootstrap((pair, opposite)) == pytest.approx((0, 0), abs=1e-3), "row by row the two seeds cancel"
    assert paired_words([pair]) == f"{low:+.2f} to {high:+.2f}"


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_the_interval_of_a_correlation_holds_the_difference_of_the_metric(metric: str) -> None:
    from scipy.stats import pearsonr, spearmanr

    random = np.random.default_rng(1)
    targets = np.round(5 * random.random(150), 1)
    ours, theirs = targets + random.normal(0, 1, 150), targets + random.normal(0, 3, 150)
    of = spearmanr if metric == "spearman" else pearsonr
    difference = 100 * (of(ours, targets).statistic - of(theirs, targets).statistic)
    pair = Pair(metric, *(pack_rows("value", side) for side in (ours, theirs, targets)))
    low, high = bootstrap((pair,))
    assert 0 < low < difference < high < 100
    assert (low + high) / 2 == pytest.approx(difference, abs=(high - low) / 4)
    stretched = dataclasses.replace(pair, ours=pack_rows("value", 7 * ours - 3))
    assert bootstrap((stretched,)) == pytest.approx((low, high), abs=0.05), "a correlation sees no scale"
    assert paired_words([dataclasses.replace(pair, targets=None)]) == ""


def with_rows(record: Record, right: dict[str, list[int]], data: str = "rows") -> Record:
    record.provenance["data"] = {"eval": data}
    stages = [
        dataclasses.replace(one, row_scores=pack_rows("right", right[one.name]) if one.name in right else None)
        for one in record.stages
    ]
    return dataclasses.replace(record, stages=stages)


def test_the_table_of_evidence_has_a_paired_test_where_the_same_rows_are_known() -> None:
    worse, better = [1] * 4 + [0] * 6, [1] * 10
    dense = [
        with_rows(record(seed, stage("dense", 80.0), stage("dense_control", 84.0)), {"dense_control": better})
        for seed in (0, 1)
    ]
    cell = [record(seed, stage("dense", 80.0), stage("progressive", 80.0)) for seed in (0, 1)]
    known = [with_rows(cell[0], {"progressive": worse}), with_rows(cell[1], {"progressive": better})]
    header, _, *rows = evidence_markdown("mrpc", {"dense": dense, "8888-0.90": known}).splitlines()
    assert "| against dense | paired test | sparsity |" in header
    assert "| -4.00 | p 0.031, 1 | 0.950 |" in rows[-1]
    assert "| +0.00 |  | 0.950 |" in rows[1], "a model is not compared with itself"
    other = [with_rows(cell[0], {"progressive": worse}, "other rows"), cell[1]]
    for unknown in (cell, other):
        assert "paired test" not in evidence_markdown("mrpc", {"dense": dense, "8888-0.90": unknown})
