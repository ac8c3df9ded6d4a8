"""Paired tests of a compressed model and its dense control on the same evaluation rows.

McNemar's exact test for right or wrong rows, else a bootstrap over rows; both by SciPy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnpress.records.row_scores import RowScores

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Pair:
    """Scores of one seed on the same rows by both models.

    Attributes:
        metric: the headline.
        ours, theirs: of the compressed model and of its control.
        targets: of a regression.
    """

    metric: str
    ours: RowScores
    theirs: RowScores
    targets: RowScores | None = None


def paired_words(pairs: Sequence[Pair]) -> str:
    """Result of a paired test with one pair per seed, for a table.

    Returns:
        McNemar's p of each seed; or the 95 % interval of the mean difference over seeds, in points; empty without
        pairs, or for a regression without targets.
    """
    if not pairs or (pairs[0].ours.kind == "value" and not all(pair.targets for pair in pairs)):
        return ""
    if pairs[0].ours.kind == "right":
        return "p " + ", ".join(f"{mcnemar(pair.ours.values(), pair.theirs.values()):.2g}" for pair in pairs)
    low, high = bootstrap(tuple(pairs))
    return f"{low:+.2f} to {high:+.2f}"


def mcnemar(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """McNemar's exact p: the probability of such an uneven split of differing rows if both models are equally good.

    Args:
        ours, theirs: 1 where a row is right, else 0; of the same rows.
    """
    from scipy.stats import binomtest

    gained, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


@functools.cache  # ranks of a thousand draws take a second, and pages are made several times
def bootstrap(pairs: tuple[Pair, ...]) -> tuple[float, float]:
    """95 % interval of the difference in points, mean over seeds; each draw of rows is used for all seeds.

    It covers the choice of rows only. The variation between trainings is shown by the spread over seeds.

    Args:
        pairs: of kind "score" or "value", the latter with targets; of the same rows.
    """
    from scipy.stats import bootstrap as resampled

    sides: list[Any] = [side.values() for pair in pairs for side in (pair.ours, pair.theirs)]
    samples: tuple[Any, ...]
    statistic: Any
    kind, targets, metric = pairs[0].ours.kind, pairs[0].targets, pairs[0].metric
    if kind == "score":
        difference = np.mean([ours - theirs for ours, theirs in zip(sides[::2], sides[1::2], strict=True)], axis=0)
        samples, statistic = (difference,), _mean
    else:
        assert targets is not None
        samples, statistic = (*sides, targets.values()), _Correlations(metric == "spearman")
    found = resampled(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return 100 * float(found.low), 100 * float(found.high)


def _mean(values: NDArray[np.float64], axis: int = -1) -> Any:
    return values.mean(axis)


@dataclass(frozen=True)
class _Correlations:
    """The mean over seeds of how much better ours correlates with the targets than theirs."""

    of_ranks: bool

    def __call__(self, *samples: NDArray[np.float64], axis: int = -1) -> Any:
        *sides, targets = (self._standardized(sample, axis) for sample in samples)
        found = [(side * targets).mean(axis) for side in sides]
        return np.mean([ours - theirs for ours, theirs in zip(found[::2], found[1::2], strict=True)], axis=0)

    def _standardized(self, values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        from scipy.stats import rankdata

        ranked = rankdata(values, axis=axis) if self.of_ranks else values
        centred = ranked - ranked.mean(axis, keepdims=True)
        spread = centred.std(axis, keepdims=True)
        return centred / np.where(spread > 0, spread, 1.0)  # type: ignore[no-any-return]
