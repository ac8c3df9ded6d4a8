"""Search for the most compressed form of an encoder that keeps its answers (`--max-loss`).

More bits, less sparsity and float linear layers never lose more, up to noise. So bisection finds the greatest valid
sparsity at each width, and fewer bits are not tried beyond it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnpress.files import write_text
from attnpress.posttraining.forms import Form
from attnpress.records.quantized import TrialRecord
from attnpress.records.reading import RecordError, build_record
from attnpress.records.strict_json import JsonError, parse_json

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
BITS = (8, 6, 4)

Judge = Callable[[Form], TrialRecord]


class LossError(ValueError):
    """No form loses as little as requested. The message names the nearest one."""


class Trials:
    """Results of trials, stored in a file so that an interrupted search resumes.

    Args:
        file: where; None keeps them in memory.
        made_from: what they depend on; results for anything else are discarded.
    """

    def __init__(self, file: Path | None, made_from: Mapping[str, Any]) -> None:
        self.file, self.made_from = file, dict(made_from)
        self.done: dict[tuple[int, float, str], TrialRecord] = {}
        for trial in self._read():
            self.done[trial.bits, trial.sparsity, trial.linear] = trial

    def judged(self, form: Form, judge: Judge) -> TrialRecord:
        """The result for a form, evaluated if it is not known yet."""
        key = form.bits, form.sparsity, form.linear
        if key not in self.done:
            self.done[key] = judge(form)
            if self.file is not None:
                trials = [asdict(trial) for trial in self.done.values()]
                write_text(self.file, json.dumps({"made_from": self.made_from, "trials": trials}, indent=1) + "\n")
        return self.done[key]

    def forget(self) -> None:
        """Delete the file after the search."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _read(self) -> list[TrialRecord]:
        try:
            plain = parse_json(self.file.read_text(encoding="utf-8")) if self.file is not None else {}
            if plain.get("made_from") != self.made_from:
                return []
            return [build_record(TrialRecord, each, str(self.file), "damaged") for each in plain["trials"]]
        except (FileNotFoundError, UnicodeDecodeError, JsonError, RecordError, AttributeError, KeyError, TypeError):
            return []  # missing or damaged: start over


def most_compressed(
    begin: Form, max_loss: float, judge: Judge, trials: Trials, *, bits: Sequence[int], sparsities: Sequence[float]
) -> TrialRecord:
    """The trial with the fewest bit operations among those that lose no more than `max_loss`.

    Args:
        begin: tail and linear layers of all forms.
        bits, sparsities: choices, the least compressed first.

    Raises:
        LossError: there is none.
    """
    room = len(sparsities)
    for few in bits:
        forms = [Form(few, sparsity, begin.tail, begin.linear) for sparsity in sparsities]
        room = _greatest(forms[:room], lambda form: trials.judged(form, judge).loss <= max_loss)
        if room == 0:
            break  # fewer bits lose more
    tried = [trial for trial in trials.done.values() if trial.linear == begin.linear]
    held = [trial for trial in tried if trial.loss <= max_loss]
    if not held:
        nearest = min(tried, key=lambda trial: trial.loss)
        raise LossError(
            f"--max-loss {max_loss:g}: no form meets it; the nearest loses {nearest.loss:.3g} ({nearest.bits} bits, "
            f"sparsity {nearest.sparsity:g}, linear layers in {nearest.linear}); allow that much, or more of --linear "
            "float, --bits 8, --sparsity 0"
        )
    return min(held, key=lambda trial: (trial.work, -trial.sparsity))


def _greatest(forms: Sequence[Form], holds: Callable[[Form], bool]) -> int:
    """Number of leading forms that meet the limit, by bisection."""
    low, high = 0, len(forms)
    while low < high:
        middle = (low + high) // 2
        if holds(forms[middle]):
            low = middle + 1
        else:
            high = middle
    return low
