"""Predictions of a model on the evaluation rows of a task, and their metrics."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel

from attnpress.config import BatchSize
from attnpress.config.recipe import checked
from attnpress.distributed import reduce_over_ranks, this_process
from attnpress.models.outputs import outputs
from attnpress.records.row_scores import RowScores, pack_rows
from attnpress.tasks import TaskData


def predict(model: PreTrainedModel, data: TaskData, batch_size: int = 32) -> dict[str, float]:
    """The task's metrics in points, headline first. Ranks share the rows; each row is predicted once."""
    return metrics_of(predicted_logits(model, data, batch_size), data)


def metrics_of(logits: Tensor, data: TaskData) -> dict[str, float]:
    """The task's metrics in points, headline first, for the result of `predicted_logits`."""
    return data.compute_metrics(_prediction(logits, data))


def row_scores_of(logits: Tensor, data: TaskData) -> RowScores | None:
    """Score of each evaluation row, for the result of `predicted_logits` with finite metrics.

    None for a part of the questions (`TaskData.watched`), which is not compared.
    """
    found = _prediction(logits, data)
    if data.task.kind == "qa":
        return data.question_scores and pack_rows("score", data.question_scores(found))
    outputs: Any = found.predictions
    if data.task.kind == "classification":
        return pack_rows("right", outputs.argmax(-1) == found.label_ids)
    return pack_rows("value", outputs[:, 0])


def _prediction(logits: Tensor, data: TaskData) -> EvalPrediction:
    found = logits.cpu().numpy()
    if data.task.kind == "qa":
        spans: Any = (found[:, 0], found[:, 1])  # its annotation allows one output only
        return EvalPrediction(spans, np.empty(0))
    return EvalPrediction(found[:, 0], np.asarray(data.eval["labels"]))


def predicted_logits(model: PreTrainedModel, data: TaskData, batch_size: int) -> Tensor:
    """Logits of all evaluation rows in order, on every rank; zero beyond the end of shorter rows.

    Returns:
        [rows, 1, classes], or [rows, 2, length] with the start and end logits of "qa".

    Raises:
        ConfigError: `batch_size` is out of range.
    """
    checked(BatchSize, batch_size, "batch_size")
    state, rows, outcomes = this_process(), len(data.eval), 2 if data.task.kind == "qa" else 1
    # Batches of similar length need the least padding.
    by_length = sorted(range(rows), key=[len(ids) for ids in data.eval["input_ids"]].__getitem__)
    mine = by_length[state.process_index :: state.num_processes]
    loader = DataLoader(data.eval.select(mine), batch_size, collate_fn=data.collate)
    shown = tqdm(loader, desc="evaluate", leave=False, delay=3, disable=not sys.stderr.isatty())
    parts = [
        torch.stack([output[key] for key in output if key.endswith("logits")], 1) for output in outputs(model, shown)
    ]
    longest = torch.tensor(max((part.shape[-1] for part in parts), default=1), device=model.device)
    widest = int(reduce_over_ranks(longest, "max"))
    # Each rank fills in its own rows; the sum over ranks is the complete result, without extra or duplicate rows.
    logits = torch.zeros(rows, outcomes, widest, device=model.device)
    padded = [F.pad(part.float(), (0, widest - part.shape[-1])) for part in parts]
    logits[mine] = torch.cat([logits[:0], *padded])
    return reduce_over_ranks(logits, "sum")
