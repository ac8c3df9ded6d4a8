"""Inputs of attention captured from a trained model on its evaluation data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from attnpress.benchmark.problem import Problem
from attnpress.config import RunConfig
from attnpress.core.call import Attend, AttentionCall
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.models.binding import attending, attentions
from attnpress.models.outputs import outputs
from attnpress.models.watchers import Counting, start
from attnpress.runs.finished import finished_model


def captured_problems(run_folder: Path, config: RunConfig, rows: int) -> list[Problem]:
    """Inputs of each attention layer of a finished run's compressed model for its first evaluation rows.

    Args:
        run_folder: written by `attnpress compress`.
        config: of the run.
        rows: number of rows, in one batch padded to the longest.

    Raises:
        ConfigError: the run has no compressed model yet, or `config.data` does not match it.
    """
    model, data = finished_model(run_folder, config)
    modules = {name: module for name, module in attentions(model).items() if not module.spec.is_dense}
    calls: dict[str, list[Problem]] = {name: [] for name in modules}
    counting = {name: start(module, Counting(module)) for name, module in modules.items()}
    chosen = range(min(rows, len(data.eval)))
    with attending({module: _capturing(calls[name]) for name, module in modules.items()}):
        for _ in outputs(model, [data.collate([data.eval[row] for row in chosen])]):
            pass
    return [
        replace(problem, source=str(run_folder), layer=name, sparsity=float(counting[name].counts.total().sparsity()))
        for name, found in calls.items()
        for problem in found[:1]  # a module shared by layers is called once for each
    ]


def _capturing(found: list[Problem]) -> Attend:
    """The training forward; each call is added to the list, with its sparsity not yet set."""

    def attend(call: AttentionCall) -> Tensor:
        found.append(Problem(call, torch.nan))
        return fake_quantize_attention(call)

    return attend
