"""Labels: from the values of a source to class indices or numbers, and to the class order of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from attnpress.tasks.sources import Rows, TaskError
from attnpress.tasks.table import Task


def fit_labels(task: Task, train: Rows, held_out: Rows) -> tuple[tuple[str, ...], list[Any], list[Any]]:
    """Determine the class names, and convert the labels of both splits to class indices. Regression has no names.

    If the task has no label names of its own, they are those that occur in `train`: integers in numeric order, else
    sorted.

    Raises:
        TaskError: a label is not a class or not a number, a class occurs only in `held_out`, or there is a single
            class.
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


def class_ids(names: Sequence[str], of_model: Sequence[str]) -> tuple[int, ...] | None:
    """Map each class of a task to its index in a model; None if the classes differ.

    Classes are the same if their names match (see `class_ids_by_name`), or if the data number them from 0 to n - 1 in
    the order of the model. A model without names of its own (see `is_generic`) is assumed to use the order of the task.

    Args:
        names: of the task's classes, in its order.
        of_model: names of the model's classes, in its order.
    """
    if (by_name := class_ids_by_name(names, of_model)) is not None or len(names) != len(of_model):
        return by_name
    numbers = [str(number) for number in range(len(of_model))]
    if is_generic(of_model) or (list(names) == numbers and not set(names) & set(of_model)):
        return tuple(range(len(names)))
    return None


def class_ids_by_name(names: Sequence[str], of_model: Sequence[str]) -> tuple[int, ...] | None:
    """Map each class of a task to its index in a model by name; None if the names differ.

    Names match up to case, spaces, hyphens and underscores, unless two classes would then share one name.
    """
    for spelled in (str, _plain):
        known = {spelled(name): number for number, name in enumerate(of_model)}
        found = tuple(known.get(spelled(name), -1) for name in names)
        if sorted(found) == list(range(len(of_model))):
            return tuple(found)
    return None


def is_generic(of_model: Sequence[str]) -> bool:
    """True if a model's class names are only numbers: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(name in (f"LABEL_{number}", str(number)) for number, name in enumerate(of_model))


def _plain(name: str) -> str:
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", "", name.strip().casefold())


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
            "correct or remove the row"
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
