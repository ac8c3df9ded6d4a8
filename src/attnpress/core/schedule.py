"""The requested sparsity at each step: a pure, monotone function, exact at both ends."""

from __future__ import annotations

import math

from attnpress.config import ScheduleSpec


def sparsity_at(step: int, total: int, spec: ScheduleSpec, target: float) -> float:
    r"""Sparsity asked at `step` of a training of `total` steps.

    With x = (step / total - begin) / (end - begin) limited to [0, 1], and s_0 = min(start, target):

        constant, fixed:  target
        linear:    s_0 + (target - s_0) x
        cubic:     target + (s_0 - target) (1 - x)^3           (Zhu and Gupta 2017, equation 1)
        step:      s_0 + (target - s_0) floor(steps * x) / steps

    Returns:
        `s_0` up to `begin` (`target` for kinds "constant" and "fixed"), exactly `target` from `end` on.
    """
    start = min(spec.start, target)
    x = _progress(step / max(total, 1), spec.begin, spec.end)
    if spec.kind in ("constant", "fixed") or x >= 1:
        return target
    if spec.kind == "linear":
        return _between(start, target, x)
    if spec.kind == "cubic":
        return _between(start, target, 1 - (1 - x) ** 3)
    return _between(start, target, math.floor(spec.steps * x) / spec.steps)


def _progress(fraction: float, begin: float, end: float) -> float:
    if fraction >= end:
        return 1.0
    return 0.0 if fraction <= begin else (fraction - begin) / (end - begin)


def _between(start: float, target: float, x: float) -> float:
    return min(target, start + (target - start) * x)
