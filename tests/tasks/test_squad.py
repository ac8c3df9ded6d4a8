"""Questions in windows: every token is covered, answers are found again, and the official metrics are computed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import EvalPrediction, PreTrainedTokenizerFast

from attnpress.config import DataSpec
from attnpress.tasks import TASKS, TaskError, load_task
from attnpress.tasks.squad import LONGEST_ANSWER, Question, Window, best_answers, best_span, encode_windows

Array = NDArray[np.float32]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", ".", *(f"w{number}" for number in range(100)), "lon", "##ger"]
CONTEXT = " ".join(f"w{number}" for number in range(60)) + " longer w61."


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[[list[str]], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer(PIECES)


def question(answer: str, text: str = "w7 w8 ?", *others: str) -> Question:
    answers = (answer, *others)
    return Question(text, CONTEXT, answers, tuple(CONTEXT.index(one) for one in answers))


def write_squad(path: Path, questions: list[Question]) -> Path:
    asked = [
        {
            "id": f"q{number}",
            "question": one.question,
            "answers": [{"text": t, "answer_start": s} for t, s in zip(one.answers, one.starts, strict=True)],
        }
        for number, one in enumerate(questions)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": CONTEXT, "qas": asked}]}]}))
    return path


def predicted(start: Array, end: Array) -> EvalPrediction:
    return EvalPrediction((start, end), np.empty(0))  # type: ignore[arg-type]  # its annotation allows one output only


def gold_logits(rows: Any, width: int) -> tuple[Array, Array]:
    """Logits of a model that knows: 9 at the labelled positions, 0 elsewhere, -100 beyond each row's end."""
    start, end = np.full((2, len(rows), width), -100.0, dtype=np.float32)
    for number, row in enumerate(rows):
        start[number, : len(row["input_ids"])] = end[number, : len(row["input_ids"])] = 0
        if row["start_positions"]:
            start[number, row["start_positions"]] = end[number, row["end_positions"]] = 9
    return start, end


QUESTIONS = [question("w0"), question("w30 w31"), question("longer w61", "?", "w61"), question("w59 longer w61.")]


@pytest.mark.parametrize("max_length", [16, 24, 40, 128])
def test_windows_cover_the_context_and_hold_the_answers(max_length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    columns, windows = encode_windows(tokenizer, QUESTIONS, max_length, first=10)
    assert len({len(column) for column in [*columns.values(), windows]}) == 1
    for number, one in enumerate(QUESTIONS):
        mine = [row for row, window in enumerate(windows) if window.question == 10 + number]
        covered = set(itertools.chain(*(map(tuple, windows[row].offsets.tolist()) for row in mine)))
        assert len(covered) == 64, "60 words, two pieces, a word and a full stop"
        spans = [(columns["start_positions"][row], columns["end_positions"][row]) for row in mine]
        held = [(row, span) for row, span in zip(mine, spans, strict=True) if span != (0, 0)]
        assert held, "some window holds the whole answer"
        for row, (head, tail) in held:
            assert len(columns["input_ids"][row]) <= max_length
            offsets = windows[row].offsets[[head - windows[row].first, tail - windows[row].first]]
            assert CONTEXT[offsets[0, 0] : offsets[1, 1]] == one.answers[0]
    assert len(windows) == 4 if max_length == 128 else len(windows) > 4


def test_a_window_without_the_whole_answer_points_at_its_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    columns, windows = encode_windows(tokenizer, [question("w30 w31")], 16)
    start, stop = CONTEXT.index("w30"), CONTEXT.index("w32") - 1
    spans = zip(columns["start_positions"], columns["end_positions"], strict=True)
    whole = [window.offsets[0, 0] <= start and stop <= window.offsets[-1, 1] for window in windows]
    assert [span != (0, 0) for span in spans] == whole
    assert any(whole)
    assert not all(whole)


def test_a_long_question_leaves_room_for_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    columns, windows = encode_windows(tokenizer, [question("w3", "w9 " * 90)], 16)
    rows = [[PIECES[token] for token in row] for row in columns["input_ids"]]
    assert all(row[:7] == ["[CLS]", *["w9"] * 5, "[SEP]"] for row in rows)
    assert windows[0].first == 7


@pytest.mark.parametrize("nested", ["", "squad"])
def test_published_files_load_and_a_perfect_model_scores_full_points(
    nested: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_squad(tmp_path / nested / "train-v1.1-part.json", QUESTIONS * 300)
    write_squad(tmp_path / nested / "dev-v1.1.json", QUESTIONS * 300)
    data = load_task(DataSpec("squad", data_dir=tmp_path, max_length=40), tokenizer, seed=0)
    assert data.train.column_names == data.eval.column_names
    assert set(data.eval.column_names) >= {"input_ids", "attention_mask", "start_positions", "end_positions"}
    assert (data.label_names, data.majority, data.task.headline) == ((), None, "f1")
    start, end = gold_logits(data.eval, 40)
    assert data.compute_metrics(predicted(start, end)) == {"f1": 100.0, "exact_match": 100.0}
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["start_positions"].shape == (2,)


def test_metrics_take_the_best_of_several_answers_and_ignore_padding(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_squad(tmp_path / "q.json", [question("w0 w1 w2 w3", "?", "w0 w1"), question("w20")])
    spec = DataSpec("squad", train_file=path, eval_file=path, max_length=128)
    data = load_task(spec, tokenizer, seed=0)
    start, end = np.zeros((2, 2, 90), dtype=np.float32)
    start[:, -1] = end[:, -1] = 50  # beyond the rows' 68 tokens
    first = len(["[CLS]", "?", "[SEP]"])
    start[0, first], end[0, first + 2] = 5, 5  # "w0 w1 w2": 3 of 3 and 3 of 4; second answer: 2 of 3 and 2 of 2
    start[1, 40] = end[1, 40] = 5
    found = data.compute_metrics(predicted(start, end))
    assert list(found) == ["f1", "exact_match"]
    assert found == pytest.approx({"f1": 100 * (6 / 7) / 2, "exact_match": 0.0}, abs=1e-3)
    part = load_task(DataSpec("squad", train_file=path, eval_file=path, eval_rows=1, train_rows=1), tokenizer, seed=0)
    assert (len(part.train), len(part.eval)) == (1, 1)
    assert part.compute_metrics(predicted(start[:1], end[:1]))["f1"] == pytest.approx(600 / 7, abs=1e-3)


LOGITS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=45)


@given(LOGITS)
def test_the_best_span_is_the_best_of_all(pairs: list[tuple[int, int]]) -> None:
    start, end = np.array(pairs, dtype=np.float32).T
    found, head, tail = best_span(start, end)
    spans = [(i, j) for i in range(len(pairs)) for j in range(i, min(len(pairs), i + LONGEST_ANSWER))]
    assert (head, tail) in spans
    assert found == start[head] + end[tail] == max(start[i] + end[j] for i, j in spans)


def test_the_best_window_answers_whatever_its_place() -> None:
    one = Question("?", "aa bb", ("aa",), (0,))
    windows = [Window(0, 1, np.array([[0, 2]], np.int32)), Window(0, 2, np.array([[3, 5]], np.int32))]
    start = np.array([[9, 1, 9], [9, 9, 2]], np.float32)
    assert best_answers([one], windows, start, start) == ["bb"]
    assert best_answers([one], windows, -start, -start) == ["aa"]
    with pytest.raises(ValueError, match="2 windows, but logits for 1 starts"):
        best_answers([one], windows, start[:1], start)
    with pytest.raises(FloatingPointError, match="NaN"):
        best_answers([one], windows, start * np.nan, start)


def test_hub_data_load_through_datasets(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"id": "q", "question": "w7 ?", "context": CONTEXT, "answers": {"text": ["w5"], "answer_start": [15]}}
    (tmp_path / "hub").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "hub" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setitem(TASKS, "squad", dataclasses.replace(TASKS["squad"], hub=(str(tmp_path / "hub"), None)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    data = load_task(DataSpec("squad"), tokenizer, seed=0)
    assert data.compute_metrics(predicted(*gold_logits(data.eval, 128)))["exact_match"] == 100
    assert len(set(data.fingerprint.values())) == 1


BROKEN: list[tuple[str, str]] = [
    ("{\n1", r"q\.json, line 2: not valid JSON"),
    ("[]", r"q\.json: not in the layout of SQuAD v1\.1"),
    ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', r"layout of SQuAD v1\.1 \(missing or wrong: 'context'\)"),
    ('{"data": []}', r"q\.json: the train split is empty"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_malformed_file_is_explained(
    text: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(TaskError, match=message):
        load_task(DataSpec("squad", train_file=path, eval_file=path), tokenizer, seed=0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Question("?", CONTEXT, (), ()), "question 'q0' has no answer; SQuAD v1.1 is expected"),
        (Question("?", CONTEXT, ("",), (0,)), "question 'q0' has no answer"),
        (Question("?", CONTEXT, ("w1",), (len(CONTEXT),)), "question 'q0' has an answer that lies outside"),
        (Question("?", CONTEXT, ("w1",), (-2,)), "question 'q0' has an answer that lies outside"),
    ],
)
def test_an_unusable_answer_is_named(
    broken: Question, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_squad(tmp_path / "q.json", [broken])
    with pytest.raises(TaskError, match=message):
        load_task(DataSpec("squad", train_file=path, eval_file=path), tokenizer, seed=0)


def test_ambiguous_parts_of_the_training_file_are_not_guessed_between(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name in ("train-v1.1-a.json", "train-v1.1-b.json", "dev-v1.1.json"):
        write_squad(tmp_path / name, QUESTIONS)
    with pytest.raises(TaskError, match=r"several files \(train-v1\.1-a\.json, .*set data\.train_file"):
        load_task(DataSpec("squad", data_dir=tmp_path), tokenizer, seed=0)
    write_squad(tmp_path / "train-v1.1.json", QUESTIONS[:1])
    assert len(load_task(DataSpec("squad", data_dir=tmp_path), tokenizer, seed=0).train) == 1, "the whole file wins"


def test_the_tokenizer_must_be_fast_and_the_input_long_enough(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_squad(tmp_path / "q.json", QUESTIONS)
    with pytest.raises(TaskError, match=r"data\.max_length: task 'squad' needs at least 16"):
        load_task(DataSpec("squad", train_file=path, eval_file=path, max_length=15), tokenizer, seed=0)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(TaskError, match="task 'squad' needs a fast tokenizer"):
        load_task(DataSpec("squad", train_file=path, eval_file=path), tokenizer, seed=0)
