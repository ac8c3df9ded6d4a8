"""Evaluation: metric and pair counts of a bound model on a task, and the stage record made of them."""

from __future__ import annotations

import dataclasses
import tempfile

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from attnpress.calibrate import reduce_over_ranks
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
        model: bound; calibrated if its spec is not dense.
        name: of the stage.
        padded_length: length for `padded_sparsity`.
        seconds: wall time to record.
    """
    modules = attentions(model)
    for module in modules.values():
        module.counts = PairCounts.none_yet(module.heads)
    try:
        metrics = predict(model, data, batch_size)
        counts = {name: _merged(module) for name, module in modules.items()}
    finally:
        for module in modules.values():
            module.counts = None
    return _stage_record(name, metrics, modules, counts, padded_length, seconds)


def predict(model: PreTrainedModel, data: TaskData, batch_size: int = 32) -> dict[str, float]:
    """The task's metrics in points, headline first."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, per_device_eval_batch_size=batch_size, report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, data_collator=data.collate, compute_metrics=data.compute_metrics)
        found = trainer.predict(data.eval).metrics or {}
    timing = (
        "test_loss",
        "test_runtime",
        "test_samples_per_second",
        "test_steps_per_second",
        "test_model_preparation_time",
    )
    return {key.removeprefix("test_"): float(value) for key, value in found.items() if key not in timing}


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
