"""Two workers of one sweep, both killed in the middle of a trial; two others end it, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnpress.cli import main
from attnpress.config import RunConfig
from attnpress.config.recipe import dump_config, load_config, parse_spec
from attnpress.records.run import read_record
from attnpress.records.sweep import SweepRecord, pareto_front, read_sweep
from attnpress.studies.sweep import SearchSpec, SweepSpec
from attnpress.studies.sweep.spec import PruneSpec, trial_folder
from attnpress.studies.sweep.study import open_study

pytest.importorskip("optuna")

TRIALS = 4
SEARCH = SearchSpec(bits=(4, 8), sparsity=(0.3, 0.95), per_layer=("sparsity",))


ROOT = Path(__file__).parents[3]
STEP = 10  # of 30, and past the checkpoint of step 8
KILLED = f"""
import sys
from attnpress.cli import main
from tests.runs.interrupted import at_step
at_step("progressive", {STEP})()
sys.exit(main(sys.argv[1:]))
"""


def start(recipe: Path, folder: Path, *program: str) -> subprocess.Popen[str]:
    command = [sys.executable, *program, "sweep", str(recipe), "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_until_killed(recipe: Path, folder: Path) -> None:
    """Two workers together, each of them killed in the middle of training in its first trial."""
    workers = [start(recipe, folder, "-c", KILLED) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == -signal.SIGKILL, errors


@pytest.fixture(scope="module")
def spec(tiny_recipe: RunConfig) -> SweepSpec:
    return SweepSpec(tiny_recipe, SEARCH, PruneSpec(percentile=100), trials=TRIALS, heartbeat=1)


@pytest.fixture(scope="module")
def folder(spec: SweepSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sweep that two workers began and were killed in, and that two others ended; with what these printed."""
    folder = tmp_path_factory.mktemp("sweep") / "study"
    recipe = folder.with_name("sweep.yaml")
    recipe.write_text(dump_config(spec), encoding="utf-8")
    run_until_killed(recipe, folder)
    ended = [start(recipe, folder, "-m", "attnpress.cli") for _ in range(2)]
    for number, worker in enumerate(ended):
        printed, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors
        (folder / f"printed-{number}.txt").write_text(printed, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def record(folder: Path) -> SweepRecord:
    return read_sweep(folder)


def test_killed_trials_are_run_again_and_none_is_left(folder: Path, spec: SweepSpec, record: SweepRecord) -> None:
    trials = open_study(spec, folder).trials
    killed = [trial for trial in trials if trial.state.name == "FAIL"]
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(killed) == 2
    assert len(killed) + len(done) == len(trials), "none is running or waiting"
    assert len(done) in (TRIALS, TRIALS + 1), "two workers may begin the last one together"
    for trial in killed:
        assert [other.number for other in done if other.params == trial.params], "the same choice, to its end"
    assert [trial.number for trial in record.trials] == [trial.number for trial in done]


def test_every_trial_began_from_the_one_teacher(folder: Path, record: SweepRecord) -> None:
    teacher = read_record(folder / "teacher")
    assert [stage.name for stage in teacher.stages] == ["dense"]
    for trial in record.trials:
        run = read_record(folder / trial.folder)
        assert run.provenance["weights"]["dense"] == teacher.provenance["weights"]["dense"]
        stage = run.stage("progressive")
        assert stage is not None
        assert (stage.metrics["accuracy"], stage.sparsity) == (trial.metric, trial.sparsity)
        asked = [layer["sparsity"] for layer in trial.recipe["layers"].values()]
        assert [layer.pruned for layer in stage.layers] == pytest.approx(asked, abs=0.1)
        assert [entry["step"] for entry in run.training["progressive"]] == list(range(1, 31)), "no step is lost"


def test_the_front_is_what_no_other_beats(record: SweepRecord) -> None:
    front = record.on_front()
    assert front
    assert record.front == pareto_front(record.trials)
    for trial in record.trials:
        assert trial.work is not None
        assert trial.metric is not None
        assert any(
            other.work <= trial.work and other.metric >= trial.metric
            for other in front
            if other.work is not None and other.metric is not None
        )


def test_the_front_is_written_as_recipes_that_validate(folder: Path, spec: SweepSpec, record: SweepRecord) -> None:
    written = sorted((folder / "front").glob("*.yaml"))
    assert [file.name for file in written] == [
        f"{place:02}-trial-{number}.yaml" for place, number in enumerate(record.front, start=1)
    ]
    for file, trial in zip(written, record.on_front(), strict=True):
        assert main(["validate", str(file)]) == 0
        recipe = load_config(file)
        assert recipe == parse_spec(RunConfig, trial.recipe)
        assert recipe.checkpoint == spec.recipe.checkpoint, (
            "it trains its own dense model, or what the sweep began from"
        )
        assert trial_folder(folder, recipe) == folder / trial.folder


def test_weights_of_the_front_stay_and_others_go(folder: Path, record: SweepRecord) -> None:
    for trial in record.trials:
        assert (folder / trial.folder / "progressive" / "model.safetensors").is_file() == (trial.number in record.front)


def test_both_workers_print_the_front(folder: Path, record: SweepRecord) -> None:
    for number in range(2):
        printed = (folder / f"printed-{number}.txt").read_text(encoding="utf-8")
        assert "the least work for each score" in printed
        assert f"recipes: {folder / 'front'}" in printed
    assert "heartbeat" in record.sweep
    assert "storage" not in record.sweep, "it may hold a password"


def test_another_search_in_the_same_storage_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--set", "search.bits=[8]", "--output", str(folder)]
    assert main(["sweep", str(folder.with_name("sweep.yaml")), *other]) == 1
    assert "has other settings (differs in search.bits); choose another --output" in capsys.readouterr().err


def test_a_finished_sweep_goes_on_when_more_is_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(folder.with_name("sweep.yaml")), "--output", str(folder)]) == 0
    assert "trial " not in capsys.readouterr().out.replace("trials", "").split("the least work")[0]
    done = len(read_sweep(folder).trials)
    assert (
        main(["sweep", str(folder.with_name("sweep.yaml")), "--set", f"trials={done + 1}", "--output", str(folder)])
        == 0
    )
    assert len(read_sweep(folder).trials) == done + 1
