"""A small compressed classifier, its outputs, and loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, TensorSpec
from attnpress.models.binding import bind
from attnpress.training.calibration import calibrate
from tests.models.factories import make_batch, make_classifier

SPECS = {
    "relative": AttentionSpec(sparsity=0.7),
    "topk": AttentionSpec(rule="topk", sparsity=0.7),
    "two of four": AttentionSpec(rule="nm", sparsity=0.5),
    "trained thresholds": AttentionSpec(sparsity=0.6, threshold_penalty=2.0),
    "fixed threshold": AttentionSpec(rule="threshold", threshold=0.05),
    "learned": AttentionSpec(q=TensorSpec(learned=True), v=TensorSpec(bits=4, granularity="channel"), sparsity=0.5),
    "dynamic": AttentionSpec(q=TensorSpec(granularity="token"), p=ProbsSpec(mode="unit"), smooth_key=True),
    "dense": DENSE,
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**make_batch()).logits
    return found


def make_compressed(spec: AttentionSpec = SPECS["relative"]) -> PreTrainedModel:
    model = bind(make_classifier(num_labels=3), spec)
    calibrate(model, [make_batch(seed=3)])
    return model


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, **arguments)
    return model
