"""Progress of a training: figures added to its log, and live views of the log."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from attnpress.config import ConfigError
from attnpress.tasks import DivergedPredictionsError, TaskData
from attnpress.tasks.predictions import predict

WATCHED_ROWS, WATCHED_TIMES = 200, 6
"""Number of evaluation rows for the watched metric, and of evaluations per stage."""

Logs = dict[str, Any]


def add_to_log(state: TrainerState, logs: Logs | None, figures: dict[str, float]) -> None:
    """Add figures to a logged loss, in the history and for later callbacks."""
    if logs is not None and "loss" in logs:
        logs.update(figures)
        state.log_history[-1].update(figures)


class MetricCallback(TrainerCallback):
    """Logs the task's headline metric, `eval_NAME`, on a few evaluation rows, a few times per stage.

    This shows progress only. The stage is evaluated on all rows when it has finished.

    Args:
        data: of the run.
    """

    def __init__(self, data: TaskData) -> None:
        self.data = data.watched(WATCHED_ROWS)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Evaluate at the due steps."""
        if logs is None or "loss" not in logs or not self.due(state):
            return
        with torch.random.fork_rng(devices=()):  # a data loader draws a random number, which must not change training
            try:
                headline, value = next(iter(predict(model, self.data).items()))
            except DivergedPredictionsError:
                return  # training detects this at its next loss
        if math.isfinite(value):  # a correlation with a constant is undefined
            add_to_log(state, logs, {f"eval_{headline}": value})

    def due(self, state: TrainerState) -> bool:
        """True if the metric is logged at this step, which depends on the step only, as resumed runs require."""
        every = math.ceil(state.max_steps / WATCHED_TIMES / state.logging_steps) * state.logging_steps
        return state.global_step % every == 0


class LiveView(TrainerCallback):
    """One terminal line, redrawn in place: step, newest figures, time left."""

    COLUMNS: ClassVar[tuple[Any, ...]] = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )

    def __init__(self, console: Console | None = None) -> None:
        self.progress = Progress(*self.COLUMNS, console=console or Console())
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start at the first step, or that of a resumed run."""
        if state.is_world_process_zero:
            self.progress.add_task("train", total=state.max_steps, completed=state.global_step, figures="")
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance."""
        if self.progress.tasks:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        """Show the newest figures; less frequent ones stay."""
        self.figures |= newest_figures(logs)
        if self.progress.tasks:
            self.progress.update(self.progress.task_ids[0], figures=" ".join(self.figures.values()))

    def close(self) -> None:
        """Leave the last line on the screen, also after an error."""
        self.progress.stop()


class PlainView(TrainerCallback):
    """A line at intervals, for output that is not a terminal."""

    LINES = 6
    """How many lines a stage prints."""

    def __init__(self) -> None:
        self.begin = (0, 0.0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the start step and time."""
        self.begin = (state.global_step, time.monotonic())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        """Print the newest figures at intervals."""
        due = state.global_step % max(1, state.max_steps // self.LINES) < state.logging_steps
        if state.is_world_process_zero and due and (shown := newest_figures(logs)):
            shown["left"] = self._left(state)
            print(f"   step {state.global_step} of {state.max_steps}: {', '.join(shown.values())}", flush=True)

    def _left(self, state: TrainerState) -> str:
        step, moment = self.begin
        seconds = (time.monotonic() - moment) / max(1, state.global_step - step) * (state.max_steps - state.global_step)
        return f"{timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        """Nothing to close."""


def newest_figures(logs: Logs | None) -> dict[str, str]:
    """Loss, achieved and requested sparsity, and metric of a log entry, in words; empty for entries without a loss."""
    if not logs or "loss" not in logs:
        return {}
    shown = {"loss": f"loss {logs['loss']:.3f}"}
    if "sparsity_asked" in logs:
        shown["sparsity"] = f"sparsity {logs['sparsity_achieved']:.3f} of {logs['sparsity_asked']:.3f}"
    return shown | {
        name: f"{name.removeprefix('eval_')} {value:.1f}" for name, value in logs.items() if name.startswith("eval_")
    }


def trackers(names: Sequence[str], tensorboard: Path) -> list[TrainerCallback]:
    """The Trainer's own callbacks for trackers such as "wandb"; TensorBoard writes to the folder."""
    callbacks = [tracker() for tracker in get_reporting_integration_callbacks(list(names))]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):  # by default it writes to the checkpoint folder, which is removed
            callback.logging_dir = str(tensorboard)
    return callbacks


def check_trackers(names: Sequence[str]) -> None:
    """Check that the Trainer supports the trackers.

    Raises:
        ConfigError: a name is unknown, or a package is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to: no tracker called {name!r}; known: {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or leave it out")
