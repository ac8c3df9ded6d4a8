"""The search for the most compressed form: few trials, the right one, and it goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnpress.posttraining.forms import Form
from attnpress.posttraining.search import LossError, Trials, most_compressed
from attnpress.records.quantized import TrialRecord

BEGIN = Form(8, 0.5, "none", "int8")
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


class Judged:
    """Loses more the fewer the bits and the higher the sparsity; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[Form] = []

    def __call__(self, form: Form) -> TrialRecord:
        self.asked.append(form)
        loss = (8 - form.bits) * 0.01 + form.sparsity * 0.1
        work = form.bits**2 / 64 * (1 - form.sparsity / 2)
        return TrialRecord(form.bits, form.sparsity, form.linear, loss, work)


def search(max_loss: float, judge: Judged, trials: Trials | None = None) -> TrialRecord:
    trials = trials or Trials(None, {})
    return most_compressed(BEGIN, max_loss, judge, trials, bits=(8, 6, 4), sparsities=SPARSITIES)


@pytest.mark.parametrize("max_loss", [0.0, 0.01, 0.05, 0.06, 0.1, 0.12, 0.5])
def test_it_finds_what_trying_everything_finds(max_loss: float) -> None:
    judge = Judged()
    found = search(max_loss, judge)
    every = [Judged()(Form(bits, sparsity, "none", "int8")) for bits in (8, 6, 4) for sparsity in SPARSITIES]
    assert found.work == min(trial.work for trial in every if trial.loss <= max_loss)
    assert len(judge.asked) <= 9


def test_none_holds() -> None:
    with pytest.raises(LossError, match=r"--max-loss 0.001: .* nearest loses 0.05 \(8 bits, sparsity 0.5"):
        most_compressed(BEGIN, 0.001, Judged(), Trials(None, {}), bits=(8,), sparsities=(0.5,))


def test_it_goes_on_with_what_was_judged(tmp_path: Path) -> None:
    file, first = tmp_path / "trials.json", Judged()
    found = search(0.06, first, Trials(file, {"texts": "a"}))
    again = Judged()
    trials = Trials(file, {"texts": "a"})
    assert search(0.06, again, trials) == found
    assert again.asked == []
    other = Judged()
    search(0.06, other, Trials(file, {"texts": "b"}))
    assert len(other.asked) == len(first.asked)
    trials.forget()
    assert not file.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"made_from": {}}', '{"made_from": {}, "trials": [{"bits": -1}]}'])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "trials.json"
    file.write_text(content, encoding="utf-8")
    assert Trials(file, {}).done == {}
