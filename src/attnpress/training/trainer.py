"""The Trainer of dense and compressing stages: the task's loss plus distillation; resumable."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from attnpress.config import ConfigError, DistillationSpec, Seed, TrainSpec
from attnpress.config.recipe import checked
from attnpress.core.distillation import attention_loss, check_gradients, logits_loss
from attnpress.distributed import this_process
from attnpress.models.binding import captured_outputs, threshold_penalty
from attnpress.tasks import TaskData
from attnpress.tasks.sampler import LengthSampler
from attnpress.training.callbacks import COMPLETE, CheckpointCallback, DivergedError, diverged_message, low_precision
from attnpress.training.progress import LiveView, MetricCallback, PlainView, trackers

Autocast = Literal["none", "bfloat16", "float16"]


class CompressionTrainer(Trainer):
    """A Trainer with the task's loss, plus distillation if there is a teacher.

    Args:
        teacher: dense model, bound with `DENSE` so that its attention outputs can be captured; None for plain training.
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
        """Loss of one batch; stops the run if the loss is not finite.

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
    autocast: Autocast = "none",
) -> list[dict[str, Any]]:
    """Train in place, in float32, resuming from the last complete checkpoint in `folder`.

    Args:
        model: weights in other dtypes are converted to float32, where small updates are not rounded away.
        folder: for checkpoints.
        seed: of data order and dropout, from 0.
        distillation, teacher: see `CompressionTrainer`.
        report_to: trackers by the Trainer's names; TensorBoard writes to `tensorboard` beside the folder's parent.
        autocast: see `RunConfig`.

    Returns:
        Log history: loss, learning rate, values of callbacks (requested and achieved sparsity), the metric at
            intervals.

    Raises:
        DivergedError: NaN or infinity; the last good checkpoint is kept.
        ConfigError: `seed` is out of range, or autocast is not available here.
    """
    check_autocast(autocast)
    if low_precision(model) is not None:
        model.float()
    arguments = training_arguments(spec, len(data.train), folder, seed, autocast)
    if arguments.n_gpu > 1:  # DataParallel uses copies of the model, so their pair statistics would be lost
        arguments._n_gpu = 1
    trainer = CompressionTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        data_collator=data.collate,
        callbacks=[CheckpointCallback()],
        teacher=teacher,
        distillation=distillation,
    )
    view = _show_to(trainer, [MetricCallback(data), *callbacks], report_to, folder)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    finally:
        view.close()
        # Otherwise the model would keep computing in low precision, also in evaluation.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    return list(trainer.state.log_history)


def _show_to(
    trainer: Trainer, sources: Sequence[TrainerCallback], report_to: Sequence[str], folder: Path
) -> LiveView | PlainView:
    """Let the sources add to each log before trackers and the view see it; returns the view."""
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    view = LiveView() if sys.stdout.isatty() else PlainView()
    for callback in [*sources, *trackers(report_to, folder.parent.parent / "tensorboard" / folder.name), view]:
        trainer.add_callback(callback)
    return view


def check_autocast(autocast: Autocast) -> None:
    """Check that this machine supports the dtype.

    Raises:
        ConfigError: float16 without an accelerator.
    """
    if autocast == "float16" and not torch.accelerator.is_available():
        raise ConfigError("autocast: float16 needs an accelerator, and there is none; take bfloat16 or none")


def training_arguments(
    spec: TrainSpec, rows: int, folder: Path, seed: int, autocast: Autocast = "none"
) -> TrainingArguments:
    """The Trainer's own arguments for one stage."""
    seed = checked(Seed, seed, "seed")
    batches = math.ceil(rows / (spec.batch_size * this_process().num_processes))
    steps = math.ceil(batches * spec.epochs)
    log_every = max(1, steps // 50)
    # The logged loss is the mean since the last log, so a run resumed between two logs would report a different one.
    save_every = math.ceil(steps / spec.checkpoints / log_every) * log_every
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        per_device_train_batch_size=spec.batch_size,
        weight_decay=spec.weight_decay,
        warmup_steps=math.ceil(steps * spec.warmup),
        lr_scheduler_type="linear",
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=log_every,
        report_to="none",
        ddp_broadcast_buffers=False,
        disable_tqdm=not sys.stderr.isatty(),
        log_level="error",
        log_level_replica="error",
        bf16=autocast == "bfloat16",
        fp16=autocast == "float16",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in [path for path in found if not (path / COMPLETE).is_file()]:
        shutil.rmtree(path, ignore_errors=True)  # another rank may be removing it at the same time
        found.remove(path)
    return str(found[-1]) if found else None


def history_lines(history: list[dict[str, Any]]) -> str:
    """The log history as JSON lines, with sorted keys as in the checkpoints."""
    return "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history)


def read_history(log: Path) -> list[dict[str, Any]]:
    """The log history that `history_lines` wrote; empty if there is no file."""
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
