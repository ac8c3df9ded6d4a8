"""Evaluation: metric and pair counts of a bound model on a task, and its stage record."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from attnpress.config import ConfigError, Count, RunConfig
from attnpress.config.recipe import checked
from attnpress.core.cost import FLOAT_BITS, PairCounts, total_work
from attnpress.distributed import reduce_over_ranks, this_process
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import bound_modules
from attnpress.models.watchers import Counting, watched
from attnpress.models.work import pairs_work, summed, tails_work
from attnpress.records.run import HeadRecord, LayerRecord, StageRecord
from attnpress.runs.finished import finished_model
from attnpress.tasks import TaskData
from attnpress.tasks.predictions import metrics_of, predicted_logits, row_scores_of


def evaluate(
    model: PreTrainedModel, data: TaskData, name: str, padded_length: int, batch_size: int = 32, seconds: float = 0.0
) -> StageRecord:
    """Metrics and sparsity of a bound model on the task's evaluation split.

    Args:
        model: bound; calibrated if its spec is not dense. It is moved to this process's device.
        name: of the stage.
        padded_length: length for `padded_sparsity`.
        seconds: wall time to record.

    Raises:
        ConfigError: the model is not bound; `batch_size` or `padded_length` is out of range, or smaller than a row.
    """
    checked(Count, padded_length, "padded_length")
    if (longest := max(map(len, data.eval["input_ids"]), default=0)) > padded_length:
        raise ConfigError(
            f"padded_length: {padded_length} is less than the longest evaluation row, of {longest} tokens"
        )
    modules = bound_modules(model.to(this_process().device))
    counting = {name: Counting(module) for name, module in modules.items()}
    with watched((module, counting[name]) for name, module in modules.items()):
        logits = predicted_logits(model, data, batch_size)
    metrics = metrics_of(logits, data)
    counts = {name: _merged(watcher.counts) for name, watcher in counting.items()}
    record = _stage_record(name, metrics, modules, counts, padded_length, seconds)
    return dataclasses.replace(record, row_scores=row_scores_of(logits, data))


def _merged(counts: PairCounts) -> PairCounts:
    return PairCounts(*(reduce_over_ranks(count, "sum") for count in counts.tensors()))


def _stage_record(
    name: str,
    metrics: dict[str, float],
    modules: dict[str, CompressedAttention],
    counts: dict[str, PairCounts],
    padded_length: int,
    seconds: float,
) -> StageRecord:
    merged = [count.total() for count in counts.values()]
    total = summed(merged)
    pairs = list(zip(modules.values(), merged, strict=True))
    work = dataclasses.asdict(total_work([make(*pair) for pair in pairs for make in (pairs_work, tails_work)]))
    if any(module.spec.tail != "none" for module in modules.values()):
        tail = total_work(tails_work(*pair) for pair in pairs)
        work |= {"macs_tail": tail.macs_remaining, "bit_operations_tail": tail.bit_operations_remaining}
        work |= {"bytes_tail": tail.bytes_remaining}
    return StageRecord(
        name=name,
        metrics=metrics,
        sparsity=float(total.sparsity()),
        pruned=float(total.pruned_fraction()),
        padded_sparsity=float(total.padded_sparsity(padded_length)),
        padded_length=padded_length,
        tile_sparsity=float(total.tile_sparsity()),
        keys_per_row=float(total.keys_per_row()),
        bits=_bits(list(modules.values())),
        macs_dense=work.pop("macs_dense"),
        macs_remaining=work.pop("macs_remaining"),
        work=work,
        layers=[_layer_record(key, module, counts[key], padded_length) for key, module in modules.items()],
        seconds=round(seconds, 1),
    )


def _bits(modules: Sequence[CompressedAttention]) -> dict[str, int | float | None]:
    each = {name: [module.spec.bits[name] for module in modules] for name in modules[0].spec.bits}
    return {
        name: bits[0] if len(set(bits)) == 1 else statistics.fmean(bit or FLOAT_BITS for bit in bits)
        for name, bits in each.items()
    }


def _layer_record(name: str, module: CompressedAttention, counts: PairCounts, padded_length: int) -> LayerRecord:
    pooled = counts.total()
    scales = {key: getattr(module, f"{key}_scale").flatten().tolist() for key in module.quantized()}
    return LayerRecord(
        name=name,
        sparsity=float(pooled.sparsity()),
        pruned=float(pooled.pruned_fraction()),
        padded_sparsity=float(pooled.padded_sparsity(padded_length)),
        tile_sparsity=float(pooled.tile_sparsity()),
        keys_per_row=float(pooled.keys_per_row()),
        scales=scales,
        heads=_head_records(module, counts),
        bits=module.spec.bits,
    )


def _head_records(module: CompressedAttention, counts: PairCounts) -> list[HeadRecord]:
    columns = (
        counts.sparsity(),
        counts.pruned_fraction(),
        counts.tile_sparsity(),
        counts.keys_per_row(),
        module.threshold(),
    )
    return [HeadRecord(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def reevaluate(run_folder: Path, config: RunConfig) -> StageRecord:
    """Evaluate the compressed model of a finished run, on its own data or another `config.data`.

    Raises:
        ConfigError: see `finished_model`.
    """
    model, data = finished_model(run_folder, config)
    return evaluate(model, data, "progressive", config.data.max_length)
