"""Extractive question answering in the layout of SQuAD v1.1: questions, windows over long contexts, answer spans.

A context longer than the input is split into overlapping windows. Each window is one row of the model. The answer to a
question is the best span over its windows (Devlin et al., NAACL 2019, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpress.records.strict_json import JsonError, is_unicode, parse_json
from attnpress.tasks.metrics import check_finite
from attnpress.tasks.sources import TaskError, hash_rows, load_hub, read_text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import EvalPrediction, PreTrainedTokenizerBase

SHORTEST_INPUT = 16
LONGEST_ANSWER = 30
LONGEST_QUESTION = 64
DOC_STRIDE = 128


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a context.

    Attributes:
        question, context: texts.
        answers: accepted answers, at least one.
        starts: position of each answer in the context, in characters.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """The relation of one row of the model to its question.

    Attributes:
        question: index of the question.
        first: position of the first context token in the row.
        offsets: characters [begin, end) of each context token, int32 of shape [n, 2].
    """

    question: int
    first: int
    offsets: NDArray[np.int32]


def read_squad(path: Path) -> tuple[list[Question], str]:
    """Read the official JSON layout. Returns the questions and the file's sha256.

    Raises:
        TaskError: the file is malformed, or a question has no usable answer.
    """
    text, sha256 = read_text(path)
    try:
        articles = parse_json(text)["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        pairs = [(paragraph["context"], asked) for paragraph in paragraphs for asked in paragraph["qas"]]
        return [_local_question(path, context, asked) for context, asked in pairs], sha256
    except JsonError as error:
        raise TaskError(f"{path}, line {error.line}: not valid JSON ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise TaskError(f"{path}: not in the layout of SQuAD v1.1 (missing or wrong: {error})") from None


def read_hub_squad(path: str, config: str | None, split: str) -> tuple[list[Question], str]:
    """Read a SQuAD dataset from the Hub. Returns the questions and the hash of the rows.

    Raises:
        TaskError: the dataset cannot be loaded, or a question has no usable answer.
    """
    table = load_hub(path, config, split, ("id", "question", "context", "answers"))
    questions = [
        _question(f"{path} ({split})", row["id"], row["question"], row["context"], row["answers"]) for row in table
    ]
    return questions, hash_rows((one.question, one.context, one.answers, one.starts) for one in questions)


def encode_windows(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_length: int, first: int = 0
) -> tuple[dict[str, list[Any]], list[Window]]:
    """Tokenize questions with their contexts into windows of at most `max_length` tokens.

    Neighbouring windows share a third of the input (at most 128 tokens). A question takes up to a third (at most 64
    tokens). A window without the whole first answer points at its first token, position 0.

    Args:
        tokenizer: a fast tokenizer.
        questions: what to encode.
        max_length: tokens of one window, SHORTEST_INPUT or more.
        first: index of the first question, if these are part of a longer list.

    Returns:
        The model's inputs with start_positions and end_positions, one row per window; and the windows, row by row.
    """
    third = max_length // 3
    encoded = tokenizer(
        _shorten(tokenizer, [one.question.strip() for one in questions], min(LONGEST_QUESTION, third)),
        [one.context for one in questions],
        truncation="only_second",
        max_length=max_length,
        stride=min(DOC_STRIDE, third),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    windows = [_window(first + owner, encoded.sequence_ids(row), offsets[row]) for row, owner in enumerate(owners)]
    spans = [_positions(window, questions[owner]) for window, owner in zip(windows, owners, strict=True)]
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    return {**encoded, "start_positions": starts, "end_positions": ends}, windows


def squad_metrics(
    questions: Sequence[Question], windows: Sequence[Window]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build a Trainer's `compute_metrics` for start and end logits, each [windows, longest row], in this order."""
    targets = [{"id": str(i), "answers": {"text": list(one.answers)}} for i, one in enumerate(questions)]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        from torchmetrics.functional.text.squad import squad

        start, end = (np.asarray(logits, dtype=np.float32) for logits in prediction.predictions[:2])
        answers = best_answers(questions, windows, start, end)
        given = [{"id": str(i), "prediction_text": answer} for i, answer in enumerate(answers)]
        scores = squad(given, targets)  # type: ignore[arg-type]
        return {"f1": float(scores["f1"]), "exact_match": float(scores["exact_match"])}

    return compute


def question_scores(
    questions: Sequence[Question], windows: Sequence[Window]
) -> Callable[[EvalPrediction], list[float]]:
    """Build the function that gives F1 of each question, 0 to 1, from the input of `squad_metrics`."""

    def compute(prediction: EvalPrediction) -> list[float]:
        from torchmetrics.functional.text.squad import squad

        start, end = (np.asarray(logits, dtype=np.float32) for logits in prediction.predictions[:2])
        answers = best_answers(questions, windows, start, end)
        pairs = [
            ({"id": "0", "prediction_text": answer}, {"id": "0", "answers": {"text": list(one.answers)}})
            for answer, one in zip(answers, questions, strict=True)
        ]
        return [float(squad(given, target)["f1"]) / 100 for given, target in pairs]  # type: ignore[arg-type]

    return compute


def best_answers(
    questions: Sequence[Question], windows: Sequence[Window], start: NDArray[np.float32], end: NDArray[np.float32]
) -> list[str]:
    """The answer of each question: its best span over all its windows.

    Args:
        questions: as encoded.
        windows: of those questions.
        start, end: logits [windows, length]; positions beyond a row's own tokens are never read.

    Raises:
        ValueError: the numbers of windows and rows of logits differ.
        DivergedPredictionsError: NaN or infinite logits.
    """
    if not len(windows) == len(start) == len(end):
        raise ValueError(f"{len(windows)} windows, but logits for {len(start)} starts and {len(end)} ends")
    check_finite(start)
    check_finite(end)
    best, answers = [-np.inf] * len(questions), [""] * len(questions)
    for window, row_start, row_end in zip(windows, start, end, strict=True):
        context = slice(window.first, window.first + len(window.offsets))
        score, head, tail = best_span(row_start[context], row_end[context])
        if score > best[window.question]:
            begin, stop = int(window.offsets[head, 0]), int(window.offsets[tail, 1])
            best[window.question] = score
            answers[window.question] = questions[window.question].context[begin:stop]
    return answers


def best_span(start: NDArray[np.float32], end: NDArray[np.float32]) -> tuple[float, int, int]:
    """The span of at most LONGEST_ANSWER tokens with the largest sum of start and end logits.

    Args:
        start, end: logits of the context tokens, shape [n], n >= 1.

    Returns:
        The sum, and the positions of the first and the last token.
    """
    beyond = np.full(LONGEST_ANSWER - 1, -np.inf, dtype=end.dtype)
    reach = np.lib.stride_tricks.sliding_window_view(np.concatenate([end, beyond]), LONGEST_ANSWER)
    ahead = reach.argmax(axis=1)
    sums = start + reach[np.arange(len(start)), ahead]
    head = int(sums.argmax())
    return float(sums[head]), head, head + int(ahead[head])


def _local_question(path: Path, context: str, asked: Mapping[str, Any]) -> Question:
    answers = {key: [answer[key] for answer in asked["answers"]] for key in ("text", "answer_start")}
    return _question(str(path), asked["id"], asked["question"], context, answers)


def _question(name: str, key: str, question: str, context: str, answers: Mapping[str, Any]) -> Question:
    texts, starts = tuple(answers["text"]), tuple(answers["answer_start"])
    for text in (question, context, *texts):
        if not isinstance(text, str) or not is_unicode(text):
            raise TaskError(
                f"{name}: question {key!r:.80} contains a value that is not text ({text!r:.40}); correct it"
            )
    if not all(type(start) is int for start in starts):
        raise TaskError(f"{name}: question {key!r:.80} has an answer_start that is not an integer; correct it")
    if not texts or not all(texts):
        raise TaskError(f"{name}: question {key!r} has no answer; SQuAD v1.1 is expected, not v2.0")
    if not all(start >= 0 and start + len(text) <= len(context) for text, start in zip(texts, starts, strict=True)):
        raise TaskError(f"{name}: question {key!r} has an answer that lies outside its context; correct answer_start")
    return Question(question, context, texts, starts)


def _shorten(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> list[str]:
    options: dict[str, Any] = {"truncation": True, "max_length": longest, "add_special_tokens": False}
    offsets = tokenizer(texts, return_offsets_mapping=True, **options)["offset_mapping"]
    return [text[: tokens[-1][1]] if tokens else text for text, tokens in zip(texts, offsets, strict=True)]


def _window(question: int, sequences: list[int | None], offsets: list[tuple[int, int]]) -> Window:
    if 1 not in sequences:
        raise TaskError(f"question {question + 1}: its context has no tokens; give it a text")
    first = sequences.index(1)
    return Window(question, first, np.array(offsets[first : first + sequences.count(1)], dtype=np.int32))


def _positions(window: Window, question: Question) -> tuple[int, int]:
    """Positions of the first and last token of the first answer; (0, 0) if the window does not contain all of it."""
    begins, ends = window.offsets[:, 0], window.offsets[:, 1]
    start = question.starts[0]
    stop = start + len(question.answers[0])
    if start < begins[0] or stop > ends[-1]:
        return 0, 0
    head = int(np.searchsorted(ends, start, side="right"))
    tail = int(np.searchsorted(begins, stop, side="left")) - 1
    return window.first + head, window.first + tail
