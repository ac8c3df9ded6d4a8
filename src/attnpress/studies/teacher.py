"""Runs that share one dense teacher: it is trained once, by the process that comes first, and they begin from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from attnpress.config import ConfigError, RunConfig
from attnpress.records.run import Record
from attnpress.runs.compression import compress

Notify = Callable[[str], None]


def train_teacher(
    recipe: RunConfig, folder: Path, notify: Notify, stages: Collection[str] = ("dense",)
) -> tuple[Record, Path]:
    """Train the dense model of a recipe, or go on with it, or wait for the process that does.

    Args:
        folder: its run folder.
        stages: "dense", and what else of the recipe is to be run there.

    Returns:
        Its record, and the folder of its weights: the recipe's own checkpoint where it has one.
    """
    with alone(folder, lambda: notify("waiting for the worker that trains the dense teacher")):
        record = compress(recipe, folder, notify, stages=stages)
    return record, recipe.checkpoint or folder / "dense"


def train_student(
    recipe: RunConfig, dense: Path, folder: Path, notify: Notify, *,
    stage: str = "progressive", callbacks: Sequence[TrainerCallback] = (),
) -> Record:  # fmt: skip
    """Run one compressing stage of a recipe from the teacher's weights, or go on with it.

    Args:
        dense: the weights, as `train_teacher` gives them.
        folder: its run folder.
    """
    config = dataclasses.replace(recipe, checkpoint=dense)
    with alone(folder, lambda: notify("waiting for the same recipe")):
        return compress(config, folder, lambda _: None, stages=(stage,), callbacks=callbacks)


def check_one_process() -> None:
    """Refuse torchrun where several processes take a run each.

    Raises:
        ConfigError: this process is one of many.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a run is trained by one process: instead of torchrun, start the command several times")


@contextmanager
def alone(folder: Path, tell: Callable[[], None]) -> Iterator[None]:
    """One process at a time works for a run folder; a process that dies lets go."""
    held = _lock(folder)
    try:
        held.acquire(timeout=0)
    except Timeout:
        tell()
        held.acquire()
    try:
        yield
    finally:
        held.release()


def is_held(folder: Path) -> bool:
    """Whether a process works for a run folder, inside `alone`."""
    try:
        with _lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))
