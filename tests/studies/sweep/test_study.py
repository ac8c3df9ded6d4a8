"""Which trials are given up, what an error leaves, and what is refused before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnpress.config import ConfigError, RunConfig
from attnpress.models.hub import ModelError
from attnpress.records.sweep import TrialRecord, pareto_front, read_sweep
from attnpress.runs.compression import compress
from attnpress.studies.sweep import SearchSpec, SweepSpec, sweep
from attnpress.studies.sweep.spec import PruneSpec
from attnpress.studies.sweep.study import ASKED_WORK, WATCHED, SweepError, check_teacher, hopeless, open_study
from attnpress.studies.sweep.worker import Worker
from attnpress.training.callbacks import DivergedError

optuna = pytest.importorskip("optuna")

SPARSITY = SearchSpec(sparsity=(0.3, 0.9))


@pytest.fixture
def spec(from_dense: RunConfig) -> SweepSpec:
    """From a dense model that is there, half an epoch a trial: eight steps, watched at most of them."""
    return SweepSpec(from_dense, SPARSITY, trials=2, heartbeat=5)


def add(study: Any, work: float, watched: dict[int, float]) -> None:
    attributes = {ASKED_WORK: work, WATCHED: {str(step): value for step, value in watched.items()}}
    study.add_trial(optuna.create_trial(values=[list(watched.values())[-1], work], user_attrs=attributes))


@pytest.mark.parametrize(
    ("work", "value", "given_up"),
    [
        (0.03, 79.0, True),  # worse than the median, 80, of what costs no more
        (0.03, 81.0, False),
        (0.015, 10.0, False),  # only two trials cost no more: too few to judge by
    ],
)
def test_a_trial_is_given_up_if_most_that_cost_no_more_are_better(work: float, value: float, given_up: bool) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for cheap, score in ((0.01, 79.5), (0.01, 80.0), (0.02, 84.0), (0.05, 99.0), (0.06, 99.0)):
        add(study, cheap, {10: 90.0, 20: score})
    prune = PruneSpec(percentile=50, startup=3)
    assert hopeless(study, work, 20, value, prune) is given_up
    assert not hopeless(study, work, 15, 0.0, prune), "no other was watched at that step"


def test_a_worse_trial_is_pruned_while_it_trains(
    from_dense: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnpress.studies.sweep.study.hopeless", lambda *_: True)
    told: list[str] = []
    spec = SweepSpec(from_dense, SPARSITY, PruneSpec(after=0.3), trials=1)
    record = sweep(spec, tmp_path, told.append)
    (trial,) = record.trials
    assert (trial.state, trial.metric, record.front) == ("pruned", None, [])
    steps = [int(step) for step in trial.watched]
    assert 0.3 * 8 <= steps[-1] < 8, "in the middle of its eight steps"
    assert f"trial 0: given up, accuracy {trial.watched[str(steps[-1])]:.2f} at step {steps[-1]}" in told
    assert not (tmp_path / trial.folder / "checkpoints").exists()
    assert not (tmp_path / trial.folder / "progressive").exists()


def failing(real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Compression whose first trial ends in an error."""
    calls: list[Path] = []

    def trapped(config: RunConfig, output: Path, *args: Any, **kwargs: Any) -> Any:
        calls.append(output)
        if len(calls) == 2:  # the first is the teacher
            raise error
        return real(config, output, *args, **kwargs)

    return trapped


def test_a_trial_that_diverges_is_counted_and_the_sweep_goes_on(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnpress.studies.teacher.compress", failing(compress, DivergedError("not finite")))
    record = sweep(spec, tmp_path, lambda _: None)
    assert [(trial.state, trial.error) for trial in record.trials] == [("failed", "not finite"), ("complete", None)]
    assert record == read_sweep(tmp_path)


def test_a_trial_that_is_interrupted_is_run_again(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnpress.studies.teacher.compress", failing(compress, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        sweep(spec, tmp_path, lambda _: None)
    record = sweep(spec, tmp_path, lambda _: None)
    interrupted, again, *_ = open_study(spec, tmp_path).trials
    assert (interrupted.state.name, again.state.name) == ("FAIL", "COMPLETE")
    assert interrupted.params == again.params
    assert [trial.number for trial in record.trials] == [1, 2]


def test_a_worker_that_was_taken_for_dead_goes_on(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trial was failed, and queued, behind its back: a laptop that slept."""
    real, told, slept = Worker.train, list[str](), list[int]()

    def train(self: Any, trial: Any, recipe: RunConfig, folder: Path) -> tuple[float, float]:
        found = real(self, trial, recipe, folder)
        if not slept:
            slept.append(trial.number)
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(trial.params)
        return found

    monkeypatch.setattr(Worker, "train", train)
    record = sweep(spec, tmp_path, told.append)
    assert any("trial 0: this worker was silent for too long" in line for line in told)
    assert [trial.number for trial in record.trials] == [1, 2]


def test_other_teachers_are_refused(tmp_path: Path, spec: SweepSpec) -> None:
    study = open_study(spec, tmp_path)
    check_teacher(study, "a" * 64)
    check_teacher(study, "a" * 64)
    with pytest.raises(SweepError, match=r"the dense teacher here \(sha256 bbbbbbbbbbbb\) is not the one"):
        check_teacher(study, "b" * 64)


def refused(spec: SweepSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def no_training(*_: Any, **__: Any) -> None:
        raise AssertionError("went on to train")

    monkeypatch.setattr("attnpress.studies.teacher.compress", no_training)
    with pytest.raises((SweepError, ConfigError, ModelError)) as error:
        sweep(spec, folder)
    return str(error.value)


def test_what_cannot_run_is_refused_before_training(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = dataclasses.replace(spec.recipe, model="./absent", checkpoint=None)
    assert "no folder ./absent" in refused(dataclasses.replace(spec, recipe=nowhere), tmp_path, monkeypatch)
    unknown = dataclasses.replace(spec, storage="nosuchdb://host/study")
    assert "storage: cannot be used" in refused(unknown, tmp_path, monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "instead of torchrun, start the command several times" in refused(spec, tmp_path, monkeypatch)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'attnpress[sweep]'" in refused(spec, tmp_path, monkeypatch)


def trial(number: int, metric: float | None, work: float | None) -> TrialRecord:
    return TrialRecord(number, "complete", "", {}, metric, work, 0.5, {}, {}, "")


def test_a_front_holds_no_trial_that_another_beats() -> None:
    found = [trial(0, 80.0, 0.03), trial(1, 80.0, 0.02), trial(2, 85.0, 0.05), trial(3, 79.0, 0.025)]
    equal = [trial(4, 85.0, 0.05), trial(5, 70.0, 0.01), trial(6, None, None)]
    assert pareto_front([*found, *equal]) == [5, 1, 2]
