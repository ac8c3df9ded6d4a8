"""Tiny encoders for tests of int8 layers and of running without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnpress.config import AttentionSpec
from attnpress.core.linear import ProductPlan
from attnpress.deployment.linear import calibrate_linear
from attnpress.models.binding import bind
from attnpress.models.encoder import plan_of
from attnpress.training.calibration import calibrate
from tests.kernels.factories import needs_kernel
from tests.models.factories import PAD, VOCABULARY, make_model

BACKENDS = [pytest.param("cpu", marks=needs_kernel), "reference"]
FAMILY = ("BERT", "RoBERTa", "ELECTRA")
PRUNED = AttentionSpec(sparsity=0.5)


def ragged(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).view(-1, 1)
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


BATCHES = [ragged(9, 4, 12, seed=1), ragged(5, 5, 16, 2, seed=2)]
BATCH = ragged(3, 11, 7, 1, 11, seed=3)


def compressed(name: str = "BERT", spec: AttentionSpec = PRUNED) -> Any:
    model = bind(make_model(name), spec)
    if not spec.is_dense:
        calibrate(model, BATCHES)
    return model


def planned(name: str = "BERT", tolerance: float = 10.0) -> Any:
    model = compressed(name)
    calibrate_linear(model, BATCHES, tolerance=tolerance)
    return model


def plan_in(model: Any) -> dict[str, ProductPlan]:
    found = plan_of(model)
    assert found, "nothing was planned"
    return found


def hidden(model: PreTrainedModel, batch: dict[str, Tensor] = BATCH, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch, **options).last_hidden_state
    return found


def real(x: Tensor, batch: dict[str, Tensor] = BATCH) -> Tensor:
    return x[batch["attention_mask"].bool()]
