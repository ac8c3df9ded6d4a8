"""Inputs of attention as a trained model has them, on its evaluation data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from attnpress.benchmark.problem import Problem
from attnpress.config import AttentionSpec, RunConfig
from attnpress.core.attention import Scales
from attnpress.core.cost import PairCounts
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attentions
from attnpress.models.outputs import outputs
from attnpress.runs.finished import finished_model


def captured_problems(run_folder: Path, config: RunConfig, rows: int) -> list[Problem]:
    """What the attention of a finished run's compressed model is given for its first evaluation rows, layer by layer.

    Args:
        run_folder: where `attnpress compress` left its results.
        config: of the run.
        rows: how many, in one batch padded to the longest.

    Raises:
        ConfigError: the run has no compressed model yet, or one that `config.data` does not fit.
    """
    model, data = finished_model(run_folder, config)
    modules = {name: module for name, module in attentions(model).items() if not module.spec.is_dense}
    calls = {name: _capture(module) for name, module in modules.items()}
    chosen = range(min(rows, len(data.eval)))
    for _ in outputs(model, [data.collate([data.eval[row] for row in chosen])]):
        pass
    return [
        replace(problem, source=str(run_folder), layer=name, sparsity=_counted_sparsity(modules[name]))
        for name, found in calls.items()
        for problem in found[:1]  # a module shared by layers is called once for each
    ]


def _capture(module: CompressedAttention) -> list[Problem]:
    """A list that the module's calls are added to, with their sparsity still open; counts its pairs too."""
    found: list[Problem] = []

    def attend(
        query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales,
        cutoff: Tensor | None, spec: AttentionSpec, scaling: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        found.append(Problem(query, key, value, valid, scales, cutoff, spec, scaling, torch.nan))
        return fake_quantize_attention(query, key, value, valid, scales, cutoff, spec, scaling, dropout)

    module.attend, module.counts = attend, PairCounts.none_yet(module.heads)
    return found


def _counted_sparsity(module: CompressedAttention) -> float:
    assert module.counts is not None
    return float(module.counts.total().sparsity())
