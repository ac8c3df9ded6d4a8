"""Validation of a `DataSpec` before any row is read or model loaded, and the location of its files."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from attnpress.config import DataSpec
from attnpress.tasks import movie
from attnpress.tasks.lines import SUFFIXES, TaskError, ending
from attnpress.tasks.metrics import METRICS
from attnpress.tasks.table import CUSTOM, TASKS, Layout, Split, Task


def check_data(data: DataSpec) -> Task:
    """Validate `data` as far as possible without reading rows, and return its task.

    Raises:
        TaskError: unknown task or metric, missing file or folder, or options that the task does not accept.
    """
    task = _custom_task(data) if data.task == CUSTOM else _named_task(data)
    if data.held_out is not None:
        _check_held_out(task, data)
    for key in ("train_file", "eval_file"):
        if path := getattr(data, key):
            _check_file(key, path, (".json",) if task.kind == "qa" else SUFFIXES)
    if data.data_dir is not None:
        _check_folder(task, data, data.data_dir)
    return task


def own_file(data: DataSpec, split: Split) -> Path | None:
    """The user's own file for a split; None if there is none."""
    return data.train_file if split == "train" else data.eval_file


def find_published(layout: Layout, split: Split, data_dir: Path) -> Path:
    """Find the published file of a split, in `data_dir` or in the task's folder within it.

    Raises:
        TaskError: there is no such file, or more than one.
    """
    pattern = layout.train if split == "train" else layout.eval
    folders = [data_dir, data_dir / layout.folder, data_dir / "glue" / layout.folder]
    found = next((paths for folder in folders if (paths := sorted(folder.glob(pattern)))), [])
    whole = [path for path in found if path.name == pattern.replace("*", "")] or found
    if len(whole) > 1:
        names = ", ".join(path.name for path in whole)
        raise TaskError(f"data.data_dir: {whole[0].parent} holds several files ({names}); set data.{split}_file to one")
    if not whole:
        raise TaskError(f"data.data_dir: no {pattern} in {data_dir} or its folder {layout.folder}; put it there")
    return whole[0]


def _named_task(data: DataSpec) -> Task:
    task = TASKS.get(data.task)
    if task is None:
        raise TaskError(f"data.task: unknown task {data.task!r}; {_nearest(data.task, [*TASKS, CUSTOM])}")
    if data.metric and (data.metric not in task.metrics or task.kind == "qa"):
        mend = "remove data.metric" if task.kind == "qa" or len(task.metrics) < 2 else "name one of them, or none"
        raise TaskError(f"data.metric: task {task.name!r} has its own ({', '.join(task.metrics)}); {mend}")
    named = [f"data.{key}" for key in ("text", "text_pair", "label") if getattr(data, key)]
    if named and (task.kind == "qa" or not (data.train_file or data.eval_file)):
        mend = "remove them" if task.kind == "qa" else "set data.train_file or data.eval_file, or remove them"
        raise TaskError(f"{', '.join(named)}: task {task.name!r} knows its own columns; {mend}")
    if data.metric:
        others = [metric for metric in task.metrics if metric != data.metric]
        return dataclasses.replace(task, metrics=(data.metric, *others))
    return task


def _check_held_out(task: Task, data: DataSpec) -> None:
    if task.kind == "qa":
        raise TaskError(
            f"data.held_out: questions of task {task.name!r} share their texts, so that a part of them is not unseen; "
            "remove it, and set data.eval_file"
        )
    if data.eval_file:
        raise TaskError("data.held_out, data.eval_file: both say what to evaluate on; remove one of them")


def _custom_task(data: DataSpec) -> Task:
    files = ("train_file", "eval_file") if data.held_out is None else ("train_file",)
    needed = (*files, "text", "label", "metric")
    missing = [f"data.{key}" for key in needed if not getattr(data, key)]
    if missing or data.text is None or data.label is None or data.metric is None:
        raise TaskError(f"{', '.join(missing)}: needed by task 'custom'")
    if data.data_dir:
        raise TaskError("data.data_dir: task 'custom' reads data.train_file and data.eval_file; remove data.data_dir")
    if data.metric not in METRICS:
        raise TaskError(f"data.metric: unknown metric {data.metric!r}; {_nearest(data.metric, METRICS)}")
    text = (data.text, data.text_pair) if data.text_pair else (data.text,)
    return Task(CUSTOM, "your own files", METRICS[data.metric].kind, (data.metric,), text=text, label=data.label)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _check_file(key: str, path: Path, suffixes: Sequence[str]) -> None:
    if not path.is_file():
        raise TaskError(f"data.{key}: {path} is not a file; give the path of an existing one")
    if ending(path) not in suffixes:
        raise TaskError(f"data.{key}: {path.name} has none of the endings {', '.join(suffixes)}; convert or rename it")


def _check_folder(task: Task, data: DataSpec, folder: Path) -> None:
    if not folder.is_dir():
        raise TaskError(f"data.data_dir: {folder} is not a folder; give an existing one, or remove it to use the Hub")
    if task.embedded and not (folder / movie.ARCHIVE).is_file():
        raise TaskError(f"data.data_dir: no {movie.ARCHIVE} in {folder}; put it there, or remove data.data_dir")
    for split in get_args(Split) if data.held_out is None else ("train",):
        if task.local and not own_file(data, split):
            find_published(task.local, split, folder)
