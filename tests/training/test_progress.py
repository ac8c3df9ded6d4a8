"""What training tells while it runs: the same figures in the log, in a terminal, in plain lines and in trackers."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from attnpress.config import ConfigError, RunConfig
from attnpress.models.loading import load_tokenizer
from attnpress.runs.compression import compress
from attnpress.tasks import TaskData, load_task
from attnpress.training import progress as live
from attnpress.training.progress import LiveView, PlainView, check_trackers, newest_figures
from attnpress.training.trainer import read_history

LOGS = {"loss": 0.5, "sparsity_asked": 0.9, "sparsity_achieved": 0.8765, "eval_accuracy": 81.25, "learning_rate": 1e-3}
ARGUMENTS: Any = SimpleNamespace()


def run_view(view: LiveView | PlainView, steps: int = 12) -> None:
    state = TrainerState(max_steps=steps, logging_steps=1, is_world_process_zero=True)
    view.on_train_begin(ARGUMENTS, state, TrainerControl())
    for step in range(1, steps + 1):
        state.global_step = step
        if isinstance(view, LiveView):
            view.on_step_end(ARGUMENTS, state, TrainerControl())
        view.on_log(ARGUMENTS, state, TrainerControl(), logs=LOGS if step % 2 else {"loss": 0.25})
    view.close()


def test_a_terminal_shows_one_line_with_everything() -> None:
    screen = io.StringIO()
    run_view(LiveView(Console(file=screen, force_terminal=True, width=100)))
    last = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    for part in ("12/12", "loss 0.250", "sparsity 0.876 of 0.900", "accuracy 81.2", "00:00 left"):
        assert part in last, last


def test_a_pipe_gets_a_few_plain_lines_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    run_view(PlainView(), steps=120)
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= PlainView.LINES + 1
    assert all(re.fullmatch(r"   step \d+ of 120: loss .*, \d:\d\d:\d\d left", line) for line in lines)


def test_entries_without_a_loss_are_not_shown() -> None:
    assert newest_figures({"train_runtime": 3.0}) == newest_figures(None) == {}
    assert newest_figures(LOGS)["sparsity"] == "sparsity 0.876 of 0.900"


def test_the_log_holds_sparsity_and_now_and_then_the_metric(finished: Path) -> None:
    history = read_history(finished / "logs" / "progressive.jsonl")
    assert all(abs(entry["sparsity_achieved"] - entry["sparsity_asked"]) < 0.25 for entry in history)
    assert history[-1]["sparsity_achieved"] == pytest.approx(0.8, abs=0.1)
    watched = [entry["step"] for entry in history if "eval_accuracy" in entry]
    assert watched == [5, 10, 15, 20, 25, 30]
    dense = read_history(finished / "logs" / "dense.jsonl")
    assert [entry["step"] for entry in dense if "eval_accuracy" in entry] == watched
    assert not any("sparsity_asked" in entry for entry in dense)


@pytest.mark.parametrize("rows", [1, 7, 50, 80, 1000])
def test_the_watched_rows_are_evenly_spread(rows: int, tiny_recipe: RunConfig) -> None:
    data: TaskData = load_task(tiny_recipe.data, load_tokenizer(tiny_recipe.model), 0)
    some = data.watched(rows)
    assert rows / 2 <= max(len(some.eval), rows / 2) <= max(rows, 1)
    stride = -(-len(data.eval) // rows)
    assert some.eval["input_ids"][:] == data.eval["input_ids"][::stride]


class Spy(TrainerCallback):
    """Stands for a tracker."""

    seen: list[dict[str, Any]]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_a_tracker_is_shown_the_numbers_of_the_log(
    from_dense: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spy.seen = []
    monkeypatch.setattr(live, "get_reporting_integration_callbacks", lambda names: [Spy])
    compress(from_dense, tmp_path, notify=lambda _: None)
    history = read_history(tmp_path / "logs" / "progressive.jsonl")
    shown = [entry for entry in Spy.seen if "loss" in entry]
    assert [{**entry, "step": row["step"]} for entry, row in zip(shown, history, strict=True)] == history
    assert any("eval_accuracy" in entry for entry in shown)


def test_tensorboard_files_outlive_the_checkpoints(
    from_dense: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    (tracker,) = live.trackers(["tensorboard"], tmp_path / "events")
    assert getattr(tracker, "logging_dir", None) == str(tmp_path / "events")


def test_a_tracker_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(())
    with pytest.raises(ConfigError, match=r"report_to: no tracker called 'tensorbord'; known: .*tensorboard"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(live, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(ConfigError, match="report_to: wandb is not installed; pip install wandb"):
        check_trackers(["wandb"])
