"""What a training tells while it runs: figures added to its log, and the views of that log."""

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
"""How many evaluation rows the metric is watched on while training, and how often in a stage."""

Logs = dict[str, Any]


def add_to_log(state: TrainerState, logs: Logs | None, figures: dict[str, float]) -> None:
    """Put figures beside a logged loss: into the history, and in sight of the callbacks that come later."""
    if logs is not None and "loss" in logs:
        logs.update(figures)
        state.log_history[-1].update(figures)


class MetricCallback(TrainerCallback):
    """Logs the task's headline metric, `eval_NAME`, on a few evaluation rows, a few times in a stage.

    A view of how training goes, not a result: the stage itself is evaluated on all rows when it is done.

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
        """Evaluate, where the step is due."""
        if logs is None or "loss" not in logs or not self.due(state):
            return
        with torch.random.fork_rng(devices=()):  # a data loader draws a number: training must not miss it
            try:
                headline, value = next(iter(predict(model, self.data).items()))
            except DivergedPredictionsError:
                return  # training finds out at its next loss, and says so
        if math.isfinite(value):  # a correlation with a constant is not
            add_to_log(state, logs, {f"eval_{headline}": value})

    def due(self, state: TrainerState) -> bool:
        """Whether the metric is to be logged at this step, by the step alone: a resumed run does as one in one go."""
        every = math.ceil(state.max_steps / WATCHED_TIMES / state.logging_steps) * state.logging_steps
        return state.global_step % every == 0


class LiveView(TrainerCallback):
    """One line in a terminal, redrawn in place: step, newest figures, time left."""

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
        """Begin where a resumed run begins."""
        if state.is_world_process_zero:
            self.progress.add_task("train", total=state.max_steps, completed=state.global_step, figures="")
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move on."""
        if self.progress.tasks:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        """Show the newest figures; those that are logged less often stay."""
        self.figures |= newest_figures(logs)
        if self.progress.tasks:
            self.progress.update(self.progress.task_ids[0], figures=" ".join(self.figures.values()))

    def close(self) -> None:
        """Leave the last line standing; also when training failed."""
        self.progress.stop()


class PlainView(TrainerCallback):
    """A line now and then, for output that is no terminal."""

    LINES = 6
    """How many lines a stage prints."""

    def __init__(self) -> None:
        self.begin = (0, 0.0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note where and when a perhaps resumed run begins."""
        self.begin = (state.global_step, time.monotonic())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        """Print the newest figures, but not all of them."""
        due = state.global_step % max(1, state.max_steps // self.LINES) < state.logging_steps
        if state.is_world_process_zero and due and (shown := newest_figures(logs)):
            shown["left"] = self._left(state)
            print(f"   step {state.global_step} of {state.max_steps}: {', '.join(shown.values())}", flush=True)

    def _left(self, state: TrainerState) -> str:
        step, moment = self.begin
        seconds = (time.monotonic() - moment) / max(1, state.global_step - step) * (state.max_steps - state.global_step)
        return f"{timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        """Nothing is left open."""


def newest_figures(logs: Logs | None) -> dict[str, str]:
    """Loss, sparsity achieved of asked, and metric of a log entry, in words; empty for entries without a loss."""
    if not logs or "loss" not in logs:
        return {}
    shown = {"loss": f"loss {logs['loss']:.3f}"}
    if "sparsity_asked" in logs:
        shown["sparsity"] = f"sparsity {logs['sparsity_achieved']:.3f} of {logs['sparsity_asked']:.3f}"
    return shown | {
        name: f"{name.removeprefix('eval_')} {value:.1f}" for name, value in logs.items() if name.startswith("eval_")
    }


def trackers(names: Sequence[str], tensorboard: Path) -> list[TrainerCallback]:
    """The Trainer's own callbacks for trackers such as "wandb"; TensorBoard's files go to the folder."""
    callbacks = [tracker() for tracker in get_reporting_integration_callbacks(list(names))]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):  # by itself it writes among the checkpoints, which are removed
            callback.logging_dir = str(tensorboard)
    return callbacks


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that the Trainer cannot report to.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to: no tracker called {name!r}; known: {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or leave it out")
