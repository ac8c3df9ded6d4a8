"""Runs that share one dense teacher. The first process trains it; all runs start from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from transformers import TrainerCallback

from attnpress.config import RunConfig
from attnpress.locks import alone
from attnpress.records.run import Record
from attnpress.runs.compression import compress
from attnpress.studies.cells import Notify


def train_teacher(
    recipe: RunConfig, folder: Path, notify: Notify, stages: Collection[str] = ("dense",)
) -> tuple[Record, Path]:
    """Train the dense model of a recipe, resume its training, or wait for the process that trains it.

    Args:
        folder: its run folder.
        stages: "dense", and other stages of the recipe to run there.

    Returns:
        Its record, and the folder of its weights (the recipe's checkpoint, if it has one).
    """
    with alone(folder, lambda: notify("waiting for the worker that trains the dense teacher")):
        record = compress(recipe, folder, notify, stages=stages)
    return record, recipe.checkpoint or folder / "dense"


def train_student(
    recipe: RunConfig,
    dense: Path,
    folder: Path,
    notify: Notify,
    *,
    stage: str = "progressive",
    callbacks: Sequence[TrainerCallback] = (),
) -> Record:
    """Run one compressing stage of a recipe from the teacher's weights, or resume it.

    Args:
        dense: the weights, from `train_teacher`.
        folder: its run folder.
    """
    config = dataclasses.replace(recipe, checkpoint=dense)
    with alone(folder, lambda: notify("waiting for the same recipe")):
        return compress(config, folder, lambda _: None, stages=(stage,), callbacks=callbacks)
