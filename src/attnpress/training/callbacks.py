"""Trainer callbacks: sparsity by the schedule, and complete checkpoints."""

from __future__ import annotations

import shutil
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from attnpress.config import ScheduleSpec
from attnpress.distributed import this_process
from attnpress.models.binding import attentions
from attnpress.training.driver import SparsityDriver, Target
from attnpress.training.progress import add_to_log

COMPLETE = "complete"
"""Marker file written last into a checkpoint; a checkpoint without it is incomplete and never resumed from."""


class DivergedError(RuntimeError):
    """The loss or a weight became NaN or infinite. The last good checkpoint is kept."""


class SparsityCallback(TrainerCallback):
    """Progressive pruning as a Trainer callback.

    It prunes the model that the Trainer trains, also if `model_init` creates a new one. The target is reached before
    the last step is evaluated and saved. With `load_best_model_at_end`, the model afterwards equals the best
    checkpoint, including thresholds and sparsity.

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
        """Check that the model is bound, and warn if its dtype would round updates away."""
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
        """Set the sparsity of this step."""
        self._follow(model)
        self.driver.total = state.max_steps
        self.asked = self.driver.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Collect the pairs of the step. After the last step, freeze the target before evaluation and saving."""
        self.driver.end()
        if state.global_step >= state.max_steps:
            self.driver.freeze()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Freeze the target, unless the best checkpoint was loaded, which is left as it was saved."""
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
        """Add the requested and achieved sparsity of the last step to the log."""
        add_to_log(state, logs, {"sparsity_asked": self.asked, "sparsity_achieved": self.driver.achieved})

    def _follow(self, model: nn.Module | None) -> None:
        """Switch to the trained model, if it is a different one."""
        if model is not None and set(attentions(model).values()) != set(attentions(self.driver.model).values()):
            self.driver.model = model


def low_precision(model: nn.Module) -> torch.dtype | None:
    """The dtype of weights trained in fewer than 32 bits; None if there are none."""
    trained = (parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    return next((dtype for dtype in trained if torch.finfo(dtype).bits < 32), None)


class CheckpointCallback(TrainerCallback):
    """Marks complete checkpoints, and refuses to keep one with non-finite weights."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called when all files of a checkpoint are written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        finite = model is None or all(bool(torch.isfinite(p).all()) for p in model.parameters())
        this_process().wait_for_everyone()  # each rank writes its own random state
        if not state.is_world_process_zero or not folder.is_dir():
            return
        if not finite:
            shutil.rmtree(folder)
            raise DivergedError(diverged_message(state.global_step))
        (folder / COMPLETE).touch()


def diverged_message(step: int) -> str:
    """Advice for a diverged training."""
    return (
        f"the loss or a weight is no longer finite at step {step}; the last good checkpoint is kept. Lower the "
        "learning rate (dense.learning_rate or compress.learning_rate) in a new run folder"
    )
