"""One worker of a sweep: it takes trials from the study and trains them until all are done."""

from __future__ import annotations

import collections
import dataclasses
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from attnpress.config import DENSE, RunConfig
from attnpress.files import take_folder
from attnpress.models.binding import attentions, bind
from attnpress.models.loading import load_backbone, resolve_model
from attnpress.records.reading import RecordError
from attnpress.records.run import Record
from attnpress.records.sweep import SweepRecord, read_sweep
from attnpress.studies.cells import Notify, check_one_process
from attnpress.studies.sweep.publish import publish
from attnpress.studies.sweep.spec import SweepSpec, asked_work, choose, describe, trial_folder
from attnpress.studies.sweep.study import (
    ASKED_WORK,
    ERROR,
    SPARSITY,
    WATCHED,
    WatchCallback,
    check_teacher,
    open_study,
)
from attnpress.studies.teacher import train_student, train_teacher
from attnpress.tasks import check_data
from attnpress.training.callbacks import DivergedError
from attnpress.training.progress import check_trackers

if TYPE_CHECKING:
    import optuna


def sweep(spec: SweepSpec, output: Path, notify: Notify = print) -> SweepRecord:
    """Start or resume a search. Any number of processes may do so at once, in one folder or with one storage.

    Args:
        spec: what to search.
        output: folder of the sweep: the dense teacher, a run folder for each trial, `sweep.json`, and `front/`.
        notify: receives progress messages.

    Returns:
        The record, also written to `output/sweep.json`.

    Raises:
        OutputError: the folder contains something other than a sweep.
        SweepError, ConfigError, TaskError, ModelError: found before any training starts.
    """
    check_one_process()
    check_data(spec.recipe.data)
    check_trackers(spec.recipe.report_to)
    base = resolve_model(str(spec.recipe.checkpoint or spec.recipe.model))
    layers = len(attentions(bind(load_backbone(base), DENSE)))
    take_folder(output, "sweep", _is_sweep)
    study = open_study(spec, output)
    teacher, dense = train_teacher(spec.recipe, output / "teacher", notify)
    check_teacher(study, teacher.provenance["weights"]["dense"])
    return Worker(spec, output, notify, study, layers, teacher, dense.resolve()).run()


def _is_sweep(folder: Path) -> bool:
    try:
        read_sweep(folder)
    except RecordError:
        return False
    return True


@dataclasses.dataclass
class Worker:
    """State shared by the trials of a worker.

    Attributes:
        layers: number of attention modules.
        teacher: record of the dense stage.
        dense: folder of the dense teacher.
        trained: number of the last trial that was trained to the end.
    """

    spec: SweepSpec
    output: Path
    notify: Notify
    study: optuna.Study
    layers: int
    teacher: Record
    dense: Path
    trained: int | None = None

    def run(self) -> SweepRecord:
        """Train trials until there are enough; then wait for other workers, and repeat trials of dead ones."""
        told = False
        while True:
            waiting, running, done = self.count()
            if waiting or running + done < self.spec.trials:
                self.train_one()
                told = False
            elif not running:
                return self.publish()
            else:
                if not told:
                    self.notify(f"waiting for other workers' trials, {running} left")
                told = True
                time.sleep(self.spec.heartbeat)

    def count(self) -> tuple[int, int, int]:
        """Numbers of trials waiting to be repeated, running, and done; trials of dead workers are released first.

        A trial that failed by itself is done. One whose worker died or was stopped is not; another trial replaces it.
        """
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        trials = self.study.get_trials(deepcopy=False)
        states = collections.Counter(trial.state.name for trial in trials)
        failed = sum(trial.state.name == "FAIL" and ERROR in trial.user_attrs for trial in trials)
        return states["WAITING"], states["RUNNING"], states["COMPLETE"] + states["PRUNED"] + failed

    def train_one(self) -> None:
        """Train one trial chosen by the study, and publish it."""
        self.trained = None
        try:
            self.study.optimize(self.objective, n_trials=1, catch=(DivergedError,))
        except (ValueError, AssertionError):  # Optuna raises this for a trial that another worker finished
            if self.trained is None:
                raise
            self.notify(f"trial {self.trained}: this worker was silent for too long; another one has taken it over")
        self.publish()

    def publish(self) -> SweepRecord:
        """Write the record and the front."""
        return publish(self.study, self.spec, self.output, self.layers, self.teacher)

    def objective(self, trial: optuna.Trial) -> tuple[float, float]:
        """Metric and remaining work of one trial. Its folder follows from its recipe, so a repeated trial resumes."""
        import optuna

        recipe = choose(trial, self.spec.search, self.spec.recipe, self.layers)
        trial.set_user_attr(ASKED_WORK, asked_work(recipe, self.layers))
        trial.set_user_attr(WATCHED, trial.user_attrs.get(WATCHED, {}))
        self.notify(f"trial {trial.number}, {self.count()[2]} of {self.spec.trials} done: {describe(recipe)}")
        folder = trial_folder(self.output, recipe)
        try:
            metric, work = self.train(trial, recipe, folder)
        except optuna.TrialPruned as reason:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            self.notify(f"trial {trial.number}: given up, {self.teacher.headline} {reason}")
            raise
        except DivergedError as error:
            trial.set_user_attr(ERROR, str(error))
            self.notify(f"trial {trial.number}: failed, {error}")
            raise
        except KeyboardInterrupt:
            self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
            raise
        self.notify(f"trial {trial.number}: {self.teacher.headline} {metric:.2f}, {work:.2%} of the bit operations")
        self.trained = trial.number
        return metric, work

    def train(self, trial: optuna.Trial, recipe: RunConfig, folder: Path) -> tuple[float, float]:
        """Compress by the recipe, from the shared teacher."""
        watch = WatchCallback(trial, self.spec.prune, self.teacher.headline)
        record = train_student(recipe, self.dense, folder, self.notify, callbacks=[watch])
        stage = record.stage("progressive")
        assert stage is not None
        trial.set_user_attr(SPARSITY, stage.sparsity)
        work = stage.work["bit_operations_remaining"] / stage.work["bit_operations_dense"]
        return stage.metrics[record.headline], work
