"""Evaluation: every row once and in order, the metrics of its logits, and another task for a finished run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from attnpress.config import DENSE, ConfigError, DataSpec, RunConfig
from attnpress.core.call import AttentionCall
from attnpress.core.linear import ProductPlan
from attnpress.kernels import ops
from attnpress.models.binding import attentions, bind
from attnpress.models.encoder import entries, find_encoder, set_plan
from attnpress.models.loading import load_compressed, load_model, load_tokenizer
from attnpress.records.run import read_record
from attnpress.runs.agreement import compare_backends
from attnpress.runs.evaluation import evaluate, reevaluate
from attnpress.tasks import TaskData, TaskError, load_task
from attnpress.tasks.predictions import predict, predicted_logits
from tests.kernels.factories import needs_kernel


@pytest.fixture(scope="module")
def model(finished: Path) -> PreTrainedModel:
    return load_compressed(finished / "progressive", "classification", ("no", "yes"))


def row_by_row(model: PreTrainedModel, data: TaskData) -> list[Any]:
    """Outputs of each evaluation row alone, without padding."""
    with torch.no_grad():
        return [model.eval()(**data.collate([row])) for row in data.eval]


def test_logits_are_those_of_each_row_alone(model: PreTrainedModel, data: TaskData) -> None:
    logits = predicted_logits(model, data, batch_size=7)
    assert logits.shape == (80, 1, 2)
    alone = torch.cat([output.logits for output in row_by_row(model, data)])
    assert torch.allclose(logits[:, 0], alone, atol=1e-4)


def test_metrics_are_those_of_the_logits(model: PreTrainedModel, data: TaskData) -> None:
    right = predicted_logits(model, data, 32)[:, 0].argmax(-1) == torch.tensor(data.eval["labels"])
    assert predict(model, data) == {"accuracy": pytest.approx(100 * float(right.float().mean()))}
    rows = evaluate(model, data, "progressive", 32).row_scores
    assert rows is not None
    assert (rows.kind, rows.values().tolist()) == ("right", right.float().tolist())


def test_figures_do_not_depend_on_the_batches(model: PreTrainedModel, data: TaskData) -> None:
    stages = [evaluate(model, data, "progressive", 32, batch_size) for batch_size in (1, 64)]
    assert stages[0].macs_dense == stages[1].macs_dense
    assert stages[0].sparsity == pytest.approx(stages[1].sparsity, abs=1e-3), "a code may differ by rounding"
    assert stages[0].padded_sparsity == pytest.approx(stages[1].padded_sparsity, abs=1e-3)


def test_nothing_of_an_evaluation_stays_in_the_model(model: PreTrainedModel, data: TaskData) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    evaluate(model, data, "progressive", 32)
    assert model.training
    assert all(not module.watchers for module in attentions(model).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_counting_stops_also_when_a_prediction_is_not_a_number(finished: Path, data: TaskData) -> None:
    broken = bind(load_model(str(finished / "dense"), "classification", ("no", "yes")), DENSE)
    with torch.no_grad():
        broken.get_parameter("classifier.bias").fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="predictions hold NaN or infinity in 80 of 80 rows"):
        evaluate(broken, data, "dense", 32)
    assert all(not module.watchers for module in attentions(broken).values())


def test_what_cannot_be_evaluated_is_refused(model: PreTrainedModel, finished: Path, data: TaskData) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: .* greater than or equal to 1 \(found 0\)"):
        evaluate(model, data, "progressive", 32, batch_size=0)
    longest = max(map(len, data.eval["input_ids"]))
    with pytest.raises(ConfigError, match=rf"padded_length: 8 is less than the longest evaluation row, of {longest}"):
        evaluate(model, data, "progressive", 8)
    dense = load_model(str(finished / "dense"), "classification", ("no", "yes"))
    with pytest.raises(
        ConfigError, match=r"BertForSequenceClassification is not bound: call bind\(model, spec\) first"
    ):
        evaluate(dense, data, "dense", 32)


def test_a_comparison_of_int8_layers_is_refused_where_none_can_be(
    finished: Path, tiny_recipe: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def float_plan(model: Any, *_: Any) -> dict[str, ProductPlan]:
        encoder = find_encoder(model)
        assert encoder is not None
        plan = {name: ProductPlan(error=9.0, quantized=False) for name in entries(model, encoder)}
        set_plan(model, plan)
        return plan

    monkeypatch.setattr("attnpress.runs.agreement.plan_linear", float_plan)
    with pytest.raises(
        ConfigError, match=r"--linear int8: all linear layers of BertForSequenceClassification stay in fl"
    ):
        compare_backends(finished, tiny_recipe, "reference", "int8")


def test_a_run_is_not_evaluated_on_labels_of_other_names(
    finished: Path, tiny_recipe: RunConfig, reviews: Path, tmp_path: Path
) -> None:
    rows = (reviews / "eval.jsonl").read_text(encoding="utf-8").replace('"yes"', '"good"').replace('"no"', '"bad"')
    (tmp_path / "eval.jsonl").write_text(rows, encoding="utf-8")
    file = tmp_path / "eval.jsonl"
    other = dataclasses.replace(
        tiny_recipe, data=dataclasses.replace(tiny_recipe.data, train_file=file, eval_file=file)
    )
    with pytest.raises(
        ConfigError, match=r"--task custom: its labels are bad, good, those of the model of .* are no, yes"
    ):
        reevaluate(finished, other)


def test_spans_of_windows_of_different_lengths_are_kept_apart(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer: Any = load_tokenizer(str(tiny_model))
    context = "the film was good . the plot was bad ."
    asked = [
        {"id": "1", "question": "film ?", "answers": [{"text": "good", "answer_start": 13}]},
        {"id": "2", "question": "was the plot of the film good ?", "answers": [{"text": "bad", "answer_start": 33}]},
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": asked}]}]}), encoding="utf-8")
    questions = load_task(DataSpec("squad", train_file=file, eval_file=file, max_length=32), tokenizer, seed=0)
    torch.manual_seed(0)
    reader = bind(load_model(str(tiny_model), "qa"), DENSE)
    lengths = [len(row) for row in questions.eval["input_ids"]]
    assert len(set(lengths)) == 2
    logits = predicted_logits(reader, questions, batch_size=1)
    assert logits.shape == (2, 2, max(lengths))
    for row, output in enumerate(row_by_row(reader, questions)):
        expected = torch.stack([output.start_logits[0], output.end_logits[0]])
        assert torch.equal(logits[row, :, : lengths[row]], expected)
    metrics = predict(reader, questions)
    assert list(metrics) == ["f1", "exact_match"]
    rows = evaluate(reader, questions, "dense", 32).row_scores
    assert rows is not None
    assert (rows.kind, rows.rows, 100 * rows.values().mean()) == ("score", 2, pytest.approx(metrics["f1"], abs=0.01))
    assert evaluate(reader, questions.watched(1), "dense", 32).row_scores is None


def test_a_finished_run_evaluates_to_its_record(finished: Path, tiny_recipe: RunConfig) -> None:
    stage = read_record(finished).stage("progressive")
    assert stage is not None
    layers = [
        dataclasses.replace(
            layer, heads=[dataclasses.replace(head, errors={}, pruned_mass=None) for head in layer.heads]
        )
        for layer in stage.layers
    ]  # errors are measured by the run alone
    found = reevaluate(finished, tiny_recipe)
    assert dataclasses.replace(found, seconds=stage.seconds) == dataclasses.replace(stage, layers=layers)


def test_a_finished_run_evaluates_on_other_rows(finished: Path, tiny_recipe: RunConfig, reviews: Path) -> None:
    swapped = dataclasses.replace(tiny_recipe.data, eval_file=reviews / "train.csv", eval_rows=50)
    stage = reevaluate(finished, dataclasses.replace(tiny_recipe, data=swapped))
    assert stage.metrics["accuracy"] > 60
    assert stage.macs_dense != read_record(finished).stages[-1].macs_dense


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"label": "stars", "metric": "pearson"}, "--task custom: a task of kind 'regression' with 1 outputs"),
    ({"label": "stars"}, "--task custom: a task of kind 'classification' with 6 outputs, but the model of .*head fits"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_a_task_that_the_head_does_not_fit_is_refused(
    change: dict[str, Any], message: str, finished: Path, tiny_recipe: RunConfig
) -> None:
    other = dataclasses.replace(tiny_recipe, data=dataclasses.replace(tiny_recipe.data, **change))
    with pytest.raises(ConfigError, match=message):
        reevaluate(finished, other)


def test_questions_are_not_put_to_a_classifier(finished: Path, tiny_recipe: RunConfig, tmp_path: Path) -> None:
    answer = {"text": "good", "answer_start": 0}
    paragraph = {"context": "good film", "qas": [{"id": "1", "question": "?", "answers": [answer]}]}
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
    data = DataSpec("squad", train_file=file, eval_file=file, max_length=32)
    with pytest.raises(ConfigError, match="--task squad: a task of kind 'qa'"):
        reevaluate(finished, dataclasses.replace(tiny_recipe, data=data))


def test_a_run_without_a_compressed_model_is_named(tiny_recipe: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished compressed model; run `attnpress compress` to its end"):
        reevaluate(tmp_path, tiny_recipe)
    unknown = dataclasses.replace(tiny_recipe, data=DataSpec("nosuch"))
    (tmp_path / "progressive").mkdir()
    load_tokenizer(tiny_recipe.model).save_pretrained(tmp_path / "progressive")
    with pytest.raises(TaskError, match=r"data\.task: unknown task 'nosuch'"):
        reevaluate(tmp_path, unknown)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
def test_a_deployed_run_predicts_what_was_trained_on_every_row(
    finished: Path, tiny_recipe: RunConfig, backend: str
) -> None:
    found = compare_backends(finished, tiny_recipe, backend)
    assert (found.rows, found.same_predictions, found.identical_logits) == (80, 80, 80)
    assert found.largest_difference == 0
    assert found.complete
    assert found.trained == found.deployed == reevaluate(finished, tiny_recipe).metrics


def test_a_backend_that_predicts_otherwise_is_found_out(
    finished: Path, tiny_recipe: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(call: AttentionCall) -> torch.Tensor:
        return torch.zeros_like(call.query)

    monkeypatch.setitem(ops._BACKENDS, "reference", wrong)
    found = compare_backends(finished, tiny_recipe, "reference")
    assert found.same_predictions < found.rows == 80
    assert found.identical_logits == 0
    assert found.largest_difference > 0
    assert not found.complete
