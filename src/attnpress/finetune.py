"""Training: one Transformers Trainer for dense and compressing stages; a callback asks for sparsity, a teacher helps.

`SparsityCallback` works with any Trainer; `SparsityDriver`, which it drives, with any loop of your own.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
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
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from attnpress.calibration import reduce_over_ranks, this_process
from attnpress.config import ConfigError, Count, DistillationSpec, ScheduleSpec, Seed, Sparsity, TrainSpec
from attnpress.core.distillation import attention_loss, check_gradients, logits_loss
from attnpress.core.schedule import sparsity_at
from attnpress.live import LiveView, MetricCallback, PlainView, add_to_log, trackers
from attnpress.models.attention import HISTOGRAM_DECAY, ROW_STRIDE, CompressedAttention
from attnpress.models.binding import attentions, captured_outputs, threshold_penalty
from attnpress.recipe import checked
from attnpress.tasks import TaskData
from attnpress.tasks.sampler import LengthSampler

Target = float | Mapping[str, float]
Autocast = Literal["none", "bfloat16", "float16"]

COMPLETE = "complete"
"""Marker file written last into a checkpoint: one without it was cut short and is never resumed from."""


class DivergedError(RuntimeError):
    """The loss or a weight became NaN or infinite; the last good checkpoint is kept."""


class SparsityDriver:
    """Raises the sparsity of a bound model step by step; for any training loop.

    Call `begin(step)` before a step's forward passes and `end()` after its update. Nothing of the model is kept here:
    its attention modules are looked up at each call, so that it may be bound anew; thresholds and their histogram are
    buffers of theirs, so that a checkpoint holds all that a resumed run needs.

    Args:
        model: bound and calibrated.
        schedule: how sparsity grows.
        target: sparsity to end at, from 0 to below 1; or one for each attention module, by name.
        total: number of steps of the training.

    Raises:
        ConfigError: the model is not bound, `target` does not name its attention modules, or a number is out of range.
    """

    def __init__(self, model: nn.Module, schedule: ScheduleSpec, target: Target, total: int) -> None:
        self.model, self.schedule, self.achieved = model, schedule, 0.0
        self.target, self.total = _checked_target(target), checked(Count, total, "total")
        self.targets()

    @property
    def modules(self) -> list[CompressedAttention]:
        """The attention modules that the model has now, in the order of the layers."""
        return [module for module, _ in self.targets()]

    def targets(self) -> list[tuple[CompressedAttention, float]]:
        """The attention modules that the model has now, each with the sparsity to end at.

        Raises:
            ConfigError: there are none, or `target` names others.
        """
        found = attentions(self.model)
        if not found:
            raise ConfigError(
                f"{type(self.model).__name__} is not bound, so nothing of it can be pruned: call bind(model, spec) and "
                "calibrate(model, batches) first; a model_init has to return such a model"
            )
        named = self.target if isinstance(self.target, Mapping) else dict.fromkeys(found, self.target)
        if different := sorted(set(found) ^ set(named)):
            raise ConfigError(
                f"target: {different[0]} is in one of the target and the model only; give a sparsity for each of "
                f"{', '.join(found)}, or one number for all"
            )
        return [(module, named[name]) for name, module in found.items()]

    def begin(self, step: int) -> float:
        """Refit thresholds to the sparsity asked at `step` (from 0), watch its pairs; returns the mean asked."""
        asked = []
        for module, target in self.targets():
            asked.append(sparsity_at(step, self.total, self.schedule, target))
            if self.schedule.kind != "fixed":
                module.set_sparsity(asked[-1])
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
        for module, target in self.targets():
            if self.schedule.kind != "fixed":
                module.set_sparsity(target)


def _checked_target(target: Target) -> Target:
    if isinstance(target, Mapping):
        return {name: checked(Sparsity, own, f"target of {name}") for name, own in target.items()}
    number: float = checked(Sparsity, target, "target")
    return number


class SparsityCallback(TrainerCallback):
    """Progressive pruning as a Trainer callback.

    The model that is pruned is the one that the Trainer trains, also if its `model_init` makes a new one. Training ends
    at the target before the last step is evaluated and saved; with `load_best_model_at_end`, the model is afterwards
    what the best checkpoint holds, thresholds and sparsity in force included.

    Args:
        model: bound and calibrated.
        schedule, target: see `SparsityDriver`.
    """

    def __init__(self, model: nn.Module, schedule: ScheduleSpec, target: Target) -> None:
        self.driver = SparsityDriver(model, schedule, target, total=1)
        self.asked = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Refuse a model that is not bound; warn where updates would be rounded away."""
        self._follow(model)
        self.driver.targets()
        if (dtype := low_precision(self.driver.model)) is not None:
            warnings.warn(
                f"the weights to train are {dtype}, in which small updates are rounded away: load the model with "
                "dtype=torch.float32, and use bf16=True or fp16=True of TrainingArguments for speed",
                stacklevel=2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Ask for the sparsity of this step."""
        self._follow(model)
        self.driver.total = state.max_steps
        self.asked = self.driver.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Collect what the step has seen, and after the last one freeze, before it is evaluated or saved."""
        self.driver.end()
        if state.global_step >= state.max_steps:
            self.driver.freeze()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the model at its target, unless the best checkpoint was loaded: then it is left as it was saved."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self.driver.freeze()  # also after an early stop, or a resume from the very last checkpoint
            return
        force = [(module.spec.sparsity, target) for module, target in self.driver.targets()]
        if any(sparsity < target for sparsity, target in force):
            found, wanted = (statistics.fmean(column) for column in zip(*force, strict=True))
            warnings.warn(
                f"the best checkpoint, {state.best_model_checkpoint}, is from before the target was reached: its "
                f"sparsity is {found:.3f}, not {wanted:.3f}. Let the schedule end before the first evaluation, or "
                "leave load_best_model_at_end out",
                stacklevel=2,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Put the sparsity asked and achieved in the last step beside the loss."""
        add_to_log(state, logs, {"sparsity_asked": self.asked, "sparsity_achieved": self.driver.achieved})

    def _follow(self, model: nn.Module | None) -> None:
        """Drive the model that is trained, if it is another than the one known."""
        if model is not None and set(attentions(model).values()) != set(attentions(self.driver.model).values()):
            self.driver.model = model


def low_precision(model: nn.Module) -> torch.dtype | None:
    """The dtype of weights that are trained in fewer than 32 bits; None if there are none."""
    trained = (parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    return next((dtype for dtype in trained if torch.finfo(dtype).bits < 32), None)


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
    autocast: Autocast = "none",
) -> list[dict[str, Any]]:
    """Train in place, in float32, resuming from the last whole checkpoint in `folder`.

    Args:
        model: weights in fewer bits become float32, in which small updates are not rounded away.
        folder: checkpoints go there.
        seed: of data order and dropout, from 0.
        distillation, teacher: see `CompressionTrainer`.
        report_to: trackers by the Trainer's names; TensorBoard's files go to `tensorboard` beside the folder's parent.
        autocast: see `RunConfig`.

    Returns:
        Log history: loss, learning rate, what callbacks add (sparsity asked and achieved), the metric now and then.

    Raises:
        DivergedError: NaN or infinity; the last good checkpoint is kept.
        ConfigError: `seed` is out of range, or autocast cannot be had here.
    """
    check_autocast(autocast)
    if low_precision(model) is not None:
        model.float()
    arguments = training_arguments(spec, len(data.train), folder, seed, autocast)
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
        # Else the model would go on computing in few bits, also where it is evaluated.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
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


def check_autocast(autocast: Autocast) -> None:
    """Refuse what this machine does not have.

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
    # A loss is logged as the mean since the last log, so a run resumed between two logs would report another one.
    save_every = math.ceil(steps / spec.checkpoints / log_every) * log_every
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=spec.epochs, learning_rate=spec.learning_rate,
        per_device_train_batch_size=spec.batch_size, weight_decay=spec.weight_decay,
        warmup_steps=math.ceil(steps * spec.warmup), lr_scheduler_type="linear", seed=seed, data_seed=seed,
        save_strategy="steps", save_steps=save_every, save_total_limit=2,
        logging_steps=log_every, report_to="none", ddp_broadcast_buffers=False,
        disable_tqdm=not sys.stderr.isatty(), log_level="error", log_level_replica="error",
        bf16=autocast == "bfloat16", fp16=autocast == "float16",
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
