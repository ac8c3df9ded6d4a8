"""run: predict each row of files of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnpress.config import DataSpec, RunConfig
from attnpress.deployment.attention import Linear, deploy, place_on
from attnpress.deployment.linear import plan_linear
from attnpress.models.encoder import plan_of
from attnpress.models.loading import weights_hash
from attnpress.runs.finished import finished_classifier, finished_folder
from attnpress.runs.row_files import Answer, PredictionError, Progress, Row, Warn, finish_file, predict_file
from attnpress.runs.row_folders import Engine, Finish, Outcome, Pair, held_folder, pair_files, predict_files
from attnpress.tasks import TASKS, TaskError, load_task, text_columns
from attnpress.tasks.lines import Broken
from attnpress.tasks.tokens import encode


@dataclass(frozen=True)
class Texts:
    """Text columns and input length of a model.

    Attributes:
        columns: one or two text columns.
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
"""Default text column and maximum input length, for a model without a recipe."""

POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""Names of learned position tables in Transformers; those of RoBERTa start after the padding index."""


@dataclass(frozen=True)
class Deployment:
    """A compressed model and its settings, as plain data from which any process can load it.

    Attributes:
        folder: of a finished run, or written by `save_pretrained`, with its tokenizer.
        config: the run's recipe, with text columns and maximum length. None without a run: the column is "text", and
            the length that of the model.
        backend, linear: as for `deploy`. A model without a plan for int8 layers gets one from the run's training rows.
        batch_size: rows per batch.
        named: text columns that replace those of the recipe.
    """

    folder: Path
    config: RunConfig | None
    backend: str
    linear: Linear
    batch_size: int
    named: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """One or two text columns."""
        return self.named or ((TEXT,) if self.config is None else Texts.of_run(self.config.data).columns)

    def made_from(self) -> dict[str, Any]:
        """Everything that an output depends on, except its input.

        Raises:
            ConfigError: see `finished_folder`.
        """
        weights = weights_hash(str(finished_folder(self.folder)))
        return {"model": weights, "linear": self.linear, "columns": list(self.columns)}

    def load(self) -> Answer:
        """Load and deploy the model.

        Raises:
            PredictionError, ConfigError, BackendUnavailableError: see `finished_classifier` and `deploy`.
        """
        model, tokenizer = finished_classifier(self.folder)
        config = self.config
        max_length = _longest(model, tokenizer) if config is None else Texts.of_run(config.data).max_length
        if self.linear == "int8" and config is not None:
            plan_linear(model, lambda: load_task(config.data, tokenizer, config.seed), config)
        elif self.linear == "int8" and not plan_of(model):
            raise PredictionError(
                f"{self.folder}: has no plan for int8 layers, and no recipe with data to make one; run it float"
            )
        place_on(self.backend, model)
        deploy(model, self.backend, linear=self.linear)
        return make_answer(model, tokenizer, self.columns, max_length, self.batch_size)

    def finisher(self) -> Finish:
        """Load the model once; returns a function that predicts one of many files and reports errors in its outcome.

        Raises:
            PredictionError, ConfigError, BackendUnavailableError: see `load`.
        """
        answer, made_from = self.load(), self.made_from()

        def finish(pair: Pair, warn: Warn) -> Outcome:
            source, output = pair.source, pair.output
            try:
                progress = finish_file(
                    answer, self.columns, source, output, made_from, warn=warn, may_be_plain=not self.named
                )
            except (PredictionError, TaskError) as error:
                return Outcome(pair, None, str(error))
            return Outcome(pair, progress)

        return finish


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
    """`predict_file` with a deployed compressed model; the other arguments are those of `Deployment`.

    Raises:
        PredictionError, ConfigError, BackendUnavailableError: see `predict_file` and `Deployment.load`.
    """
    deployment = Deployment(folder, config, backend, linear, batch_size, tuple(columns))
    return predict_file(
        deployment.load(),
        deployment.columns,
        source,
        output,
        deployment.made_from(),
        warn=warn,
        may_be_plain=not columns,
    )


def run_files(
    deployment: Deployment,
    sources: Sequence[Path],
    output: Path,
    *,
    warn: Warn,
    notify: Warn,
    engine: Engine | None = None,
) -> Progress:
    """`predict_files` with a deployed compressed model.

    Args:
        sources, output: see `pair_files`.
        engine: None predicts the files one after the other in this process.

    Raises:
        OutputError: `output` contains something else.
        PredictionError, ConfigError, BackendUnavailableError: see `predict_files` and `Deployment.load`.
    """

    def one_by_one(pairs: Sequence[Pair]) -> Iterator[Outcome]:
        finish = deployment.finisher()
        for pair in pairs:
            yield finish(pair, warn)

    pairs, made_from = pair_files(sources, output, warn), deployment.made_from()
    with held_folder(output):
        return predict_files(engine or one_by_one, pairs, made_from, warn=warn, notify=notify)


def _longest(model: Any, tokenizer: Any) -> int:
    """Maximum input length of a model, by its tokenizer, its configuration and its position tables."""
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if name.endswith(POSITIONS) and isinstance(module, torch.nn.Embedding)
    ]
    configured = getattr(model.config, "max_position_embeddings", None) or LONGEST
    return int(min(tokenizer.model_max_length, configured, LONGEST, *tables))


def make_answer(model: Any, tokenizer: Any, columns: Sequence[str], max_length: int, batch_size: int) -> Answer:
    """Build the function that gives a classifier's label and probability, or a regression's score.

    Args:
        model, tokenizer: with a sequence classification head, and its own tokenizer.
        columns: one or two text columns.
        max_length: maximum input length in tokens, as in training; longer inputs are truncated.
        batch_size: rows of similar length per batch.
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
