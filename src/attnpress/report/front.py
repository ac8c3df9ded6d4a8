"""Figure of a sweep's front, with a description in words."""

from __future__ import annotations

from collections.abc import Sequence

from attnpress.records.sweep import SweepRecord, TrialRecord
from attnpress.report.figures import Drawing
from attnpress.report.noise import standard_error


def front_drawing(number: int, sweep: SweepRecord) -> Drawing:
    """Score against remaining work, of every complete trial and of the front."""
    from attnpress.report import plots

    best = sweep.on_front()
    beaten = [trial for trial in sweep.trials if trial.state == "complete" and trial.number not in sweep.front]
    words = "; ".join(f"trial {trial.number}: {_point(trial)}, {trial.chosen}" for trial in best)
    rows = sweep.provenance.get("rows", {}).get("eval")
    noise = plots.Band(sweep.dense, standard_error(sweep.headline, sweep.dense, rows)) if rows else None
    figure = plots.front(
        plots.Line("beaten by another", *_points(beaten)),
        plots.Line("not beaten", *_points(best), series=1),
        f"{sweep.headline} (points)",
        sweep.dense,
        noise,
    )
    return Drawing(
        f"front-{number}",
        f"{sweep.headline[0].upper()}{sweep.headline[1:]} against remaining work",
        "Left is less work, up is better. Choose the leftmost mark that is good enough.",
        f"Not beaten: {words}.",
        figure,
    )


def front_summary(sweep: SweepRecord) -> str:
    """The result in one sentence."""
    best = sweep.on_front()
    ends = f"from {_point(best[0])} to {_point(best[-1])}" if len(best) > 1 else "".join(map(_point, best))
    return (
        f"{sweep.task}, a sweep of {len(sweep.trials)} trials: {len(best)} that no other beats"
        f"{', ' + ends if ends else ''}; {sweep.headline} {sweep.dense:.2f} dense."
    )


def _point(trial: TrialRecord) -> str:
    return f"{trial.metric:.2f} at {trial.work:.2%} of the bit operations"


def _points(trials: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    done = [(100 * one.work, one.metric) for one in trials if one.work is not None and one.metric is not None]
    return [work for work, _ in done], [metric for _, metric in done]
