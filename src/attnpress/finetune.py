"""Training: one Transformers Trainer for dense and compressing stages; a callback asks for sparsity, a teacher helps.

`SparsityCallback` works with any Trainer; `SparsityDriver`, which it drives, with any loop of your own.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from attnpress.calibration import reduce_over_ranks, this_process
from attnpress.config import DistillationSpec, ScheduleSpec, TrainSpec
from attnpress.core.distillation import attention_loss, check_gradients, logits_loss
from attnpress.core.schedule import sparsity_at
from attnpress.live import LiveView, MetricCallback, PlainView, add_to_log, trackers
from attnpress.models.attention import HISTOGRAM_DECAY, ROW_STRIDE
from attnpress.models.binding import attentions, captured_outputs, threshold_penalty
from attnpress.tasks import TaskData
from attnpress.tasks.sampler import LengthSampler

Target = float | Mapping[str, float]

COMPLETE = "complete"
"""Marker file written last into a checkpoint: one without it was cut short and is never resumed from."""


class DivergedError(RuntimeError):
    """The loss or a weight became NaN or infinite; the last good checkpoint is kept."""


class SparsityDriver:
    """Raises the sparsity of a bound model step by step; for any training loop.

    Call `begin(step)` before a step's forward passes and `end()` after its update. Nothing else is kept here: the
    thresholds and their histogram are buffers of the model, so a checkpoint holds all that a resumed run needs.

    Args:
        model: bound and calibrated.
        schedule: how sparsity grows.
        target: sparsity to end at; or one for each attention module, by name.
        total: number of steps of the training.
    """

    def __init__(self, model: nn.Module, schedule: ScheduleSpec, target: Target, total: int) -> None:
        modules = attentions(model)
        targets = target if isinstance(target, Mapping) else dict.fromkeys(modules, target)
        self.modules = list(modules.values())
        self.targets = [targets[name] for name in modules]
        self.schedule, self.total, self.achieved = schedule, total, 0.0

    def begin(self, step: int) -> float:
        """Refit thresholds to the sparsity asked at `step` (from 0), watch its pairs; returns the mean asked."""
        asked = [sparsity_at(step, self.total, self.schedule, target) for target in self.targets]
        for module, sparsity in zip(self.modules, asked, strict=True):
            if self.schedule.kind != "fixed":
                module.set_sparsity(sparsity)
            module.rows = slice(step % ROW_STRIDE, None, ROW_STRIDE)
        return asked[0] if len(set(asked)) == 1 else statistics.fmean(asked)

    def end(self) -> float:
        """Add the pairs that all ranks have seen in this step to the running histogram.

        Returns:
            The fraction of those pairs that this step's thresholds pruned; the last known where no row was watched.
        """
        counts = []
        for module in self.modules:
            module.rows = None
            counts.append(module.take_seen(HISTOGRAM_DECAY, reduce_over_ranks))
        pruned, pairs = torch.stack(counts).sum(0).tolist()
        self.achieved = float(pruned / pairs) if pairs else self.achieved
        return self.achieved

    def freeze(self) -> None:
        """Ask for the target itself when training is over: the last step may have asked for less."""
        for module, target in zip(self.modules, self.targets, strict=True):
            if self.schedule.kind != "fixed":
                module.set_sparsity(target)


class SparsityCallback(TrainerCallback):
    """Progressive pruning as a Trainer callback.

    Args:
        model: bound and calibrated.
        schedule, target: see `SparsityDriver`.
    """

    def __init__(self, model: nn.Module, schedule: ScheduleSpec, target: Target) -> None:
        self.driver = SparsityDriver(model, schedule, target, total=1)
        self.asked = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for the sparsity of this step."""
        self.driver.total = state.max_steps
        self.asked = self.driver.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Collect what the step has seen, before any checkpoint is written."""
        self.driver.end()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the model at its target, also when training was resumed from its very last checkpoint."""
        self.driver.freeze()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Put the sparsity asked and achieved in the last step beside the loss."""
        add_to_log(state, logs, {"sparsity_asked": self.asked, "sparsity_achieved": self.driver.achieved})


class CheckpointCallback(TrainerCallback):
    """Marks checkpoints that are whole, and refuses to keep one whose weights are not finite."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called when all files of a checkpoint are written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        finite = model is None or all(bool(torch.isfinite(p).all()) for p in model.parameters())
        this_process().wait_for_everyone()  # each rank writes its random state
        if not state.is_world_process_zero or not folder.is_dir():
            return
        if not finite:
            shutil.rmtree(folder)
            raise DivergedError(diverged_message(state.global_step))
        (folder / COMPLETE).touch()


class CompressionTrainer(Trainer):
    """The one Trainer: the task's loss, plus distillation where a teacher is given.

    Args:
        teacher: dense model, bound with `DENSE` so that its attention outputs can be seen; None for plain training.
        distillation: weights of its terms.
    """

    def __init__(
        self, *args: Any, teacher: PreTrainedModel | None, distillation: DistillationSpec, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.world_size
        lengths = [len(ids) for ids in rows["input_ids"]]
        return LengthSampler(lengths, batch, self.args.seed, epoch=lambda: int(self.state.epoch or 0))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one batch; stops a run whose loss is no longer finite.

        Raises:
            DivergedError: see `train`.
            ConfigError: see `check_gradients`.
        """
        if self.teacher is None or not model.training:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            loss, outputs = self._distilled(self.teacher, model, inputs, num_items_in_batch)
        penalty = threshold_penalty(self.accelerator.unwrap_model(model)) if model.training else None
        loss = loss if penalty is None else loss + penalty
        if model.training and not bool(torch.isfinite(loss)):
            raise DivergedError(diverged_message(self.state.global_step))
        return (loss, outputs) if return_outputs else loss

    def _distilled(
        self, teacher: PreTrainedModel, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        with captured_outputs(self.accelerator.unwrap_model(model)) as seen:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        check_gradients(seen, self.distillation)
        with torch.no_grad(), captured_outputs(teacher) as wanted:
            answers = teacher(**inputs)
        spec, tokens = self.distillation, inputs["attention_mask"]
        loss = loss + spec.attention * attention_loss(seen, wanted, tokens)
        return loss + spec.logits * logits_loss(outputs, answers, spec.temperature, tokens), outputs


def diverged_message(step: int) -> str:
    """What to do when training left the finite numbers."""
    return (
        f"the loss or a weight is no longer finite at step {step}; the last good checkpoint is kept. Lower the "
        "learning rate (dense.learning_rate or compress.learning_rate) in a new run folder"
    )


def train(
    model: PreTrainedModel,
    data: TaskData,
    spec: TrainSpec,
    folder: Path,
    seed: int,
    distillation: DistillationSpec,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Train in place, resuming from the last whole checkpoint in `folder`.

    Args:
        folder: checkpoints go there.
        seed: of data order and dropout.
        distillation, teacher: see `CompressionTrainer`.
        report_to: trackers by the Trainer's names; TensorBoard's files go to `tensorboard` beside the folder's parent.

    Returns:
        Log history: loss, learning rate, what callbacks add (sparsity asked and achieved), the metric now and then.

    Raises:
        DivergedError: NaN or infinity; the last good checkpoint is kept.
    """
    arguments = training_arguments(spec, len(data.train), folder, seed)
    if arguments.n_gpu > 1:  # DataParallel works on copies of the model, so what they see of its pairs would be lost
        arguments._n_gpu = 1
    trainer = CompressionTrainer(
        model=model, args=arguments, train_dataset=data.train,
        data_collator=data.collate, callbacks=[CheckpointCallback()],
        teacher=teacher, distillation=distillation,
    )  # fmt: skip
    view = _show_to(trainer, [MetricCallback(data), *callbacks], report_to, folder)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    finally:
        view.close()
    return list(trainer.state.log_history)


def _show_to(
    trainer: Trainer, sources: Sequence[TrainerCallback], report_to: Sequence[str], folder: Path
) -> LiveView | PlainView:
    """Let the sources add to each log before trackers and the view, which it returns, are shown it."""
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    view = LiveView() if sys.stdout.isatty() else PlainView()
    for callback in [*sources, *trackers(report_to, folder.parent.parent / "tensorboard" / folder.name), view]:
        trainer.add_callback(callback)
    return view


def training_arguments(spec: TrainSpec, rows: int, folder: Path, seed: int) -> TrainingArguments:
    """The Trainer's own arguments for one stage."""
    batches = math.ceil(rows / (spec.batch_size * this_process().num_processes))
    steps = math.ceil(batches * spec.epochs)
    log_every = max(1, steps // 50)
    # A loss is logged as the mean since the last log, so a run resumed between two logs would report another one.
    save_every = math.ceil(steps / spec.checkpoints / log_every) * log_every
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=spec.epochs, learning_rate=spec.learning_rate,
        per_device_train_batch_size=spec.batch_size, weight_decay=spec.weight_decay,
        warmup_steps=math.ceil(steps * spec.warmup), lr_scheduler_type="linear", seed=seed, data_seed=seed,
        save_strategy="steps", save_steps=save_every, save_total_limit=2,
        logging_steps=log_every, report_to="none", ddp_broadcast_buffers=False,
        disable_tqdm=not sys.stderr.isatty(), log_level="error", log_level_replica="error",
        use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole; those cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in [path for path in found if not (path / COMPLETE).is_file()]:
        shutil.rmtree(path, ignore_errors=True)  # another rank may be removing it too
        found.remove(path)
    return str(found[-1]) if found else None


def history_lines(history: list[dict[str, Any]]) -> str:
    """The log history as JSON lines; keys are sorted, as in the checkpoints that a resumed run goes on from."""
    return "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history)


def read_history(log: Path) -> list[dict[str, Any]]:
    """The log history that `history_lines` wrote; nothing where there is no such file."""
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
