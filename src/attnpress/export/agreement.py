"""Comparison of the exported file with the deployed model on the whole evaluation set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnpress.core.rules import runs_on
from attnpress.deployment.attention import deploy, undeploy
from attnpress.export.errors import ExportError
from attnpress.kernels import cpu, head_size
from attnpress.models.binding import attentions
from attnpress.models.modes import evaluation_mode
from attnpress.tasks import TaskData
from attnpress.tasks.predictions import metrics_of, predicted_logits

TOLERANCE = 0.2
"""Points of the headline metric by which a runtime may differ."""

Infer = Callable[[Mapping[str, np.ndarray[Any, Any]]], Sequence[np.ndarray[Any, Any]]]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A runtime compared with the deployed model, on the same rows.

    Attributes:
        metric: name of the headline metric; deployed, exported: its value in points.
        rows: of the evaluation set.
        same_decisions: fraction of rows (in qa: of windows and ends) whose largest logit is at the same index.
        largest_logit_difference: over all logits.
        backend: backend of the deployed model's attention.
    """

    metric: str
    deployed: float
    exported: float
    rows: int
    same_decisions: float
    largest_logit_difference: float
    backend: str

    @property
    def difference(self) -> float:
        """Difference of the metrics, in points."""
        return abs(self.deployed - self.exported)


class Served(nn.Module):
    """An exported file with the interface of a model: inputs by name in, outputs by name out."""

    def __init__(self, infer: Infer, outputs: Sequence[str]) -> None:
        super().__init__()
        self.infer, self.outputs = infer, tuple(outputs)
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # read by callers to find the device

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.anchor.device

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """The outputs of one batch."""
        found = self.infer({name: tensor.numpy() for name, tensor in batch.items()})
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, found, strict=True)}


def compare(model: Any, served: Served, data: TaskData, batch_size: int = 32) -> Agreement:
    """Evaluate the deployed model and the exported one.

    Raises:
        ExportError: their metrics differ by more than TOLERANCE.
    """
    backend = usable_backend(attentions(model).values())
    with evaluation_mode(model):
        deploy(model, backend)
        try:
            ours = predicted_logits(model, data, batch_size)
        finally:
            undeploy(model)
    theirs = predicted_logits(served, data, batch_size)  # type: ignore[arg-type]
    headline, deployed = next(iter(metrics_of(ours, data).items()))
    found = Agreement(
        headline,
        deployed,
        metrics_of(theirs, data)[headline],
        len(ours),
        _same_decisions(ours, theirs),
        float((ours - theirs).abs().max()),
        backend,
    )
    if not found.difference <= TOLERANCE:
        raise ExportError(
            f"the exported model gives {headline} {found.exported:.2f}, the deployed one {found.deployed:.2f}: more "
            f"than {TOLERANCE} points apart on {found.rows} rows, so nothing was written; please report it"
        )
    return found


def usable_backend(modules: Any) -> str:
    """The compiled kernel if it is built and supports the rule, else the reference."""
    compressed = [module for module in modules if not module.spec.is_dense]
    native = all(runs_on("cpu", module.spec) and head_size.fits(module.head_dim) for module in compressed)
    return "cpu" if native and cpu.is_built() else "reference"


def _same_decisions(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape[-1] == 1:  # regression has a single output, which is compared directly
        return float((ours - theirs).abs().le(1e-3).double().mean())
    return float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
