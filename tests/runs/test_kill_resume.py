"""Killed at any moment, the same command goes on, and ends as a run that nothing interrupted: bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attnpress.config import RunConfig
from attnpress.config.recipe import dump_config
from attnpress.files import sha256_of
from attnpress.records.run import read_record

PROGRAM = Path(__file__).with_name("interrupted.py")


@pytest.fixture(scope="module")
def recipe(tiny_recipe: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(dump_config(tiny_recipe), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs `whole` and `interrupted`, and the exit status of every attempt."""
    folder = tmp_path_factory.mktemp("kill")
    # One thread: a process that forks must not have started others.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(recipe), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def outcome(run: Path) -> dict[str, Any]:
    """All that a run is judged by: weights, thresholds, samples, figures; not how long it took, nor on what machine."""
    record = dataclasses.asdict(read_record(run))
    for stage in record["stages"]:
        del stage["seconds"]
    del record["provenance"]["machine"]
    weights = {str(file.relative_to(run)): sha256_of(file) for file in sorted(run.rglob("*.safetensors"))}
    logs = {file.name: file.read_text(encoding="utf-8") for file in (run / "logs").iterdir()}
    return {"record": record, "weights": weights, "logs": logs}


def test_every_run_was_really_killed(runs: Path) -> None:
    statuses = json.loads((runs / "statuses.json").read_text(encoding="utf-8"))
    assert (statuses.pop("whole"), statuses.pop("last")) == (0, 0)
    assert len(statuses) == 10
    assert set(statuses.values()) == {-signal.SIGKILL}, statuses


def test_ten_times_killed_is_as_never_killed(runs: Path) -> None:
    whole, interrupted = outcome(runs / "whole"), outcome(runs / "interrupted")
    samples = {f"samples/{stage['name']}.safetensors" for stage in whole["record"]["stages"]}
    assert set(whole["weights"]) == {"dense/model.safetensors", "progressive/model.safetensors"} | samples
    assert interrupted["weights"] == whole["weights"]
    assert interrupted["logs"] == whole["logs"]
    assert interrupted["record"] == whole["record"]


def test_nothing_of_the_killed_runs_stays(runs: Path) -> None:
    left = {str(file.relative_to(runs / "interrupted")) for file in (runs / "interrupted").rglob("*")}
    assert left == {str(file.relative_to(runs / "whole")) for file in (runs / "whole").rglob("*")}


def test_killed_from_outside_while_pruning(runs: Path, recipe: Path, tmp_path: Path) -> None:
    """The command as a user types it, killed by another process."""
    command = [sys.executable, "-m", "attnpress.cli", "compress", str(recipe), "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "checkpoints" / "progressive" / "checkpoint-8" / "complete"
    while running.poll() is None and not checkpoint.is_file():
        time.sleep(0.005)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "progressive").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert outcome(tmp_path) == outcome(runs / "whole")
