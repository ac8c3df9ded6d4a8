"""The study: trials in a database shared by workers, through Optuna; and early stopping of trials.

Optuna is imported when a sweep is opened; it is part of the extra `sweep`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attnpress.config.recipe import spec_to_dict
from attnpress.locks import locked
from attnpress.runs.folder import differences
from attnpress.studies.sweep.spec import PruneSpec, SweepSpec

if TYPE_CHECKING:
    import optuna

RETRIES, SILENT_BEATS = 3, 4
"""How often the trial of a dead worker is repeated, and after how many missed heartbeats."""

WATCHED, ASKED_WORK, SPARSITY, ERROR = "watched", "asked_work", "sparsity", "error"
"""Values stored with a trial, besides its parameters and objectives."""


class SweepError(ValueError):
    """A sweep cannot be run or resumed. The message gives the reason and says what to do."""


def open_study(sweep: SweepSpec, output: Path) -> optuna.Study:
    """Create or resume the study of a sweep.

    Raises:
        SweepError: the extra is not installed, the storage cannot be reached, or it holds a different sweep of that
            name.
    """
    if importlib.util.find_spec("optuna") is None:
        raise SweepError("a sweep needs optuna: pip install 'attnpress[sweep]'")
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with locked(output / ".study.lock"):  # two workers that start together must not both create the tables
            study = optuna.create_study(
                storage=_storage(sweep, output),
                study_name=sweep.name,
                directions=["maximize", "minimize"],
                sampler=optuna.samplers.TPESampler(),
                load_if_exists=True,
            )
            _claim(study, sweep)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        raise SweepError(f"storage: cannot be used: {str(error).splitlines()[0]}") from None
    return study


def _storage(sweep: SweepSpec, output: Path) -> optuna.storages.RDBStorage:
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    url = sweep.storage or f"sqlite:///{output.resolve() / 'study.db'}"
    patient = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    with warnings.catch_warnings():  # retries are "experimental" since Optuna 2.8
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(
            url,
            engine_kwargs=patient,
            heartbeat_interval=sweep.heartbeat,
            grace_period=SILENT_BEATS * sweep.heartbeat,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
        )


def _claim(study: optuna.Study, sweep: SweepSpec) -> None:
    now = what_is_searched(sweep)
    changed = differences(study.user_attrs.setdefault("sweep", now), now)
    if changed:
        raise SweepError(
            f"the study {sweep.name!r} in this storage has other settings (differs in {', '.join(changed)}); "
            "choose another --output, or another name or storage"
        )
    study.set_user_attr("sweep", now)


def what_is_searched(sweep: SweepSpec) -> dict[str, Any]:
    """The sweep as plain data, without settings that may differ between workers: locations, number of trials."""
    plain = spec_to_dict(sweep)
    recipe = {key: value for key, value in plain["recipe"].items() if key not in ("checkpoint", "report_to")}
    places = ("data_dir", "train_file", "eval_file")
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in places}
    return {"recipe": recipe, "search": plain["search"]}


def check_teacher(study: optuna.Study, weights: str) -> None:
    """Refuse trials from a different dense model than earlier ones, since they are not comparable.

    Args:
        weights: hash of the dense model's weights.

    Raises:
        SweepError: the dense model is a different one.
    """
    known = study.user_attrs.get("teacher", weights)
    if known != weights:
        raise SweepError(
            f"the dense teacher here (sha256 {weights[:12]}) is not the one that the other trials began from "
            f"({known[:12]}); copy their teacher/dense folder here and name it in recipe.checkpoint"
        )
    study.set_user_attr("teacher", weights)


def hopeless(study: optuna.Study, work: float, step: int, value: float, prune: PruneSpec) -> bool:
    """True if a trial should be stopped, by Optuna's percentile pruner among finished trials with no more work.

    A trial that is worse than most of those with no more work will hardly reach the front; one that is worse than more
    expensive trials may. Only the newest value counts, since earlier ones were measured at lower sparsity.

    Args:
        work: requested by the trial.
        step: of training, at which the value was measured.
        value: metric on the watched rows.
    """
    import optuna

    cheaper = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if trial.user_attrs[ASKED_WORK] <= work
    ]
    # Optuna's pruners support one objective, so they get an in-memory study with only the metric.
    shown = optuna.create_study(direction="maximize")
    shown.add_trials(
        optuna.create_trial(value=trial.values[0], intermediate_values=_by_step(trial.user_attrs[WATCHED]))
        for trial in cheaper
    )
    pruner = optuna.pruners.PercentilePruner(prune.percentile, n_startup_trials=prune.startup)
    running = optuna.create_trial(state=optuna.trial.TrialState.RUNNING, intermediate_values={step: value})
    return bool(pruner.prune(shown, running))


def _by_step(watched: Mapping[str, float]) -> dict[int, float]:
    return {int(step): value for step, value in watched.items()}


class WatchCallback(TrainerCallback):
    """Reports the watched metric to the study during training, and stops hopeless trials.

    Args:
        trial: the current trial, with its requested work.
        prune: when to stop early.
        headline: name of the metric.
    """

    def __init__(self, trial: optuna.Trial, prune: PruneSpec, headline: str) -> None:
        self.trial, self.prune, self.key = trial, prune, f"eval_{headline}"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Report the metric if it was logged.

        Raises:
            optuna.TrialPruned: the trial is stopped.
        """
        if not logs or self.key not in logs:
            return
        import optuna

        step, value = state.global_step, float(logs[self.key])
        self.trial.set_user_attr(WATCHED, {**self.trial.user_attrs.get(WATCHED, {}), str(step): value})
        late = step >= self.prune.after * state.max_steps and step < state.max_steps
        if late and hopeless(self.trial.study, self.trial.user_attrs[ASKED_WORK], step, value, self.prune):
            raise optuna.TrialPruned(f"{value:.2f} at step {step}")
