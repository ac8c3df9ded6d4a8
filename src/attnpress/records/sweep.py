"""Record of a sweep: its trials and its front. Plain JSON, `sweep.json`; figures are made from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpress.records.reading import Amount, RecordError, Share, Whole, read_json

FORMAT = 1
FILE = "sweep.json"
STATES = ("complete", "pruned", "failed")


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: in the study, from 0.
        state: "complete", "pruned" (stopped early) or "failed".
        chosen: in words.
        params: sampled parameters, by name.
        metric: headline in points; None unless complete.
        work: measured share of bit operations that remain; None unless complete.
        sparsity: measured fraction of valid pairs; None unless complete.
        watched: metric on a few rows by training step.
        recipe: the RunConfig as plain data.
        folder: of the run, relative to the sweep's folder, if it was run on this machine.
        error: why it failed.
    """

    number: Whole
    state: str
    chosen: str
    params: dict[str, Any]
    metric: float | None
    work: Amount | None
    sparsity: Share | None
    watched: dict[str, float]
    recipe: dict[str, Any]
    folder: str
    error: str | None = None


@dataclass(frozen=True)
class SweepRecord:
    """A whole sweep.

    Attributes:
        task, headline: task and its metric.
        dense: headline of the dense teacher, in points.
        majority: headline of always predicting the most frequent class; None outside classification.
        provenance: of the teacher's record.
        sweep: the SweepSpec as plain data, without its storage.
        trials: by number.
        front: numbers of the Pareto-optimal trials in metric and work, least work first.
    """

    task: str
    headline: str
    dense: float
    majority: float | None
    provenance: dict[str, Any]
    sweep: dict[str, Any]
    trials: list[TrialRecord]
    front: list[int]
    format: int = FORMAT

    def on_front(self) -> list[TrialRecord]:
        """The trials of the front, least work first."""
        by_number = {trial.number: trial for trial in self.trials}
        return [by_number[number] for number in self.front]


def pareto_front(trials: Sequence[TrialRecord]) -> list[int]:
    """Numbers of the Pareto-optimal complete trials, least work first; of equal ones, the first.

    A trial dominates another if it is at least as good in metric and work, and better in one of them.
    """
    done = [
        (trial.work, -trial.metric, trial.number)
        for trial in trials
        if trial.work is not None and trial.metric is not None
    ]
    front: list[int] = []
    best = float("inf")
    for _, negative, number in sorted(done):
        if negative < best:
            front, best = [*front, number], negative
    return front


def read_sweep(folder: Path) -> SweepRecord:
    """Read `sweep.json` of a sweep's folder.

    Raises:
        RecordError: the file is missing, damaged or of a newer format.
    """
    record, where = read_json(folder / FILE, FORMAT, SweepRecord), f"{folder / FILE}: damaged"
    by_number = {trial.number: trial for trial in record.trials}
    if len(by_number) < len(record.trials):
        raise RecordError(f"{where} ('trials'): two trials have one number")
    for trial in record.trials:
        if trial.state not in STATES:
            raise RecordError(f"{where} (trial {trial.number} 'state'): {trial.state!r:.40} is none of {STATES}")
        if trial.state == "complete" and None in (trial.metric, trial.work, trial.sparsity):
            raise RecordError(f"{where} (trial {trial.number}): complete, but without metric, work or sparsity")
    for number in record.front:
        if number not in by_number or by_number[number].state != "complete":
            raise RecordError(f"{where} ('front'): trial {number} is not complete, or not there")
    return record
