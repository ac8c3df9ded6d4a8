""""""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from attnpress.config import AttentionSpec, ScheduleSpec
from attnpress.models.binding import attentions, bind
from attnpress.tasks import TaskData
from attnpress.training.calibration import calibrate

TARGET = 0.7
SCHEDULE = ScheduleSpec("linear", end=0.5)


def make_batches(data: TaskData, count: int) -> list[dict[str, Tensor]]:
    return [data.collate([data.train[row] for row in range(16 * n, 16 * n + 16)]) for n in range(count)]


def bound(dense: PreTrainedModel, data: TaskData) -> PreTrainedModel:
    model = bind(dense, AttentionSpec())
    calibrate(model, make_batches(data, 4))
    return model


def arguments_of_a_trainer(folder: Path, **changes: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 16, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "learning_rate": 1e-3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **usual | changes)


def in_force(model: torch.nn.Module) -> set[float]:
    return {module.spec.sparsity for module in attentions(model).values()}
