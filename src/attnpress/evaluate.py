"""Evaluation: metric and pair counts of a bound model on a task, and the stage record made of them.

Of finished runs, too: on other data, or to prove that a backend predicts what the trained model predicts.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from attnpress.calibration import bound_modules, outputs, reduce_over_ranks, this_process, training_batches
from attnpress.config import BatchSize, ConfigError, Count, RunConfig
from attnpress.core.cost import FLOAT_BITS, PairCounts, total_work
from attnpress.core.linear import ProductPlan
from attnpress.deployment import Linear, deploy, place_on
from attnpress.kernels import cpu
from attnpress.linear import calibrate_linear, linear_layers
from attnpress.models.attention import CompressedAttention
from attnpress.models.counting import counting, pairs_work, summed, tails_work
from attnpress.models.encoder import plan_of
from attnpress.models.loading import class_names, load_compressed, load_tokenizer, weights_hash
from attnpress.recipe import checked
from attnpress.results import HeadRecord, LayerRecord, StageRecord
from attnpress.tasks import TaskData, load_task


def evaluate(
    model: PreTrainedModel, data: TaskData, name: str, padded_length: int, batch_size: int = 32, seconds: float = 0.0
) -> StageRecord:
    """Metrics and sparsity of a bound model on the task's evaluation split.

    Args:
        model: bound; calibrated if its spec is not dense. Goes to this process's device.
        name: of the stage.
        padded_length: length for `padded_sparsity`.
        seconds: wall time to record.

    Raises:
        ConfigError: the model is not bound; `batch_size` or `padded_length` is out of range, or less than a row has.
    """
    checked(Count, padded_length, "padded_length")
    if (longest := max(map(len, data.eval["input_ids"]), default=0)) > padded_length:
        raise ConfigError(
            f"padded_length: {padded_length} is less than the longest evaluation row, of {longest} tokens"
        )
    modules = bound_modules(model.to(this_process().device))
    with counting(modules.values()) as found:
        metrics = predict(model, data, batch_size)
    counts = {name: _merged(count) for name, count in zip(modules, found, strict=True)}
    return _stage_record(name, metrics, modules, counts, padded_length, seconds)


def predict(model: PreTrainedModel, data: TaskData, batch_size: int = 32) -> dict[str, float]:
    """The task's metrics in points, headline first; ranks share the rows, and none is seen twice."""
    return metrics_of(predicted_logits(model, data, batch_size), data)


def metrics_of(logits: Tensor, data: TaskData) -> dict[str, float]:
    """The task's metrics in points, headline first, of what `predicted_logits` returns."""
    found = logits.cpu().numpy()
    if data.task.kind == "qa":
        spans: Any = (found[:, 0], found[:, 1])  # its annotation allows one output only
        return data.compute_metrics(EvalPrediction(spans, np.empty(0)))
    return data.compute_metrics(EvalPrediction(found[:, 0], np.asarray(data.eval["labels"])))


def predicted_logits(model: PreTrainedModel, data: TaskData, batch_size: int) -> Tensor:
    """Logits of all evaluation rows, in their order and on every rank, zero where a row is shorter than the longest.

    Returns:
        [rows, 1, classes], or [rows, 2, length] with the start and end logits of "qa".

    Raises:
        ConfigError: `batch_size` is out of range.
    """
    checked(BatchSize, batch_size, "batch_size")
    state, rows, outcomes = this_process(), len(data.eval), 2 if data.task.kind == "qa" else 1
    # Rows of like length together are padded the least.
    by_length = sorted(range(rows), key=[len(ids) for ids in data.eval["input_ids"]].__getitem__)
    mine = by_length[state.process_index :: state.num_processes]
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
    logits[mine] = torch.cat([logits[:0], *padded])
    return reduce_over_ranks(logits, "sum")


def _merged(counts: PairCounts) -> PairCounts:
    return PairCounts(*(reduce_over_ranks(count, "sum") for count in counts.tensors()))


def _stage_record(
    name: str, metrics: dict[str, float], modules: dict[str, CompressedAttention], counts: dict[str, PairCounts],
    padded_length: int, seconds: float,
) -> StageRecord:  # fmt: skip
    merged = [count.total() for count in counts.values()]
    total = summed(merged)
    pairs = list(zip(modules.values(), merged, strict=True))
    work = dataclasses.asdict(total_work([make(*pair) for pair in pairs for make in (pairs_work, tails_work)]))
    if any(module.spec.tail != "none" for module in modules.values()):
        tail = total_work(tails_work(*pair) for pair in pairs)
        work |= {"macs_tail": tail.macs_remaining, "bit_operations_tail": tail.bit_operations_remaining}
        work |= {"bytes_tail": tail.bytes_remaining}
    return StageRecord(
        name=name, metrics=metrics,
        sparsity=float(total.sparsity()), pruned=float(total.pruned_fraction()),
        padded_sparsity=float(total.padded_sparsity(padded_length)), padded_length=padded_length,
        tile_sparsity=float(total.tile_sparsity()), keys_per_row=float(total.keys_per_row()),
        bits=_bits(list(modules.values())),
        macs_dense=work.pop("macs_dense"), macs_remaining=work.pop("macs_remaining"), work=work,
        layers=[_layer_record(key, module, counts[key], padded_length) for key, module in modules.items()],
        seconds=round(seconds, 1),
    )  # fmt: skip


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
        name=name, sparsity=float(pooled.sparsity()), pruned=float(pooled.pruned_fraction()),
        padded_sparsity=float(pooled.padded_sparsity(padded_length)), tile_sparsity=float(pooled.tile_sparsity()),
        keys_per_row=float(pooled.keys_per_row()), scales=scales, heads=_head_records(module, counts),
        bits=module.spec.bits,
    )  # fmt: skip


def _head_records(module: CompressedAttention, counts: PairCounts) -> list[HeadRecord]:
    columns = (
        counts.sparsity(), counts.pruned_fraction(), counts.tile_sparsity(), counts.keys_per_row(), module.threshold(),
    )  # fmt: skip
    return [HeadRecord(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def finished_model(run_folder: Path, config: RunConfig) -> tuple[PreTrainedModel, TaskData]:
    """The compressed model of a finished run, or of a folder that `save_pretrained` wrote, and the data of `config`.

    Raises:
        ConfigError: the run has no compressed model yet, or one with other classes.
    """
    folder = _finished_folder(run_folder)
    data, names = load_task(config.data, load_tokenizer(str(folder)), config.seed), class_names(str(folder))
    saved = AutoConfig.from_pretrained(folder)
    answers_questions = any("QuestionAnswering" in name for name in saved.architectures or ())
    classes = max(1, len(data.label_names))
    if answers_questions != (data.task.kind == "qa") or (not answers_questions and len(names) != classes):
        raise ConfigError(
            f"--task {data.task.name}: a task of kind {data.task.kind!r} with {classes} outputs, but the model of "
            f"{run_folder} was trained for another; choose a task that its head fits"
        )
    numbered = data.numbered_as(names) if data.task.kind == "classification" else data
    if numbered is None:
        raise ConfigError(
            f"--task {data.task.name}: its labels are {', '.join(data.label_names)}, those of the model of "
            f"{run_folder} are {', '.join(names)}; choose a task with the labels that it was trained for"
        )
    return load_compressed(folder, data.task.kind, numbered.label_names), numbered


def reevaluate(run_folder: Path, config: RunConfig) -> StageRecord:
    """Evaluate the compressed model of a finished run, on its own data or another `config.data`.

    Raises:
        ConfigError: see `finished_model`.
    """
    model, data = finished_model(run_folder, config)
    return evaluate(model, data, "progressive", config.data.max_length)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A deployed model beside the trained one, on the same rows.

    Attributes:
        backend, target: what the deployed model ran on; target is None for the reference.
        linear: what ran: "int8" where at least one linear layer did in 8 bits, else "float".
        float_products: products of linear layers that stayed in float all the same, because they lost too much.
        rows: of the evaluation split; in qa, windows.
        same_predictions: rows with the same class; in qa, likeliest start and end; in regression, number.
        identical_logits: rows whose logits are equal to the bit.
        largest_difference: between two logits.
        trained, deployed: metrics in points.
        weights: sha256 of the compressed model's weights.
        data: sha256 of the sources of the evaluation rows, as `TaskData.fingerprint` has it.
    """

    backend: str
    target: str | None
    linear: str
    float_products: list[str]
    rows: int
    same_predictions: int
    identical_logits: int
    largest_difference: float
    trained: dict[str, float]
    deployed: dict[str, float]
    weights: str | None
    data: str | None

    @property
    def complete(self) -> bool:
        """True if every row has the same prediction."""
        return self.same_predictions == self.rows


def compare_backends(
    run_folder: Path, config: RunConfig, backend: str, linear: Linear = "float", batch_size: int = 32
) -> Agreement:
    """Predictions of a finished run's compressed model, as trained and deployed on a backend, on every evaluation row.

    Args:
        linear: "int8" deploys the linear layers in 8 bits; see `plan_linear`.

    Raises:
        ConfigError: see `finished_model`; or int8 layers are asked for, and none of the model's can be.
        BackendUnavailableError, ValueError: see `deploy`.
    """
    model, data = finished_model(run_folder, config)
    place_on(backend, model)
    trained = predicted_logits(model, data, batch_size)
    plan = plan_linear(model, lambda: data, config) if linear == "int8" else {}
    deploy(model, backend, linear=linear)
    ran: Linear = "int8" if linear_layers(model).int8 else "float"
    if linear == "int8" and ran == "float":
        raise ConfigError(
            f"--linear int8: all linear layers of {type(model).__name__} stay in float, so nothing can be compared: "
            "they are not those of a BERT, RoBERTa or ELECTRA encoder in float32, or lose too much; drop --linear"
        )
    deployed = predicted_logits(model, data, batch_size)
    identical = (trained == deployed).flatten(1).all(1)
    same = identical if data.task.kind == "regression" else (trained.argmax(-1) == deployed.argmax(-1)).all(1)
    return Agreement(
        backend, cpu.active_target() if backend == "cpu" else None,
        ran, [name for name, product in plan.items() if not product.quantized], len(trained), int(same.sum()),
        int(identical.sum()), float((trained - deployed).abs().max()),
        metrics_of(trained, data), metrics_of(deployed, data),
        weights_hash(str(_finished_folder(run_folder))), data.fingerprint.get("eval"),
    )  # fmt: skip


def plan_linear(model: PreTrainedModel, data: Callable[[], TaskData], config: RunConfig) -> dict[str, ProductPlan]:
    """What of the linear layers is to be in 8 bits.

    Args:
        data: of the run; asked for only if the model has no plan, which is then made from its calibration batches.
    """
    return plan_of(model) or calibrate_linear(model, training_batches(data(), config.calibration, config.seed))


def finished_classifier(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The compressed model of a finished run and its tokenizer, without the data that it was trained on.

    Args:
        folder: of the run, or one that `save_pretrained` wrote.

    Raises:
        ConfigError: no finished model, or one that answers questions.
        ModelError: the model or its tokenizer cannot be loaded, or its classes are not numbered from 0.
    """
    place = _finished_folder(folder)
    saved = AutoConfig.from_pretrained(place)
    if any("QuestionAnswering" in name for name in saved.architectures or ()):
        raise ConfigError(f"{folder}: answers questions; only models that classify or score texts can be run")
    names = class_names(str(place))
    regression = saved.problem_type == "regression" or (saved.problem_type is None and len(names) == 1)
    kind = "regression" if regression else "classification"
    return load_compressed(place, kind, names), load_tokenizer(str(place))


def is_saved_model(folder: Path) -> bool:
    """Whether a folder is what `save_pretrained` writes, and no run folder."""
    return (folder / "config.json").is_file() and not (folder / "recipe.yaml").is_file()


def _finished_folder(run_folder: Path) -> Path:
    folder = run_folder if is_saved_model(run_folder) else run_folder / "progressive"
    if not folder.is_dir():
        raise ConfigError(
            f"{run_folder}: holds no finished compressed model; run `attnpress compress` to its end first"
        )
    return folder
