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
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from attnpress.config import DENSE, AttentionSpec, ConfigError, DistillationSpec, RunConfig, ScheduleSpec, TrainSpec
from attnpress.core.schedule import sparsity_at
from attnpress.models.binding import attentions, bind, threshold_penalty, unbind
from attnpress.models.loading import load_model, load_tokenizer
from attnpress.models.watchers import Fitting, start
from attnpress.runs.evaluation import evaluate
from attnpress.tasks import TaskData, load_task
from attnpress.training.calibration import calibrate
from attnpress.training.callbacks import DivergedError, SparsityCallback
from attnpress.training.driver import SparsityDriver
from attnpress.training.trainer import (
    CompressionTrainer,
    history_lines,
    last_checkpoint,
    read_history,
    train,
    training_arguments,
)

TARGET = 0.7
SCHEDULE = ScheduleSpec("linear", end=0.5)
SPEC = TrainSpec(epochs=2, learning_rate=1e-3, batch_size=16, checkpoints=4)


@pytest.fixture(scope="module")
def data(tiny_recipe: RunConfig) -> TaskData:
    return load_task(tiny_recipe.data, load_tokenizer(tiny_recipe.model), tiny_recipe.seed)


@pytest.fixture
def dense(finished: Path) -> PreTrainedModel:
    return load_model(str(finished / "dense"), "classification", ("no", "yes"))


def make_batches(data: TaskData, count: int) -> list[dict[str, Tensor]]:
    return [data.collate([data.train[row] for row in range(16 * n, 16 * n + 16)]) for n in range(count)]


def bound(dense: PreTrainedModel, data: TaskData) -> PreTrainedModel:
    model = bind(dense, AttentionSpec())
    calibrate(model, make_batches(data, 4))
    return model


def test_a_plain_loop_is_driven_to_the_target(dense: PreTrainedModel, data: TaskData) -> None:
    model = bound(dense, data).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    driver, batches = SparsityDriver(model, SCHEDULE, TARGET, total=15), make_batches(data, 15)
    for step, batch in enumerate(batches):
        assert driver.begin(step) == sparsity_at(step, 15, SCHEDULE, TARGET)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.end()
    driver.freeze()
    stage = evaluate(model, data, "progressive", 32)
    assert stage.pruned == pytest.approx(TARGET, abs=0.05), "on rows that it has not seen"
    assert all(not module.watchers and not module.seen.any() for module in attentions(model).values())


def test_a_plain_trainer_is_driven_to_the_target(dense: PreTrainedModel, data: TaskData, tmp_path: Path) -> None:
    model = bound(dense, data)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=16, logging_steps=3, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-3,
    )  # fmt: skip
    callback = SparsityCallback(model, SCHEDULE, TARGET)
    trainer = Trainer(model, arguments, data.collate, data.train, callbacks=[callback])
    trainer.train()
    asked = [entry["sparsity_asked"] for entry in trainer.state.log_history if "loss" in entry]
    assert asked == [sparsity_at(step, 12, SCHEDULE, TARGET) for step in (2, 5, 8, 11)]
    assert evaluate(model, data, "progressive", 32).pruned == pytest.approx(TARGET, abs=0.05)


def arguments_of_a_trainer(folder: Path, **changes: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 16, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "learning_rate": 1e-3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **usual | changes)


def in_force(model: torch.nn.Module) -> set[float]:
    return {module.spec.sparsity for module in attentions(model).values()}


def test_the_model_that_is_trained_is_pruned_also_when_the_trainer_makes_a_new_one(
    finished: Path, data: TaskData, tmp_path: Path
) -> None:
    made = []

    def model_init() -> PreTrainedModel:
        made.append(bound(load_model(str(finished / "dense"), "classification", ("no", "yes")), data))
        return made[-1]

    trainer = Trainer(args=arguments_of_a_trainer(tmp_path), model_init=model_init, data_collator=data.collate,
                      train_dataset=data.train)  # fmt: skip
    trainer.add_callback(SparsityCallback(made[0], ScheduleSpec("constant"), TARGET))
    for _ in range(2):  # a search calls it again and again
        trainer.train()
        assert trainer.model is made[-1]
        assert evaluate(made[-1], data, "progressive", 32).pruned == pytest.approx(TARGET, abs=0.05)
    assert [in_force(model) for model in made] == [{0.0}, {TARGET}, {TARGET}]


def test_a_new_model_that_is_not_bound_is_refused(dense: PreTrainedModel, data: TaskData, tmp_path: Path) -> None:
    callback = SparsityCallback(bound(dense, data), SCHEDULE, TARGET)
    unbound = load_model(str(dense.name_or_path), "classification", ("no", "yes"))
    trainer = Trainer(unbound, arguments_of_a_trainer(tmp_path), data.collate, data.train, callbacks=[callback])
    with pytest.raises(ConfigError, match=r"BertForSequenceClassification is not bound.* a model_init has to return"):
        trainer.train()


def test_a_model_that_is_bound_anew_is_driven_as_it_is_now(dense: PreTrainedModel, data: TaskData) -> None:
    model = bound(dense, data)
    driver = SparsityDriver(model, ScheduleSpec("constant"), TARGET, total=4)
    bound(model, data).train()
    driver.begin(0)
    model(**make_batches(data, 1)[0])
    assert driver.end() == pytest.approx(TARGET, abs=0.1)
    assert in_force(model) == {TARGET}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target": 1.0}, r"target: Input should be less than 1 \(found 1.0\)"),
    ({"target": -0.1}, "target: Input should be greater than or equal to 0"),
    ({"target": float("nan")}, r"target: .* \(found nan\)"),
    ({"target": {"first": 0.5}}, r"target: bert\.encoder\.layer\.0\.attention\.self is in one of the target and the"),
    ({"target": {"first": 1.5}}, "target of first: Input should be less than 1"),
    ({"total": 0}, "total: Input should be greater than or equal to 1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_driver_refuses_what_it_cannot_do(change: dict[str, Any], message: str, dense: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=message):
        SparsityDriver(bind(dense, AttentionSpec()), SCHEDULE, **{"target": TARGET, "total": 4} | change)


def test_a_driver_refuses_a_model_that_is_not_bound(dense: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"is not bound, so nothing of it can be pruned: call bind\(model, spec\)"):
        SparsityDriver(dense, SCHEDULE, TARGET, 4)


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


def test_the_histogram_forgets_and_holds_whole_rows_in_turn(dense: PreTrainedModel, data: TaskData) -> None:
    """One query row in eight is seen in a step: over eight steps of one batch, each valid pair once."""
    model, batch = bound(dense, data).eval(), make_batches(data, 1)[0]
    driver = SparsityDriver(model, SCHEDULE, TARGET, total=100)
    module = driver.modules[0]
    module.histogram.zero_()
    seen = torch.zeros(2, dtype=torch.float64)
    for step in range(8):
        start(module, Fitting(slice(step, None, 8)))
        with torch.no_grad():
            model(**batch)
        seen += module.seen.sum(-1)
        driver.end()
    pairs = int((batch["attention_mask"].sum(-1) ** 2).sum())
    assert seen.tolist() == [pairs, pairs]
    assert 0 < float(module.histogram.sum()) < 2 * pairs


def test_freezing_asks_for_the_target_whatever_was_asked_last(dense: PreTrainedModel, data: TaskData) -> None:
    model = bound(dense, data)
    driver = SparsityDriver(model, ScheduleSpec("linear", end=1.0), TARGET, total=10)
    assert driver.begin(9) < TARGET
    driver.freeze()
    assert {module.spec.sparsity for module in attentions(model).values()} == {TARGET}


def test_a_step_whose_texts_are_too_short_to_be_watched_says_what_the_last_one_achieved(
    dense: PreTrainedModel, data: TaskData
) -> None:
    model = bound(dense, data)
    driver = SparsityDriver(model.train(), ScheduleSpec("constant"), TARGET, total=8)
    achieved = []
    for step in (0, 7):  # row 7 of the second step's texts would be watched, and they have four
        driver.begin(step)
        model(**{name: rows[:, :4] if rows.ndim == 2 else rows for name, rows in make_batches(data, 1)[0].items()})
        achieved.append(driver.end())
    assert 0 < achieved[0] == achieved[1]


def test_fixed_thresholds_stay_as_calibration_has_fitted_them(dense: PreTrainedModel, data: TaskData) -> None:
    model = bind(dense, AttentionSpec(rule="threshold", sparsity=TARGET))
    calibrate(model, make_batches(data, 4))
    before = [module.cutoff.clone() for module in attentions(model).values()]
    driver = SparsityDriver(model.train(), ScheduleSpec("fixed"), TARGET, total=4)
    for step, batch in enumerate(make_batches(data, 4)):
        assert driver.begin(step) == TARGET
        model(**batch)
        assert driver.end() == pytest.approx(TARGET, abs=0.1)
    driver.freeze()
    after = [module.cutoff for module in attentions(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_loss_of_keeping_too_much_is_that_of_all_modules(dense: PreTrainedModel, data: TaskData) -> None:
    model = bind(dense, AttentionSpec(sparsity=0.3, threshold_penalty=3.0))
    calibrate(model, make_batches(data, 4))
    assert threshold_penalty(model) is None, "nothing was trained yet"
    driver = SparsityDriver(model.train(), ScheduleSpec("constant", start=0.3), 0.8, total=4)
    driver.begin(0)
    model(**make_batches(data, 1)[0])
    modules = attentions(model).values()
    density = torch.stack([module.density for module in modules if module.density is not None]).mean()
    penalty = threshold_penalty(model)
    assert penalty is not None
    torch.testing.assert_close(penalty, 3.0 * (density - 0.2))
    penalty.backward()
    assert all(module.trained_cutoff.grad is not None and module.trained_cutoff.grad > 0 for module in modules)
    assert threshold_penalty(unbind(model)) is None


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


def test_a_driver_starts_from_a_model_bound_to_nothing(tiny_model: Path) -> None:
    model = bind(load_model(str(tiny_model), "classification", ("bad", "good")), DENSE)
    batch = {"input_ids": torch.randint(5, 20, (8, 12))}
    driver = SparsityDriver(model, ScheduleSpec(kind="constant"), target=0.8, total=2)
    model.train()
    for module in attentions(model).values():
        start(module, Fitting(slice(None)))
    model(**batch)
    driver.end()
    driver.begin(0)
    assert all(torch.isfinite(module.cutoff).all() for module in attentions(model).values())
