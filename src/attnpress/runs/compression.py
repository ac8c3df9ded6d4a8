"""compress: from a dense model to a compressed one, with a record of the cost of each step.

Each stage is recorded as soon as it is done, so the same command resumes after interruption: dense (fine-tuned here, or
a checkpoint), dense_control (optional), quantized, one_shot, progressive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from attnpress.config import DENSE, AttentionSpec, ConfigError, RunConfig, TrainSpec
from attnpress.config.recipe import spec_to_dict
from attnpress.distributed import this_process
from attnpress.files import add_text, sha256_of, whole_folder, write_bytes, write_text
from attnpress.models.binding import attentions, bind, layer_specs, unbind
from attnpress.models.loading import (
    WEIGHTS,
    class_names,
    load_compressed,
    load_fine_tuned,
    load_model,
    load_tokenizer,
    longest_input,
    resolve_model,
    stored_dtype,
    take_padding,
)
from attnpress.records.reading import to_json
from attnpress.records.row_scores import RowScores, pack_rows
from attnpress.records.run import STAGES, Record, StageRecord, read_record, with_head_figures
from attnpress.records.samples import samples_bytes, samples_file
from attnpress.runs.card import model_card
from attnpress.runs.evaluation import evaluate
from attnpress.runs.folder import check_space, claim_folder, differences, hold_folder, provenance
from attnpress.runs.sampling import take_samples
from attnpress.tasks import TaskData, check_data, load_task
from attnpress.tasks.batches import training_batches
from attnpress.tasks.labels import class_ids_by_name
from attnpress.training.calibration import calibrate, fit_thresholds
from attnpress.training.callbacks import SparsityCallback
from attnpress.training.progress import check_trackers
from attnpress.training.trainer import check_autocast, history_lines, read_history, train


@dataclasses.dataclass(frozen=True)
class Run:
    """State shared by all stages."""

    config: RunConfig
    output: Path
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    base: str
    tell: Callable[[str], None]
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def dense(self) -> str:
        """Folder of the fine-tuned dense model."""
        return str(self.config.checkpoint or self.output / "dense")

    def load(self, source: str) -> PreTrainedModel:
        """A model with the task's head; equal seeds give equal heads."""
        set_seed(self.config.seed)
        load = load_fine_tuned if source == self.dense else load_model
        model = load(source, self.data.task.kind, self.data.label_names)
        take_padding(model, self.tokenizer)
        _check_length(model, self.config.data.max_length)
        model.to(this_process().device)
        return model

    def calibration_batches(self) -> list[dict[str, Any]]:
        """See `calibration.training_batches`."""
        return training_batches(self.data, self.config.calibration, self.config.seed)


def compress(
    config: RunConfig,
    output: Path,
    notify: Callable[[str], None] = print,
    *,
    stages: Collection[str] = STAGES,
    callbacks: Sequence[TrainerCallback] = (),
) -> Record:
    """Run a recipe, or resume an interrupted one.

    Args:
        config: the recipe.
        output: run folder for `record.json`, weights, recipe and logs.
        notify: receives one line when a stage begins or is already done.
        stages: stages to run, of STAGES. A stage that needs the dense model finds it in `output` or
            `config.checkpoint`.
        callbacks: Trainer callbacks of stage progressive; its log includes the metric.

    Returns:
        The record, also written to `output/record.json`.

    Raises:
        ConfigError, TaskError, ModelError: found before any training starts.
        DivergedError: NaN or infinity in training; the last good checkpoint is kept.
    """
    if unknown := sorted(set(stages) - set(STAGES)):
        raise ConfigError(f"stages: no stage {unknown[0]!r}; give a list of some of {', '.join(STAGES)}")
    check_data(config.data)
    check_trackers(config.report_to)
    check_autocast(config.autocast)
    base = resolve_model(str(_checkpoint_folder(config) or config.model))
    tokenizer = load_tokenizer(base)
    data = _numbered(load_task(config.data, tokenizer, config.seed), base, config)
    tell = notify if this_process().is_main_process else (lambda _: None)
    run = Run(config, output, data, tokenizer, base, tell, callbacks)
    claim_folder(config, output)
    with hold_folder(output):
        record = _open_record(run)
        if (dtype := stored_dtype(base)) != torch.float32:
            kept = dtype if config.save_dtype == "original" else "torch.float32; save_dtype=original keeps that dtype"
            tell(f"model: its weights are {dtype}; trained in torch.float32, saved as {kept}")
        for name in STAGES:
            if name not in stages or (name == "dense_control" and not config.dense_control):
                continue
            if record.stage(name) is not None:
                tell(f"{name}: already done")
                continue
            tell(f"{name}: {_does(config, name)}")
            record = _run_stage(run, record, name)
    return record


def _numbered(data: TaskData, base: str, config: RunConfig) -> TaskData:
    """The data with classes in the model's order, if it has these classes.

    Raises:
        ConfigError: `config.checkpoint` was fine-tuned for other classes.
    """
    if data.task.kind != "classification":
        return data
    names = class_names(base)
    if config.checkpoint is None and class_ids_by_name(data.label_names, names) is None:
        return data  # a head for other classes, to be trained for these
    found = data.numbered_as(names)
    if found is None:
        raise ConfigError(
            f"checkpoint: {base} has the labels {', '.join(names)}, the data have {', '.join(data.label_names)}; make "
            "them the same, in the data or in id2label and label2id of its config.json"
        )
    return found


def _check_length(model: PreTrainedModel, max_length: int) -> None:
    longest = longest_input(model)
    if longest is not None and max_length > longest:
        raise ConfigError(f"data.max_length: {max_length} exceeds the model's {longest} positions")


def _checkpoint_folder(config: RunConfig) -> Path | None:
    if config.checkpoint is not None and not config.checkpoint.is_dir():
        raise ConfigError(
            f"checkpoint: no folder {config.checkpoint}; give one that save_pretrained wrote, or remove it"
        )
    return config.checkpoint


def _run_stage(run: Run, record: Record, name: str) -> Record:
    begin, state = time.monotonic(), this_process()
    model = _STAGES[name](run)
    stage = evaluate(model, run.data, name, run.config.data.max_length)
    if name == "dense" and run.config.checkpoint is not None:
        _warn_below_majority(run, stage)
    samples, figures = take_samples(model, run.data, run.tokenizer, run.config.attention.rule)
    record = record.with_stage(
        dataclasses.replace(with_head_figures(stage, figures), seconds=round(time.monotonic() - begin, 1))
    )
    if history := read_history(_log(run, name)):
        record = dataclasses.replace(record, training={**record.training, name: history})
    record.provenance["weights"].update(_hashes(run))
    record.provenance["machine"]["wall_seconds"] = round(sum(known.seconds for known in record.stages), 1)
    if state.is_main_process:
        if name == "progressive":
            add_text(run.output / name, "README.md", model_card(record, run.data.task.kind))
        write_bytes(samples_file(run.output, name), samples_bytes(samples))
        write_text(run.output / "record.json", to_json(record))
        shutil.rmtree(run.output / "checkpoints" / name, ignore_errors=True)
    state.wait_for_everyone()
    return record


def _warn_below_majority(run: Run, stage: StageRecord) -> None:
    headline, majority = run.data.task.headline, run.data.majority
    if this_process().is_main_process and majority is not None and stage.metrics[headline] < majority:
        warnings.warn(
            f"checkpoint: {run.base} has {headline} {stage.metrics[headline]:.2f}, less than always predicting the "
            f"most frequent class ({majority:.2f}); is it fine-tuned for this task, and are its labels "
            f"({', '.join(run.data.label_names)}) in the order of its outputs?",
            stacklevel=2,
        )


def _dense(run: Run) -> PreTrainedModel:
    folder = Path(run.dense)
    if not folder.is_dir():
        model = run.load(run.base)
        # A model that cannot be compressed is refused before it is trained, and so are layers that it lacks.
        unbind(bind(model, run.config.attention, run.config.layers))
        check_space(model, run.output)
        _train(run, model, "dense", run.config.dense)
        _save(folder, lambda scratch: _write_model(run, model, scratch))
    model = bind(run.load(run.dense), DENSE)
    layer_specs(list(attentions(model)), run.config.attention, run.config.layers)
    return model


def _dense_control(run: Run) -> PreTrainedModel:
    model = run.load(run.dense)
    # At a learning rate suited to a dense model without a teacher: a badly trained control would flatter compression.
    same_steps = dataclasses.replace(
        run.config.dense, epochs=run.config.compress.epochs, batch_size=run.config.compress.batch_size
    )
    _train(run, model, "dense_control", same_steps)
    return bind(model, DENSE)


def _quantized(run: Run) -> PreTrainedModel:
    return _compressed(run, lambda spec: dataclasses.replace(spec, sparsity=0.0, threshold=None))


def _one_shot(run: Run) -> PreTrainedModel:
    return _compressed(run, lambda spec: spec)


def _progressive(run: Run) -> PreTrainedModel:
    folder, config = run.output / "progressive", run.config
    if not folder.is_dir():
        # Fixed thresholds are fitted to the target before training.
        fixed = config.schedule.kind == "fixed"
        # So are budgets, which are measured at the target.
        model = _compressed(
            run, lambda spec: spec if fixed or spec.budget != "uniform" else _start(spec, config.schedule.start)
        )
        check_space(model, run.output)
        specs = layer_specs(list(attentions(model)), config.attention, config.layers)
        callback = SparsityCallback(model, config.schedule, {name: spec.sparsity for name, spec in specs.items()})
        teacher = bind(run.load(run.dense), DENSE)
        _train(run, model, "progressive", config.compress, teacher, [callback, *run.callbacks])
        if config.save_dtype == "original":  # before thresholds are fitted, so that they match the saved weights
            nn.Module.to(model, stored_dtype(run.base))
        if not fixed:
            fit_thresholds(model, run.calibration_batches())
        for module in attentions(model).values():
            module.histogram.zero_()  # only training needs it, so it is not saved
        _save(folder, lambda scratch: _write_model(run, model, scratch))
    return load_compressed(folder, run.data.task.kind, run.data.label_names)


_STAGES: dict[str, Callable[[Run], PreTrainedModel]] = {
    "dense": _dense,
    "dense_control": _dense_control,
    "quantized": _quantized,
    "one_shot": _one_shot,
    "progressive": _progressive,
}


def _does(config: RunConfig, name: str) -> str:
    if name == "dense" and config.checkpoint is not None:
        return f"evaluate the checkpoint {config.checkpoint}, without compression"
    return _DOES[name]


_DOES = {
    "dense": "fine-tune without compression",
    "dense_control": "train the dense model further, as long as the compressed one",
    "quantized": "quantize Q, K, V and P without training",
    "one_shot": "quantize and prune P at once, without training",
    "progressive": "quantize, and prune P progressively while training",
}


def _start(spec: AttentionSpec, sparsity: float) -> AttentionSpec:
    start = dataclasses.replace(spec, sparsity=min(sparsity, spec.sparsity))
    # Attention without compression is the framework's own, and gives no pairs to fit a threshold to.
    return spec if start.is_dense else start


def _compressed(run: Run, change: Callable[[AttentionSpec], AttentionSpec]) -> PreTrainedModel:
    specs = {key: change(spec) for key, spec in run.config.layers.items()}
    model = bind(run.load(run.dense), change(run.config.attention), specs)
    calibrate(model, run.calibration_batches())
    return model


def _train(
    run: Run,
    model: PreTrainedModel,
    name: str,
    spec: TrainSpec,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    folder, config = run.output / "checkpoints" / name, run.config
    with _matmul_precision(config.matmul_precision):
        history = train(
            model,
            run.data,
            spec,
            folder,
            config.seed,
            config.distillation,
            teacher,
            callbacks,
            config.report_to,
            config.autocast,
        )
    if this_process().is_main_process:
        # Written before the weights, so that a run killed in between keeps its history.
        write_text(_log(run, name), history_lines([entry for entry in history if "loss" in entry]))
    this_process().wait_for_everyone()


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Precision of float32 products inside the `with` block; evaluation uses full precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _log(run: Run, name: str) -> Path:
    return run.output / "logs" / f"{name}.jsonl"


def _save(folder: Path, write: Callable[[Path], None]) -> None:
    if this_process().is_main_process:
        with whole_folder(folder, "model") as scratch:
            write(scratch)
    this_process().wait_for_everyone()


def _write_model(run: Run, model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def _open_record(run: Run) -> Record:
    now = provenance(run.config.seed, run.base, run.data)
    if not (run.output / "record.json").is_file():
        record = Record(
            spec_to_dict(run.config), run.data.task.headline, run.data.majority, now, targets=_targets(run.data)
        )
        if this_process().is_main_process:
            write_text(run.output / "record.json", to_json(record))
        return record
    record = read_record(run.output)
    changed = differences(_sources(record.provenance), _sources(now))
    if changed:
        raise ConfigError(
            f"{run.output}: the sha256 of {', '.join(changed)} is not what it was when this run began; "
            "restore the files, or choose another --output"
        )
    return record


def _targets(data: TaskData) -> RowScores | None:
    return pack_rows("value", data.eval["labels"][:]) if data.task.kind == "regression" else None


def _sources(provenance: dict[str, Any]) -> dict[str, Any]:
    return {"data": provenance["data"], "model": provenance["weights"]["base"]}


def _hashes(run: Run) -> dict[str, str]:
    files = {"dense": Path(run.dense) / WEIGHTS, "progressive": run.output / "progressive" / WEIGHTS}
    return {name: sha256_of(file) for name, file in files.items() if file.is_file()}
