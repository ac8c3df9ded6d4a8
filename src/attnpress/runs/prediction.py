"""run: what a model says of each row of a file of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnpress.config import DataSpec, RunConfig
from attnpress.deployment.attention import Linear, deploy, place_on
from attnpress.deployment.linear import plan_linear
from attnpress.models.encoder import plan_of
from attnpress.models.loading import weights_hash
from attnpress.runs.finished import finished_classifier
from attnpress.runs.row_files import Answer, PredictionError, Progress, Row, Warn, predict_file
from attnpress.tasks import TASKS, load_task, text_columns
from attnpress.tasks.lines import Broken
from attnpress.tasks.tokens import encode


@dataclass(frozen=True)
class Texts:
    """What a model is asked about.

    Attributes:
        columns: of the texts, one or two.
        max_length: maximum input length in tokens; longer inputs are truncated.
    """

    columns: tuple[str, ...]
    max_length: int

    @classmethod
    def of_run(cls, data: DataSpec) -> Texts:
        """Those of a run's recipe."""
        if data.task in TASKS:
            return cls(text_columns(TASKS[data.task], data), data.max_length)
        return cls(tuple(name for name in (data.text, data.text_pair) if name), data.max_length)


TEXT, LONGEST = "text", 8192
"""Where a row has its text, and tokens of the longest input, for a model that does not come with a recipe."""

POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""What Transformers calls tables of learned positions; those of RoBERTa begin after the padding index."""


def run_file(
    folder: Path,
    config: RunConfig | None,
    source: Path,
    output: Path,
    *,
    backend: str,
    linear: Linear,
    batch_size: int,
    warn: Warn,
    columns: Sequence[str] = (),
) -> Progress:
    """`predict_file` with a compressed model, deployed.

    Args:
        folder: of a finished run, or one that `save_pretrained` wrote, with its tokenizer.
        config: the run's recipe: it names the text columns and the longest input. None without a run: the text is
            under "text", and as long as the model takes it.
        backend, linear: as `deploy` takes them. A model without a plan for int8 layers gets one from the run's
            training rows.
        columns: of the texts, in place of those.

    Raises:
        PredictionError, ConfigError, BackendUnavailableError: see `predict_file`, `finished_classifier` and `deploy`.
    """
    model, tokenizer = finished_classifier(folder)
    texts = Texts((TEXT,), _longest(model, tokenizer)) if config is None else Texts.of_run(config.data)
    texts = Texts(tuple(columns) or texts.columns, texts.max_length)
    if linear == "int8" and config is not None:
        plan_linear(model, lambda: load_task(config.data, tokenizer, config.seed), config)
    elif linear == "int8" and not plan_of(model):
        raise PredictionError(
            f"{folder}: has no plan for int8 layers, and no recipe with data to make one; run it float"
        )
    place_on(backend, model)
    deploy(model, backend, linear=linear)
    place = folder if config is None else folder / "progressive"
    made_from = {"model": weights_hash(str(place)), "linear": linear, "columns": list(texts.columns)}
    answer = make_answer(model, tokenizer, texts.columns, texts.max_length, batch_size)
    return predict_file(answer, texts.columns, source, output, made_from, warn=warn)


def _longest(model: Any, tokenizer: Any) -> int:
    """Tokens that a model takes: by its tokenizer, its configuration and its tables of positions."""
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if name.endswith(POSITIONS) and isinstance(module, torch.nn.Embedding)
    ]
    configured = getattr(model.config, "max_position_embeddings", None) or LONGEST
    return int(min(tokenizer.model_max_length, configured, LONGEST, *tables))


def make_answer(model: Any, tokenizer: Any, columns: Sequence[str], max_length: int, batch_size: int) -> Answer:
    """A classifier's answers: its label and probability; of a regression, its score.

    Args:
        model, tokenizer: with a sequence classification head, and its own.
        columns: of the texts, one or two.
        max_length: maximum input length in tokens, as in training; longer inputs are truncated.
        batch_size: rows of about the same length that go through the model together.
    """

    def answer(rows: Sequence[Row]) -> list[Row | Broken]:
        encoded = encode(tokenizer, [[row[name] for row in rows] for name in columns], max_length)
        order = sorted(range(len(rows)), key=lambda row: len(encoded["input_ids"][row]))
        said: list[Row | Broken] = [{}] * len(rows)
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            inputs = tokenizer.pad({key: [encoded[key][row] for row in part] for key in encoded}, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**inputs.to(model.device)).logits.float()
            for row, found in zip(part, logits, strict=True):
                said[row] = _say(model.config, found)
        return said

    return answer


def _say(config: Any, logits: torch.Tensor) -> Row | Broken:
    if not logits.isfinite().all():
        return Broken("the model says NaN or infinity", "the model says NaN or infinity")
    if config.problem_type == "regression":
        return {"score": float(logits[0])}
    best = int(logits.argmax())
    return {"label": config.id2label[best], "score": round(float(logits.softmax(-1)[best]), 6)}
