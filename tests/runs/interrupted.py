"""A program that runs `attnpress compress` over and over in one folder, each run killed at another moment by SIGKILL.

Usage: python interrupted.py RECIPE.yaml FOLDER: runs once in FOLDER/whole, and many times in FOLDER/interrupted. Exit
statuses by moment go to FOLDER/statuses.json. Each run is a process of its own, forked when all imports are done.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

import attnpress.cli
import attnpress.runs.compression
import attnpress.training.trainer

journey: Any = sys.modules["attnpress.runs.compression"]

Trap = Callable[[], None]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, due: Callable[..., bool] = lambda *_: True) -> Trap:
    """A trap that kills when `owner.name` is called with arguments for which the moment is `due`."""

    def spring() -> None:
        real = getattr(owner, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            if due(*args):
                kill()
            return real(*args, **kwargs)

        setattr(owner, name, trapped)

    return spring


def at_step(stage: str, step: int) -> Trap:
    """A trap in the middle of training."""

    def spring() -> None:
        def trapped(_: Any, args: Any, state: Any, control: Any, **__: Any) -> None:
            if Path(args.output_dir).name == stage and state.global_step == step:
                kill()

        callback: Any = attnpress.training.callbacks.CheckpointCallback
        callback.on_step_begin = trapped

    return spring


def recording(stage: str) -> Trap:
    """A trap where the weights of a stage lie in place, and its record is about to."""

    def due(path: Path, text: str) -> bool:
        return path.name == "record.json" and [done["name"] for done in json.loads(text)["stages"]][-1:] == [stage]

    return before(journey, "write_text", due)


def saving(stage: str, step: int) -> Trap:
    """A trap in the middle of writing a checkpoint."""

    def due(trainer: transformers.Trainer, folder: str) -> bool:
        return Path(folder).parts[-2:] == (stage, f"checkpoint-{step}")

    return before(transformers.Trainer, "_save_rng_state", due)


MOMENTS: dict[str, Trap] = {
    "dense: before any checkpoint": at_step("dense", 5),
    "dense: second epoch": at_step("dense", 21),
    "dense: weights saved, record not": recording("dense"),
    "between stages": before(journey, "_compressed", lambda run, change: change(run.config.attention).sparsity > 0),
    "progressive: before any checkpoint": at_step("progressive", 3),
    "progressive: in the middle of a checkpoint": saving("progressive", 16),
    "progressive: second epoch": at_step("progressive", 27),
    "progressive: trained, thresholds not frozen": before(journey, "fit_thresholds"),
    "progressive: in the middle of the final weights": before(
        journey, "_write_model", lambda run, model, folder: "progressive" in folder.name
    ),
    "progressive: weights saved, record not": recording("progressive"),
}


def attempt(recipe: str, output: Path, trap: Trap) -> int:
    """Exit status of one run, negative when a signal killed it."""
    child = os.fork()
    if child == 0:
        trap()
        status = attnpress.cli.main(["compress", recipe, "--output", str(output)])
        sys.stdout.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(recipe: str, folder: Path) -> None:
    statuses = {"whole": attempt(recipe, folder / "whole", lambda: None)}
    for name, trap in MOMENTS.items():
        statuses[name] = attempt(recipe, folder / "interrupted", trap)
    statuses["last"] = attempt(recipe, folder / "interrupted", lambda: None)
    (folder / "statuses.json").write_text(json.dumps(statuses), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
