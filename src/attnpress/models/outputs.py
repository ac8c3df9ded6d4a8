"""Outputs of a model for batches, in evaluation mode, on its own device, without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnpress.models.inputs import Batch, BatchError, describe, forward_inputs
from attnpress.models.modes import evaluation_mode
from attnpress.models.pipeline import called_with_batches


def first_output(model: nn.Module, batch: Batch) -> Tensor:
    """The model's first output for one batch, float32; if it has a row per token, only rows of real tokens."""
    inputs = forward_inputs(model, batch)
    (output,) = outputs(model, [inputs])
    first: Tensor = output[0].float()
    mask = inputs.get("attention_mask")
    return first if mask is None or mask.shape != first.shape[:2] else first[mask.bool().to(first.device)]


def outputs(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Any]:
    """The model's output for each batch, in evaluation mode, on its own device, without labels or gradients.

    Raises:
        BatchError: see `forward_inputs`; also if the batch holds tokens or positions that the model does not have.
    """
    with evaluation_mode(model):
        for number, batch in enumerate(batches):
            inputs = forward_inputs(model, batch, number)
            try:
                with torch.no_grad():
                    output = called_with_batches(model)(**inputs)
            except (IndexError, TypeError) as error:  # of tokens and positions that the model does not have
                reason = " ".join(str(error).split())
                raise BatchError(
                    f"batch {number}: {type(model).__name__} cannot be called with it ({reason}); it holds "
                    f"{describe(inputs)}"
                ) from error
            yield output
