"""The sparsity driver: a loop or a trainer is driven to the target, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from attnpress.config import DENSE, AttentionSpec, ConfigError, ScheduleSpec
from attnpress.core.schedule import sparsity_at
from attnpress.models.binding import attentions, bind, threshold_penalty, unbind
from attnpress.models.loading import load_model
from attnpress.models.watchers import Fitting, start
from attnpress.runs.evaluation import evaluate
from attnpress.tasks import TaskData
from attnpress.training.calibration import calibrate
from attnpress.training.callbacks import SparsityCallback
from attnpress.training.driver import SparsityDriver
from tests.training.drives import SCHEDULE, TARGET, arguments_of_a_trainer, bound, in_force, make_batches


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
