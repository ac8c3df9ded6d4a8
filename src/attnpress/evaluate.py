"""Evaluation: metric and pair counts of a bound model on a task, and the stage record made of them."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel

from attnpress.calibration import outputs, reduce_over_ranks, this_process
from attnpress.core.cost import PairCounts, attention_work
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attentions
from attnpress.results import HeadRecord, LayerRecord, StageRecord
from attnpress.tasks import TaskData


def evaluate(
    model: PreTrainedModel, data: TaskData, name: str, padded_length: int, batch_size: int = 32, seconds: float = 0.0
) -> StageRecord:
    """Metrics and sparsity of a bound model on the task's evaluation split.

    Args:
        model: bound; calibrated if its spec is not dense. Goes to this process's device.
        name: of the stage.
        padded_length: length for `padded_sparsity`.
        seconds: wall time to record.
    """
    modules = attentions(model.to(this_process().device))
    for module in modules.values():
        module.counts = PairCounts(
            *(none.to(module.cutoff.device) for none in PairCounts.none_yet(module.heads).tensors())
        )
    try:
        metrics = predict(model, data, batch_size)
        counts = {name: _merged(module) for name, module in modules.items()}
    finally:
        for module in modules.values():
            module.counts = None
    return _stage_record(name, metrics, modules, counts, padded_length, seconds)


def predict(model: PreTrainedModel, data: TaskData, batch_size: int = 32) -> dict[str, float]:
    """The task's metrics in points, headline first; ranks share the rows, and none is seen twice."""
    logits = predicted_logits(model, data, batch_size).cpu().numpy()
    if data.task.kind == "qa":
        spans: Any = (logits[:, 0], logits[:, 1])  # its annotation allows one output only
        return data.compute_metrics(EvalPrediction(spans, np.empty(0)))
    return data.compute_metrics(EvalPrediction(logits[:, 0], np.asarray(data.eval["labels"])))


def predicted_logits(model: PreTrainedModel, data: TaskData, batch_size: int) -> Tensor:
    """Logits of all evaluation rows, in their order and on every rank, zero where a row is shorter than the longest.

    Returns:
        [rows, 1, classes], or [rows, 2, length] with the start and end logits of "qa".
    """
    state, rows, outcomes = this_process(), len(data.eval), 2 if data.task.kind == "qa" else 1
    mine = range(state.process_index, rows, state.num_processes)
    loader = DataLoader(data.eval.select(mine), batch_size, collate_fn=data.collate)
    shown = tqdm(loader, desc="evaluate", leave=False, delay=3, disable=not sys.stderr.isatty())
    parts = [
        torch.stack([output[key] for key in output if key.endswith("logits")], 1) for output in outputs(model, shown)
    ]
    longest = torch.tensor(max((part.shape[-1] for part in parts), default=1), device=model.device)
    widest = int(reduce_over_ranks(longest, "max"))
    # Each rank fills in its own rows, so that the sum over ranks is the whole: no row is padded in, none is doubled.
    logits = torch.zeros(rows, outcomes, widest, device=model.device)
    padded = [F.pad(part.float(), (0, widest - part.shape[-1])) for part in parts]
    logits[mine.start :: mine.step] = torch.cat([logits[:0], *padded])
    return reduce_over_ranks(logits, "sum")


def _merged(module: CompressedAttention) -> PairCounts:
    assert module.counts is not None
    return PairCounts(*(reduce_over_ranks(count, "sum") for count in module.counts.tensors()))


def _stage_record(
    name: str, metrics: dict[str, float], modules: dict[str, CompressedAttention], counts: dict[str, PairCounts],
    padded_length: int, seconds: float,
) -> StageRecord:  # fmt: skip
    merged = [count.total() for count in counts.values()]
    total = PairCounts(
        *(torch.stack(parts).sum(0) for parts in zip(*(count.tensors() for count in merged), strict=True))
    )
    first = next(iter(modules.values()))
    pairs, survivors = int(total.pairs), int(total.pairs - total.zeros)
    work = dataclasses.asdict(attention_work(pairs, survivors, first.head_dim, first.spec.bits))
    return StageRecord(
        name=name, metrics=metrics,
        sparsity=float(total.sparsity()), pruned=float(total.pruned_fraction()),
        padded_sparsity=float(total.padded_sparsity(padded_length)), padded_length=padded_length,
        tile_sparsity=float(total.tile_sparsity()), keys_per_row=float(total.keys_per_row()),
        bits=first.spec.bits, macs_dense=work.pop("macs_dense"), macs_remaining=work.pop("macs_remaining"), work=work,
        layers=[_layer_record(key, module, counts[key], padded_length) for key, module in modules.items()],
        seconds=round(seconds, 1),
    )  # fmt: skip


def _layer_record(name: str, module: CompressedAttention, counts: PairCounts, padded_length: int) -> LayerRecord:
    pooled = counts.total()
    scales = {key: getattr(module, f"{key}_scale").flatten().tolist() for key in module.quantized()}
    return LayerRecord(
        name=name, sparsity=float(pooled.sparsity()), pruned=float(pooled.pruned_fraction()),
        padded_sparsity=float(pooled.padded_sparsity(padded_length)), tile_sparsity=float(pooled.tile_sparsity()),
        keys_per_row=float(pooled.keys_per_row()), scales=scales, heads=_head_records(module, counts),
    )  # fmt: skip


def _head_records(module: CompressedAttention, counts: PairCounts) -> list[HeadRecord]:
    columns = (
        counts.sparsity(), counts.pruned_fraction(), counts.tile_sparsity(), counts.keys_per_row(), module.threshold(),
    )  # fmt: skip
    return [HeadRecord(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
