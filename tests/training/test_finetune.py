"""Training: sparsity asked step by step in any loop, checkpoints that are whole and finite, and the losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from attnpress.config import DENSE, ConfigError, DistillationSpec, ScheduleSpec, TrainSpec
from attnpress.core.schedule import sparsity_at
from attnpress.models.binding import attentions, bind
from attnpress.models.loading import load_model
from attnpress.tasks import TaskData
from attnpress.training.callbacks import DivergedError, SparsityCallback
from attnpress.training.trainer import (
    CompressionTrainer,
    history_lines,
    last_checkpoint,
    read_history,
    train,
    training_arguments,
)
from tests.training.drives import SCHEDULE, TARGET, arguments_of_a_trainer, bound, in_force, make_batches

SPEC = TrainSpec(epochs=2, learning_rate=1e-3, batch_size=16, checkpoints=4)


class Scores(TrainerCallback):
    """Makes the checkpoint of one step the best, and keeps what the model answers there."""

    def __init__(self, best: int, batch: dict[str, Tensor]) -> None:
        self.best, self.batch, self.answers = best, batch, dict[int, Tensor]()

    def on_evaluate(self, args: Any, state: Any, control: Any, **shown: Any) -> None:
        shown["metrics"]["eval_chosen"] = float(state.global_step == self.best)
        self.answers[state.global_step] = answer(shown["model"], self.batch)


def answer(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch).logits
    return found


def trained_to_the_best(model: PreTrainedModel, data: TaskData, folder: Path, best: int, kind: Any) -> Scores:
    scores = Scores(best, make_batches(data, 1)[0])
    arguments = arguments_of_a_trainer(
        folder, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="chosen", greater_is_better=True,
    )  # fmt: skip
    callbacks = [SparsityCallback(model, ScheduleSpec(kind, end=1.0), TARGET), scores]
    Trainer(model, arguments, data.collate, data.train, data.eval.select(range(16)), callbacks=callbacks).train()
    return scores


def test_what_comes_back_is_the_best_model_as_it_was_evaluated(
    dense: PreTrainedModel, data: TaskData, tmp_path: Path
) -> None:
    model = bound(dense, data)
    scores = trained_to_the_best(model, data, tmp_path, 2, "constant")
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, module in attentions(model).items():
        assert torch.equal(module.cutoff, saved[f"{name}.attnpress.cutoff"])
    assert torch.equal(answer(model, scores.batch), scores.answers[2])
    assert not torch.equal(scores.answers[2], scores.answers[4])


def test_a_best_model_from_before_the_target_comes_back_with_a_warning(
    dense: PreTrainedModel, data: TaskData, tmp_path: Path
) -> None:
    model = bound(dense, data)
    with pytest.warns(
        UserWarning, match=r"checkpoint-2, is from before the target was reached: its sparsity is 0\.\d+"
    ):
        scores = trained_to_the_best(model, data, tmp_path, 2, "linear")
    assert in_force(model) == {sparsity_at(1, 4, ScheduleSpec("linear", end=1.0), TARGET)}
    assert torch.equal(answer(model, scores.batch), scores.answers[2])


def test_the_last_step_is_evaluated_at_the_target(dense: PreTrainedModel, data: TaskData, tmp_path: Path) -> None:
    model = bound(dense, data)
    scores = trained_to_the_best(model, data, tmp_path, 4, "linear")
    assert in_force(model) == {TARGET}
    assert torch.equal(answer(model, scores.batch), scores.answers[4])


def test_weights_of_few_bits_are_not_trained_without_a_word(
    dense: PreTrainedModel, data: TaskData, tmp_path: Path
) -> None:
    model = bound(dense, data)
    torch.nn.Module.to(model, torch.bfloat16)
    callback = SparsityCallback(model, SCHEDULE, TARGET)
    trainer = Trainer(model, arguments_of_a_trainer(tmp_path), data.collate, data.train, callbacks=[callback])
    with pytest.warns(
        UserWarning, match=r"the weights to train are torch\.bfloat16, in which small updates are rounded"
    ):
        trainer.train()


class Poison(TrainerCallback):
    """Puts a NaN into a weight after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.classifier.weight.fill_(torch.nan)


@pytest.mark.parametrize("step", [10, 16], ids=["between checkpoints", "right at a checkpoint"])
def test_a_diverged_run_keeps_its_last_good_checkpoint(
    step: int, dense: PreTrainedModel, data: TaskData, tmp_path: Path
) -> None:
    message = rf"no longer finite at step {step}; the last good checkpoint is kept. Lower the learning rate \(dense\."
    with pytest.raises(DivergedError, match=message):
        train(dense, data, SPEC, tmp_path, 0, DistillationSpec(), callbacks=[Poison(step)])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    good = last_checkpoint(tmp_path)
    assert good == str(tmp_path / "checkpoint-8")
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(Path(good) / "model.safetensors").values())


def test_a_learning_rate_without_measure_is_stopped(dense: PreTrainedModel, data: TaskData, tmp_path: Path) -> None:
    wild = dataclasses.replace(SPEC, learning_rate=1e30)
    with pytest.raises(DivergedError, match="no longer finite"):
        train(dense, data, wild, tmp_path, 0, DistillationSpec())


def test_a_checkpoint_that_was_cut_short_is_removed(tmp_path: Path) -> None:
    for step in (8, 16, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-8" / "complete").touch()
    (tmp_path / "checkpoint-16" / "complete").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-8"]
    assert last_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("rows", [10, 240, 3668, 67349])
@pytest.mark.parametrize("epochs", [0.3, 2, 3])
def test_checkpoints_fall_on_logged_steps(rows: int, epochs: float, tmp_path: Path) -> None:
    """Else a resumed run would report the mean loss of fewer steps than an uninterrupted one."""
    arguments = training_arguments(TrainSpec(epochs=epochs, batch_size=16, checkpoints=4), rows, tmp_path, 0)
    steps = -(-rows // 16) * epochs
    assert arguments.save_steps % arguments.logging_steps == 0
    assert arguments.save_steps * 5 >= steps, "about as many as asked"
    assert 0 < arguments.warmup_steps <= steps / 10 + 1


def test_logs_read_back_as_they_were_written(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-300}]
    (tmp_path / "log.jsonl").write_text(history_lines(history), encoding="utf-8")
    assert read_history(tmp_path / "log.jsonl") == history
    assert read_history(tmp_path / "absent.jsonl") == []
    assert [json.loads(line) for line in history_lines(history).splitlines()] == history


def test_a_teacher_changes_the_training_but_not_itself(finished: Path, data: TaskData, tmp_path: Path) -> None:
    def weights(distillation: DistillationSpec) -> tuple[list[Tensor], list[Tensor]]:
        student, teacher = (load_model(str(finished / "dense"), "classification", ("no", "yes")) for _ in range(2))
        model = bound(student, data)
        short, folder = dataclasses.replace(SPEC, epochs=0.2), tmp_path / str(distillation.attention)
        train(model, data, short, folder, 0, distillation, bind(teacher, DENSE))
        return list(model.parameters()), list(teacher.parameters())

    (alone, teacher), (taught, untouched) = (weights(DistillationSpec(x, x)) for x in (0.0, 1.0))
    assert any(not torch.equal(a, b) for a, b in zip(alone, taught, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(teacher, untouched, strict=True))


def distilled_gradients(
    model: PreTrainedModel, teacher: PreTrainedModel, data: TaskData, spec: DistillationSpec, folder: Path
) -> list[Tensor]:
    """What one batch asks of the weights."""
    arguments = training_arguments(SPEC, 16, folder, 0)
    trainer = CompressionTrainer(
        model=model.train(), args=arguments, data_collator=data.collate, teacher=teacher, distillation=spec
    )
    model.zero_grad()
    trainer.compute_loss(model, make_batches(data, 1)[0]).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_distillation_under_gradient_checkpointing(finished: Path, data: TaskData, tmp_path: Path) -> None:
    student, teacher = (load_model(str(finished / "dense"), "classification", ("no", "yes")) for _ in range(2))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model, wanted = bound(student, data), bind(teacher, DENSE)
    attentive, inattentive = DistillationSpec(attention=50.0), DistillationSpec(attention=0.0)
    expected = distilled_gradients(model, wanted, data, attentive, tmp_path)
    without = distilled_gradients(model, wanted, data, inattentive, tmp_path)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(expected, without, strict=True))

    model.activation_checkpointing_enable({"use_reentrant": False})
    found = distilled_gradients(model, wanted, data, attentive, tmp_path)
    torch.testing.assert_close(found, expected)

    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    torch.testing.assert_close(distilled_gradients(model, wanted, data, inattentive, tmp_path), without)
    with pytest.raises(ConfigError, match=r"distillation\.attention: .* use_reentrant=False"):
        distilled_gradients(model, wanted, data, attentive, tmp_path)
