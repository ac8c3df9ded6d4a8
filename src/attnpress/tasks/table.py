"""Table of tasks: what a model learns and how it is evaluated. Adding a task means adding a row, no other code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attnpress.tasks import movie
from attnpress.tasks.metrics import METRICS
from attnpress.tasks.sources import Rows

Split = Literal["train", "eval"]
CUSTOM = "custom"
"""Name of the task for the user's own files; its row is made from the `DataSpec`."""


@dataclass(frozen=True)
class Layout:
    """A task's published files.

    Attributes:
        folder: its published name; `data_dir` is this folder or one of the two above it.
        train, eval: file names; a "*" matches named parts of the whole file.
        text, label, header: as in `Columns`, where they differ from the task's own.
    """

    folder: str
    train: str = "train.tsv"
    eval: str = "dev.tsv"
    text: tuple[str, ...] | None = None
    label: str | None = None
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        name: its name in recipes.
        about: one line for users.
        kind: determines head and loss.
        metrics: names in METRICS (for "qa": "f1" and "exact_match"); the first is the headline.
        labels: class names by index; empty in regression and qa, and for the user's own files, which define them.
        text: one text column, or two.
        label: label column.
        hub: dataset and configuration on the Hub.
        splits: names of the training and evaluation splits there.
        local: published files.
        embedded: reads a split of data that attnpress fetches itself.
    """

    name: str
    about: str
    kind: Literal["classification", "regression", "qa"]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    text: tuple[str, ...] = ("sentence",)
    label: str = "label"
    hub: tuple[str, str | None] | None = None
    splits: tuple[str, str] = ("train", "validation")
    local: Layout | None = None
    embedded: Callable[[Split, Path | None], Rows] | None = None

    @property
    def headline(self) -> str:
        """The main metric of the task."""
        return self.metrics[0]


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_COLA_HEADER = ("source", "label", "mark", "sentence")
_GLUE = "nyu-mll/glue"

_ROWS = (
    Task(
        "movie",
        "movie-review snippets, negative or positive (default)",
        "classification",
        ("accuracy",),
        ("negative", "positive"),
        ("text",),
        embedded=movie.read_movie,
    ),
    Task(
        "sst2",
        "GLUE SST-2, sentiment of a sentence",
        "classification",
        ("accuracy",),
        ("negative", "positive"),
        hub=(_GLUE, "sst2"),
        local=Layout("SST-2"),
    ),
    Task(
        "mrpc",
        "GLUE MRPC, paraphrase or not",
        "classification",
        ("f1", "accuracy"),
        ("not_equivalent", "equivalent"),
        _PAIR,
        hub=(_GLUE, "mrpc"),
        local=Layout("MRPC", text=("#1 String", "#2 String"), label="Quality"),
    ),
    Task(
        "rte",
        "GLUE RTE, entailment or not",
        "classification",
        ("accuracy",),
        _ENTAILMENT,
        _PAIR,
        hub=(_GLUE, "rte"),
        local=Layout("RTE"),
    ),
    Task(
        "cola",
        "GLUE CoLA, acceptable grammar or not",
        "classification",
        ("matthews", "accuracy"),
        ("unacceptable", "acceptable"),
        hub=(_GLUE, "cola"),
        local=Layout("CoLA", header=_COLA_HEADER),
    ),
    Task(
        "stsb",
        "GLUE STS-B, similarity of two sentences from 0 to 5",
        "regression",
        ("pearson", "spearman"),
        (),
        _PAIR,
        hub=(_GLUE, "stsb"),
        local=Layout("STS-B", label="score"),
    ),
    Task(
        "qnli",
        "GLUE QNLI, does the sentence answer the question",
        "classification",
        ("accuracy",),
        _ENTAILMENT,
        ("question", "sentence"),
        hub=(_GLUE, "qnli"),
        local=Layout("QNLI"),
    ),
    Task(
        "mnli",
        "GLUE MNLI, entailment, neutral or contradiction (matched validation)",
        "classification",
        ("accuracy",),
        ("entailment", "neutral", "contradiction"),
        ("premise", "hypothesis"),
        hub=(_GLUE, "mnli"),
        splits=("train", "validation_matched"),
        local=Layout("MNLI", eval="dev_matched.tsv", text=_PAIR, label="gold_label"),
    ),
    Task(
        "qqp",
        "GLUE QQP, duplicate questions or not",
        "classification",
        ("f1", "accuracy"),
        ("not_duplicate", "duplicate"),
        ("question1", "question2"),
        hub=(_GLUE, "qqp"),
        local=Layout("QQP", label="is_duplicate"),
    ),
    Task(
        "squad",
        "SQuAD v1.1, the span of a text that answers a question",
        "qa",
        ("f1", "exact_match"),
        text=("question", "context"),
        label="answers",
        hub=("rajpurkar/squad", None),
        local=Layout("squad", "train-v1.1*.json", "dev-v1.1.json"),
    ),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}


def list_tasks() -> list[tuple[str, str]]:
    """Name and one line with the metrics of every task; the user's own files come last."""
    rows = [(task.name, f"{task.about}; {', '.join(task.metrics)}") for task in TASKS.values()]
    return [*rows, (CUSTOM, f"your own CSV, TSV or JSON lines; data.metric: {', '.join(METRICS)}")]
