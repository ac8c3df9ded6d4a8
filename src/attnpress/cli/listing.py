"""The names that recipes accept, each with a one-line description."""

from __future__ import annotations

from typing import get_args

from attnpress.config import ObserverName, RuleName, ScheduleName
from attnpress.config.rules import RULES

SCHEDULES = {
    "constant": "the target from the first step on",
    "linear": "a straight rise from begin to end",
    "cubic": "fast at first, slow near the target (Zhu and Gupta 2017; default)",
    "step": "equal jumps",
    "fixed": "the target from the first step on, by thresholds that calibration fitted and that stay as they are",
}
OBSERVERS = {
    "absmax": "the largest magnitude seen",
    "ema": "moving average of the batches' largest magnitudes (default at 5 to 8 bits)",
    "percentile": "the 99.99th percentile of magnitudes",
    "mse": "the clipping point of least squared error (default up to 4 bits)",
}


def rows_of(kind: str) -> list[tuple[str, str]]:
    """Names with their descriptions.

    Args:
        kind: "tasks", "rules", "schedules", "observers", or "backends" (of this machine).
    """
    known = {
        "rules": ({name: facts.about for name, facts in RULES.items()}, RuleName),
        "schedules": (SCHEDULES, ScheduleName),
        "observers": (OBSERVERS, ObserverName),
    }
    if kind == "tasks":
        from attnpress.tasks import list_tasks

        return list_tasks()
    if kind == "backends":
        from attnpress.kernels.ops import backends

        return [(backend.name, backend.describe()) for backend in backends()]
    described, literal = known[kind]
    return [(name, described[name]) for name in get_args(literal)]
