"""Labels: from what a source holds to class indices or numbers, refusing what does not fit."""

from __future__ import annotations

import math
from typing import Any

from attnpress.tasks.sources import Rows, TaskError
from attnpress.tasks.table import Task


def fit_labels(task: Task, train: Rows, held_out: Rows) -> tuple[tuple[str, ...], list[Any], list[Any]]:
    """Names of the classes, and the labels of both splits as indices of them; or no names, and numbers.

    A task without label names of its own takes those that occur in `train`: integers in numeric order, else sorted.

    Raises:
        TaskError: a label that is no class or no number, a class that only `held_out` has, or a single class.
    """
    if task.kind == "regression":
        return (), _numbers(train), _numbers(held_out)
    names = task.labels or _label_names(train)
    known = {name: index for index, name in enumerate(names)}
    if task.labels:  # published files and the Hub hold indices or names
        known |= {str(index): index for index in range(len(names))}
    owner = f"task {task.name!r}" if task.labels else train.name
    train_labels, eval_labels = (_indices(rows, known, owner) for rows in (train, held_out))
    occurring = set(train_labels)
    if len(occurring) < 2:
        raise TaskError(f"{train.name}: all labels are {train.label[0]!r}; classification needs at least two")
    for row, label in enumerate(eval_labels):
        if label not in occurring:
            raise TaskError(
                f"{held_out.place(row)}: label {names[label]!r} never occurs in the training data {train.name}; "
                "remove the row, or add training examples of it"
            )
    return names, train_labels, eval_labels


def _label_names(rows: Rows) -> tuple[str, ...]:
    found = {key for label in rows.label if (key := _key(label))}
    integers = all(name.removeprefix("-").isdecimal() for name in found)
    return tuple(sorted(found, key=(lambda name: (int(name), name)) if integers else None))


def _key(label: Any) -> str:
    if label is None:
        return ""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()


def _indices(rows: Rows, known: dict[str, int], owner: str) -> list[int]:
    indices = [known.get(_key(label)) for label in rows.label]
    if None in indices:
        row = indices.index(None)
        raise TaskError(
            f"{rows.place(row)}: label {rows.label[row]!r} is not one of those of {owner} ({', '.join(known)}); "
            "mend or remove the row"
        )
    return [index for index in indices if index is not None]


def _numbers(rows: Rows) -> list[float]:
    return [_number(label, rows, row) for row, label in enumerate(rows.label)]


def _number(label: Any, rows: Rows, row: int) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise TaskError(f"{rows.place(row)}: label {label!r} is not a finite number; regression needs one")
    return value
