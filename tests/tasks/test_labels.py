"""Classes as a model counts them: by its own names, whatever their order, and never permuted without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import EvalPrediction, PreTrainedTokenizerFast

from attnpress.config import DataSpec
from attnpress.tasks import TaskData, load_task
from attnpress.tasks.labels import class_ids, class_ids_by_name, is_generic

TASK = ("entailment", "neutral", "contradiction")
SAME: list[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]] = [
    (TASK, TASK, (0, 1, 2)),
    (TASK, ("contradiction", "neutral", "entailment"), (2, 1, 0)),
    (TASK, ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), (2, 1, 0)),
    (("entailment", "not_entailment"), ("Not Entailment", "entailment"), (1, 0)),
    (("not-entailment", "entailment"), ("NotEntailment", "Entailment"), (0, 1)),
    (TASK, ("LABEL_0", "LABEL_1", "LABEL_2"), (0, 1, 2)),
    (TASK, ("0", "1", "2"), (0, 1, 2)),
    (("0", "1"), ("yes", "no"), (0, 1)),
    (("0", "1"), ("1", "0"), (1, 0)),
    (("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0"), (1, 0)),
    (("-1", "1"), ("1", "-1"), (1, 0)),
    (("Us", "us"), ("us", "Us"), (1, 0)),
]
OTHERS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (TASK, ("entailment", "neutral", "contrary")),
    (TASK, ("entailment", "not_entailment")),
    (("no", "yes"), TASK),
    (("no", "yes"), ("LABEL_0", "LABEL_1", "LABEL_2")),
    (("no", "yes"), ("LABEL_1", "LABEL_0")),
    (("1", "2", "3"), ("low", "middle", "high")),
    (("0", "1", "2"), ("1", "2", "3")),
    (("0", "2"), ("low", "high")),
    (("a", "b"), ("A", "a")),
    (("no", "yes"), ("no", "no")),
]


@pytest.mark.parametrize(("names", "of_model", "expected"), SAME)
def test_the_same_classes_are_found_by_name_then_by_number(
    names: tuple[str, ...], of_model: tuple[str, ...], expected: tuple[int, ...]
) -> None:
    assert class_ids(names, of_model) == expected


@pytest.mark.parametrize(("names", "of_model"), OTHERS)
def test_other_classes_are_never_taken_for_the_same(names: tuple[str, ...], of_model: tuple[str, ...]) -> None:
    assert class_ids(names, of_model) is None


def test_numbers_are_no_names() -> None:
    assert class_ids_by_name(("0", "1"), ("yes", "no")) is None
    assert class_ids_by_name(TASK, ("LABEL_0", "LABEL_1", "LABEL_2")) is None
    assert [is_generic(names) for names in (("LABEL_0", "LABEL_1"), ("0", "1"), ("1", "0"), ("no", "yes"))] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.fixture
def pairs(tmp_path: Path, make_tokenizer: Callable[[list[str]], PreTrainedTokenizerFast]) -> TaskData:
    """MNLI as published, two examples of each class and one of class 2; labels 0, 1, 2, 0, 1, 2, 2 of the task."""
    header = "\t".join([*(f"column{number}" for number in range(8)), "sentence1", "sentence2", "label1", "gold_label"])
    rows = ["\t".join([*"01234567", f"{'a ' * n}b", "b", "-", name]) for n, name in enumerate([*TASK, *TASK, TASK[2]])]
    (tmp_path / "MNLI").mkdir()
    for name in ("train.tsv", "dev_matched.tsv"):
        (tmp_path / "MNLI" / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]
    return load_task(DataSpec("mnli", data_dir=tmp_path, max_length=16), make_tokenizer(words), seed=0)


ORDERS = [("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), ("neutral", "entailment", "contradiction")]


@pytest.mark.parametrize("of_model", ORDERS, ids=["as RoBERTa", "a circle"])
def test_a_task_is_numbered_as_a_model_counts(pairs: TaskData, of_model: tuple[str, ...]) -> None:
    found = pairs.numbered_as(of_model)
    assert found is not None
    assert found.label_names == of_model
    for before, after in ((pairs.train, found.train), (pairs.eval, found.eval), (pairs.thin(3)[0], found.thin(3)[0])):
        assert [of_model[label].lower() for label in after["labels"]] == [TASK[label] for label in before["labels"]]
        assert after["input_ids"] == before["input_ids"]
    assert found.majority == pairs.majority == pytest.approx(100 * 3 / 7)


def score(data: TaskData, of_model: tuple[str, ...], answers: list[str], labels: Any) -> dict[str, float]:
    logits = np.eye(len(of_model))[[[name.lower() for name in of_model].index(answer) for answer in answers]]
    return data.compute_metrics(EvalPrediction(logits, np.asarray(labels)))


@pytest.mark.parametrize("of_model", ORDERS)
def test_metrics_are_those_of_the_names(pairs: TaskData, of_model: tuple[str, ...]) -> None:
    found = pairs.numbered_as(of_model)
    assert found is not None
    answers = [TASK[label] for label in pairs.eval["labels"]]
    assert score(found, of_model, answers, found.eval["labels"]) == {"accuracy": 100.0}
    answers[0] = TASK[1]
    assert score(found, of_model, answers, found.eval["labels"])["accuracy"] == pytest.approx(100 * 6 / 7)


def test_the_positive_class_of_f1_is_the_tasks_whatever_the_models_order(
    tmp_path: Path, make_tokenizer: Callable[[list[str]], PreTrainedTokenizerFast]
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,no\nb,yes\na,yes\nb,yes\n", encoding="utf-8")
    spec = DataSpec("custom", train_file=file, eval_file=file, text="text", label="label", metric="f1", max_length=8)
    data = load_task(spec, make_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]), seed=0)
    swapped = data.numbered_as(("yes", "no"))
    assert swapped is not None
    answers = ["no", "yes", "yes", "no"]
    expected = score(data, ("no", "yes"), answers, data.eval["labels"])
    assert score(swapped, ("yes", "no"), answers, swapped.eval["labels"]) == expected
    assert expected["f1"] == pytest.approx(80.0)
    assert data.numbered_as(("good", "bad")) is None
    generic = data.numbered_as(("LABEL_0", "LABEL_1"))
    assert generic is not None
    assert generic.label_names == ("no", "yes")
