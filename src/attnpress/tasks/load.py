"""Load a task: read rows, fit labels, tokenize text, bind metrics. Everything stays in memory, without cache files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpress.config import DataSpec
from attnpress.tasks import squad
from attnpress.tasks.check import check_data, find_published, own_file
from attnpress.tasks.labels import class_ids, fit_labels, is_generic
from attnpress.tasks.metrics import first_output, score, sentence_metrics
from attnpress.tasks.sources import Columns, Rows, TaskError, read_file, read_hub
from attnpress.tasks.table import Split, Task
from attnpress.tasks.tokens import encode

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase

CHUNK = 1000  # examples tokenized at once; limits memory


Metrics = Callable[["EvalPrediction"], dict[str, float]]


@dataclass(frozen=True)
class TaskData:
    """The data and metrics of a task for training and evaluation.

    Attributes:
        task: row of the table of tasks.
        train, eval: tokenized, unpadded rows: input_ids, attention_mask, token_type_ids where the model has them, and
            labels (int or float), or start_positions and end_positions. In qa, a row is a window.
        label_names: class names by index, in the order of the task; after `numbered_as`, in that of a model. Empty in
            regression and qa.
        fingerprint: sha256 of the sources of "train" and "eval"; of the rows when they come from the Hub.
        majority: headline metric, in points, of always predicting the most frequent training label; None for other
            kinds.
        collate: pads a list of rows to the longest one and returns tensors.
        compute_metrics: metrics in points from a Trainer's predictions; the first key is the headline.
        thin: every n-th example of the evaluation split (in qa, with all windows of the question), and its metrics.
        question_scores: in qa, F1 of each question, 0 to 1, from the input of `compute_metrics`; None in other kinds.
    """

    task: Task
    train: Dataset
    eval: Dataset
    label_names: tuple[str, ...]
    fingerprint: dict[str, str]
    majority: float | None
    collate: Callable[[list[dict[str, Any]]], Any]
    compute_metrics: Metrics
    thin: Callable[[int], tuple[Dataset, Metrics]]
    question_scores: Callable[[EvalPrediction], list[float]] | None = None

    def watched(self, rows: int) -> TaskData:
        """The same task on at most this many evaluation examples, evenly spaced."""
        held_out, compute_metrics = self.thin(rows)
        return dataclasses.replace(self, eval=held_out, compute_metrics=compute_metrics, question_scores=None)

    def numbered_as(self, of_model: Sequence[str]) -> TaskData | None:
        """The same task with classes in the order of a model; None if the classes differ.

        Metrics remain those of the task: the positive class does not depend on a model's order.

        Args:
            of_model: names of the model's classes, in its order; see `class_ids`.
        """
        ids = class_ids(self.label_names, of_model)
        if ids is None:
            return None
        names = self.label_names if is_generic(of_model) else tuple(of_model)
        if list(ids) == sorted(ids):
            return dataclasses.replace(self, label_names=names)

        def thin(rows: int) -> tuple[Dataset, Metrics]:
            held_out, metrics = self.thin(rows)
            return _relabelled(held_out, ids), _of_task(metrics, ids)

        return dataclasses.replace(
            self,
            train=_relabelled(self.train, ids),
            eval=_relabelled(self.eval, ids),
            label_names=names,
            compute_metrics=_of_task(self.compute_metrics, ids),
            thin=thin,
        )


def _relabelled(rows: Dataset, ids: Sequence[int]) -> Dataset:
    import pyarrow
    from datasets import Dataset

    table: Any = rows.with_format("arrow")[:]
    place = table.schema.get_field_index("labels")
    labels = pyarrow.array([ids[label] for label in rows["labels"]], table.schema.field(place).type)
    return Dataset(table.set_column(place, "labels", labels))


def _of_task(metrics: Metrics, ids: Sequence[int]) -> Metrics:
    """Metrics of a task for predictions and labels in a model's class order."""
    task_class = {number: index for index, number in enumerate(ids)}

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        from transformers import EvalPrediction

        logits = first_output(prediction.predictions)[..., list(ids)]
        labels = np.array([task_class[label] for label in first_output(prediction.label_ids).tolist()])
        return metrics(EvalPrediction(logits, labels))

    return compute


def load_task(data: DataSpec, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Read and tokenize a task.

    Args:
        data: which examples. `train_rows` are taken after a shuffle with `seed`, `eval_rows` in order; in qa both count
            questions.
        tokenizer: of the model. Inputs are truncated (in qa: split into windows) to `data.max_length` tokens.
        seed: of the run.

    Raises:
        TaskError: see `check_data`; also if data cannot be fetched, lines are malformed, columns are missing, a split
            is empty, labels do not match, or the tokenizer does not suit the task.
    """
    task = check_data(data)
    _check_tokenizer(task, data, tokenizer)
    load = _load_questions if task.kind == "qa" else _load_sentences
    return load(task, data, tokenizer, seed)


def _load_sentences(task: Task, data: DataSpec, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    from transformers import DataCollatorWithPadding

    train, held_out = _read_both(task, data)
    names, train_labels, eval_labels = fit_labels(task, train, held_out)
    order, first = _choose(len(train), data.train_rows, seed), range(len(held_out))[: data.eval_rows]
    majority = _majority(task, train_labels, [eval_labels[row] for row in first], len(names)) if names else None
    encoded = _tokenize(tokenizer, held_out, eval_labels, first, data.max_length)
    metrics = sentence_metrics(task.metrics, len(names))
    return TaskData(
        task=task,
        train=_tokenize(tokenizer, train, train_labels, order, data.max_length),
        eval=encoded,
        label_names=names,
        fingerprint={"train": train.sha256, "eval": held_out.sha256},
        majority=majority,
        collate=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        thin=lambda rows: (encoded.select(_spread(len(encoded), rows)), metrics),
    )


def _load_questions(task: Task, data: DataSpec, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    from transformers import DataCollatorWithPadding

    (train, train_hash), (held_out, eval_hash) = (_read_questions(task, data, split) for split in ("train", "eval"))
    train = [train[row] for row in _choose(len(train), data.train_rows, seed)]
    held_out = held_out[: data.eval_rows]
    train_windows, _ = _tokenize_questions(tokenizer, train, data.max_length)
    eval_windows, windows = _tokenize_questions(tokenizer, held_out, data.max_length)

    def thin(rows: int) -> tuple[Dataset, Metrics]:
        some = [held_out[row] for row in _spread(len(held_out), rows)]
        encoded, parts = _tokenize_questions(tokenizer, some, data.max_length)
        return encoded, squad.squad_metrics(some, parts)

    return TaskData(
        task=task,
        train=train_windows,
        eval=eval_windows,
        label_names=(),
        fingerprint={"train": train_hash, "eval": eval_hash},
        majority=None,
        collate=DataCollatorWithPadding(tokenizer),
        compute_metrics=squad.squad_metrics(held_out, windows),
        thin=thin,
        question_scores=squad.question_scores(held_out, windows),
    )


def _read_both(task: Task, data: DataSpec) -> tuple[Rows, Rows]:
    train = _read_rows(task, data, "train")
    return (train, _read_rows(task, data, "eval")) if data.held_out is None else divide(train, data.held_out)


def divide(rows: Rows, held_out: float) -> tuple[Rows, Rows]:
    """Split rows into training rows and an evenly spaced share for evaluation, such as every tenth row.

    Args:
        held_out: above 0, below 1.

    Raises:
        TaskError: one of the two would be empty.
    """
    share = Fraction(str(held_out))  # as it is written, so that no rounding moves a row
    taken = [math.floor((row + 1) * share) > math.floor(row * share) for row in range(len(rows))]
    if all(taken) or not any(taken):
        left = "train" if all(taken) else "evaluate"
        raise TaskError(f"data.held_out: {held_out:g} of {len(rows)} rows of {rows.name} leaves none to {left} on")
    train, kept = ([row for row, is_taken in enumerate(taken) if is_taken is side] for side in (False, True))
    return rows.select(train), rows.select(kept)


def _read_rows(task: Task, data: DataSpec, split: Split) -> Rows:
    if path := own_file(data, split):
        rows = read_file(path, Columns(text_columns(task, data), data.label or task.label))
    elif task.embedded:
        rows = task.embedded(split, data.data_dir)
    elif task.local and data.data_dir:
        text, label = task.local.text or task.text, task.local.label or task.label
        mend = f"data.data_dir must hold the published files of task {task.name!r}"
        published = find_published(task.local, split, data.data_dir)
        rows = read_file(published, Columns(text, label, task.local.header, mend), published=True)
    else:
        rows = read_hub(*_hub(task, split), Columns(task.text, task.label))
    if not len(rows):
        raise TaskError(f"{rows.name}: the {split} split is empty; give a file with at least one row")
    return rows


def _read_questions(task: Task, data: DataSpec, split: Split) -> tuple[list[squad.Question], str]:
    path = own_file(data, split)
    if path is None and task.local and data.data_dir:
        path = find_published(task.local, split, data.data_dir)
    questions, sha256 = squad.read_squad(path) if path else squad.read_hub_squad(*_hub(task, split))
    if not questions:
        raise TaskError(f"{path or task.hub}: the {split} split is empty; give a file with at least one question")
    return questions, sha256


def _hub(task: Task, split: Split) -> tuple[str, str | None, str]:
    assert task.hub is not None  # only rows without embedded data come here
    return (*task.hub, task.splits[split == "eval"])


def text_columns(task: Task, data: DataSpec) -> tuple[str, ...]:
    """Names of the columns with a task's texts, one or two."""
    first, *second = task.text
    pair = [data.text_pair] if data.text_pair else second
    return (data.text or first, *pair)


def _majority(task: Task, train_labels: Sequence[int], eval_labels: Sequence[int], classes: int) -> float:
    commonest = max(range(classes), key=train_labels.count)
    return score([task.headline], [commonest] * len(eval_labels), eval_labels, classes)[task.headline]


def _choose(count: int, wanted: int | None, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order[:wanted]


def _spread(count: int, wanted: int) -> range:
    return range(0, count, -(-count // wanted))


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: Sequence[Any], order: Sequence[int], max_length: int
) -> Dataset:
    def parts() -> Iterator[dict[str, Any]]:
        for begin in range(0, len(order), CHUNK):
            part = order[begin : begin + CHUNK]
            texts = [[column[row] for row in part] for column in rows.text]
            encoded = encode(tokenizer, texts, max_length)
            yield {**encoded, "labels": [labels[row] for row in part]}

    return _in_memory(parts())


def _tokenize_questions(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[squad.Question], max_length: int
) -> tuple[Dataset, list[squad.Window]]:
    windows: list[squad.Window] = []

    def parts() -> Iterator[dict[str, Any]]:
        for begin in range(0, len(questions), CHUNK):
            encoded, part = squad.encode_windows(tokenizer, questions[begin : begin + CHUNK], max_length, begin)
            windows.extend(part)
            yield encoded

    return _in_memory(parts()), windows


def _in_memory(parts: Iterable[dict[str, Any]]) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_dict(part) for part in parts])


def _check_tokenizer(task: Task, data: DataSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        raise TaskError("model: its tokenizer has no padding token, so that examples cannot be batched; set one")
    if data.max_length > tokenizer.model_max_length:
        raise TaskError(f"data.max_length: {data.max_length} exceeds the model's {tokenizer.model_max_length} tokens")
    if task.kind == "qa" and not tokenizer.is_fast:
        raise TaskError(f"model: task {task.name!r} needs a fast tokenizer (a model with tokenizer.json)")
    if task.kind == "qa" and data.max_length < squad.SHORTEST_INPUT:
        raise TaskError(f"data.max_length: task {task.name!r} needs at least {squad.SHORTEST_INPUT}")
