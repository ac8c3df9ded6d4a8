"""Bound and calibrated models."""

from __future__ import annotations

from transformers import (
    PreTrainedModel,
)

from attnpress.config import AttentionSpec
from attnpress.models.binding import bind
from attnpress.training.calibration import calibrate
from tests.models.factories import (
    DECODERS,
    ENCODERS,
    make_batch,
    make_model,
)

PRUNED = AttentionSpec(sparsity=0.5)
QUANTIZED = AttentionSpec()
WITH_PADDING = [*ENCODERS, *DECODERS]


def compressed(name: str = "BERT", spec: AttentionSpec = PRUNED) -> PreTrainedModel:
    model = bind(make_model(name), spec)
    calibrate(model, [make_batch(name, seed=5), make_batch(name, lengths=(7, 7), seed=6)])
    return model
