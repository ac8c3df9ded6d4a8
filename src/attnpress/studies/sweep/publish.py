"""Results of a sweep: its record, and the recipes of its front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnpress.config import RunConfig
from attnpress.config.recipe import dump_config, parse_spec, spec_to_dict
from attnpress.files import remove_folder, whole_folder, write_text
from attnpress.locks import locked
from attnpress.records.reading import to_json
from attnpress.records.run import Record
from attnpress.records.sweep import FILE, SweepRecord, TrialRecord, pareto_front
from attnpress.studies.sweep.spec import SweepSpec, choose, describe, trial_folder
from attnpress.studies.sweep.study import ERROR, SPARSITY, WATCHED

if TYPE_CHECKING:
    import optuna

FRONT = "front"
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def publish(study: optuna.Study, sweep: SweepSpec, output: Path, layers: int, teacher: Record) -> SweepRecord:
    """Write `sweep.json` and the recipes of the current front; delete the weights of trials that are not on it.

    Everything is read from the study, so any worker can publish trials of other machines too.

    Args:
        layers: number of attention modules.
        teacher: record of the dense stage.
    """
    with locked(output / ".publish.lock"):
        record = sweep_record(study, sweep, output, layers, teacher)
        with whole_folder(output / FRONT, "front") as scratch:
            for place, trial in enumerate(record.on_front(), start=1):
                write_text(scratch / f"{place:02}-trial-{trial.number}.yaml", _recipe_text(record, trial))
        write_text(output / FILE, to_json(record))
        _drop_weights(record, output)
    return record


def sweep_record(study: optuna.Study, sweep: SweepSpec, output: Path, layers: int, teacher: Record) -> SweepRecord:
    """The study as plain data, without running trials and those repeated under another number."""
    found = [
        _trial_record(trial, sweep, output, layers)
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in ("COMPLETE", "PRUNED") or ERROR in trial.user_attrs
    ]
    dense = teacher.stage("dense")
    assert dense is not None
    plain = {key: value for key, value in spec_to_dict(sweep).items() if key != "storage"}  # it may contain a password
    return SweepRecord(
        sweep.recipe.data.task,
        teacher.headline,
        dense.metrics[teacher.headline],
        teacher.majority,
        teacher.provenance,
        plain,
        found,
        pareto_front(found),
    )


def _trial_record(trial: optuna.trial.FrozenTrial, sweep: SweepSpec, output: Path, layers: int) -> TrialRecord:
    import optuna

    recipe = choose(optuna.trial.FixedTrial(trial.params), sweep.search, sweep.recipe, layers)
    complete, known = trial.state.name == "COMPLETE", trial.user_attrs
    return TrialRecord(
        trial.number,
        STATES[trial.state.name],
        describe(recipe),
        dict(trial.params),
        trial.values[0] if complete else None,
        trial.values[1] if complete else None,
        known[SPARSITY] if complete else None,
        dict(known.get(WATCHED, {})),
        spec_to_dict(recipe),
        str(trial_folder(output, recipe).relative_to(output)),
        known.get(ERROR),
    )


def _recipe_text(record: SweepRecord, trial: TrialRecord) -> str:
    return (
        f"# {record.headline} {trial.metric:.2f} (dense {record.dense:.2f}) with {trial.work:.2%} of the dense bit "
        f"operations: {trial.chosen}\n"
        f"# Trial {trial.number} of a sweep. Trained here: {trial.folder}/progressive, from teacher/dense.\n"
        f"{dump_config(parse_spec(RunConfig, trial.recipe))}"
    )


def _drop_weights(record: SweepRecord, output: Path) -> None:
    """Delete weights to save disk space; recipes and records of all trials are kept."""
    kept = {trial.folder for trial in record.on_front()}
    for trial in record.trials:
        if trial.state == "complete" and trial.folder not in kept:
            remove_folder(output / trial.folder / "progressive", "model")
