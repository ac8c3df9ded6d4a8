"""Standard error of a score, from its number of evaluation rows."""

from __future__ import annotations

import math

CORRELATIONS = ("matthews", "pearson", "spearman")
"""Metrics from -1 to 1, times 100; all others are proportions, in percent."""

WATCHED_ROWS = 200
"""Maximum number of rows for the watched score in training (`training.progress`)."""


def standard_error(metric: str, score: float, rows: int) -> float:
    """One standard error of a score in points: its typical deviation on another sample of the same size.

    Exact for a proportion of correct answers (accuracy, exact match). F1 is treated as such a proportion, which is an
    approximation. For a correlation r it is (1 - r^2) / sqrt(rows - 1). The variation between seeds is not included.

    Args:
        metric: name of the score.
        score: in points, 0 to 100, or -100 to 100 for a correlation.
        rows: number of evaluation rows; fewer than 2 count as 2.
    """
    share = score / 100
    if metric in CORRELATIONS:
        return 100 * (1 - min(1.0, share * share)) / math.sqrt(max(1, rows - 1))
    inside = min(1.0, max(0.0, share))
    return 100 * math.sqrt(inside * (1 - inside) / max(2, rows))
