"""What a recipe may ask of the compressing stages: rules, scales, schedules, layers, tasks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnpress.config import DENSE, AttentionSpec, ConfigError, DataSpec, ProbsSpec, RunConfig, ScheduleSpec, TensorSpec
from attnpress.models.binding import attentions
from attnpress.models.loading import load_compressed
from tests.runs.recipes import no_training, quietly, staged


def with_attention(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **changes))


FITTED = [
    AttentionSpec(rule="topk", sparsity=0.7),
    AttentionSpec(rule="mass", sparsity=0.7),
    AttentionSpec(rule="threshold", sparsity=0.7),
    dataclasses.replace(DENSE, sparsity=0.7),
    AttentionSpec(
        TensorSpec(4, "token"), TensorSpec(4, "tensor", power_of_two=True), TensorSpec(4, "channel", "percentile"),
        ProbsSpec(4, "unit", renormalize=True), sparsity=0.7, smooth_key=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("spec", FITTED, ids=["topk", "mass", "threshold", "pruning-alone", "4-bits"])
def test_every_rule_ends_at_its_target(spec: AttentionSpec, from_dense: RunConfig, tmp_path: Path) -> None:
    found = quietly(dataclasses.replace(from_dense, attention=spec), tmp_path)
    for name in ("one_shot", "progressive"):
        stage = staged(found, name)
        assert stage.pruned == pytest.approx(0.7, abs=0.04), "topk keeps whole keys of short rows"
        assert stage.bits == spec.bits
    assert staged(found, "quantized").pruned == 0


@pytest.mark.parametrize(("rule", "threshold"), [("relative", 0.25), ("mass", 0.75)])
def test_a_threshold_of_ones_own_is_never_refitted(
    rule: Any, threshold: float, from_dense: RunConfig, tmp_path: Path
) -> None:
    spec = AttentionSpec(rule=rule, threshold=threshold)
    found = quietly(dataclasses.replace(from_dense, attention=spec), tmp_path)
    assert staged(found, "quantized").pruned == 0
    for name in ("one_shot", "progressive"):
        heads = [head for layer in staged(found, name).layers for head in layer.heads]
        assert [head.threshold for head in heads] == pytest.approx([threshold] * 4, rel=1e-6)
        assert 0.05 < staged(found, name).pruned < 0.95


def test_learned_scales_are_trained_and_saved(from_dense: RunConfig, tmp_path: Path) -> None:
    learned = TensorSpec(bits=4, learned=True)
    found = quietly(with_attention(from_dense, q=learned, k=learned, v=learned), tmp_path)
    before, after = (staged(found, name).layers[0].scales for name in ("one_shot", "progressive"))
    for name in "qkv":
        assert before[name] != after[name]
        assert all(scale > 0 for scale in after[name])
    saved = load_compressed(tmp_path / "progressive", "classification", ("no", "yes"))
    assert next(iter(attentions(saved).values())).q_scale.flatten().tolist() == after["q"]


def test_a_schedule_that_ends_with_training_reaches_its_target(from_dense: RunConfig, tmp_path: Path) -> None:
    late = dataclasses.replace(from_dense, schedule=ScheduleSpec("linear", end=1.0))
    found = quietly(late, tmp_path)
    assert found.training["progressive"][-1]["sparsity_asked"] == pytest.approx(0.8 * 7 / 8)
    assert staged(found, "progressive").pruned == pytest.approx(0.8, abs=0.02)


def test_layers_with_specs_of_their_own_are_trained_measured_and_saved(from_dense: RunConfig, tmp_path: Path) -> None:
    common = dataclasses.replace(from_dense.attention, sparsity=0.8)
    own = dataclasses.replace(common, q=TensorSpec(4), k=TensorSpec(4), p=ProbsSpec(4), sparsity=0.5)
    found = quietly(dataclasses.replace(from_dense, attention=common, layers={"1": own}), tmp_path)
    stage = staged(found, "progressive")
    assert [layer.pruned for layer in stage.layers] == pytest.approx([0.8, 0.5], abs=0.03)
    assert [layer.bits for layer in stage.layers] == [common.bits, own.bits]
    assert stage.bits == {"q": 6, "k": 6, "v": 8, "p": 6}
    products = stage.macs_dense // 4  # of one layer, and of one of its two products
    survivors = [round(products * (1 - layer.sparsity)) for layer in stage.layers]
    work = products * (8 * 8 + 4 * 4) + survivors[0] * 8 * 8 + survivors[1] * 4 * 8
    assert stage.work["bit_operations_remaining"] == pytest.approx(work, rel=1e-6)
    assert found.training["progressive"][-1]["sparsity_asked"] == pytest.approx(0.65)
    saved = attentions(load_compressed(tmp_path / "progressive", "classification", ("no", "yes")))
    assert [module.spec for module in saved.values()] == [common, own]


def test_a_layer_can_be_left_alone(from_dense: RunConfig, tmp_path: Path) -> None:
    found = quietly(dataclasses.replace(from_dense, layers={"*.layer.0.*": DENSE}), tmp_path)
    first, second = staged(found, "progressive").layers
    assert (first.sparsity, first.bits["q"], first.scales) == (0, None, {})
    assert second.pruned == pytest.approx(0.8, abs=0.03)


def test_layers_that_the_model_lacks_are_refused_before_training(
    tiny_recipe: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnpress.runs.compression.train", no_training)
    config = dataclasses.replace(tiny_recipe, layers={"2": tiny_recipe.attention})
    with pytest.raises(ConfigError, match=r"layers.2: no such attention module; the model has 2, 0 to 1: bert\.enc"):
        quietly(config, tmp_path)


def test_regression_runs_through_all_stages(tiny_recipe: RunConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(tiny_recipe.data, label="stars", metric="pearson")
    found = quietly(dataclasses.replace(tiny_recipe, data=data), tmp_path)
    assert len(found.stages) == 4
    assert found.majority is None
    assert staged(found, "dense").metrics["pearson"] > 50
    assert staged(found, "progressive").metrics["pearson"] > 50
    rows, targets = staged(found, "progressive").row_scores, found.targets
    assert rows is not None
    assert targets is not None
    correlation = 100 * float(np.corrcoef(rows.values(), targets.values())[0, 1])
    assert correlation == pytest.approx(staged(found, "progressive").metrics["pearson"], abs=0.01)


def test_question_answering_runs_through_all_stages(tiny_recipe: RunConfig, tmp_path: Path) -> None:
    context = "the film was good . the plot was bad . the actor is great and the scene is dull"
    asked = [
        {"id": word, "question": f"{word} ?", "answers": [{"text": answer, "answer_start": context.index(answer)}]}
        for word, answer in (("film", "good"), ("plot", "bad"), ("actor", "great"), ("scene", "dull"))
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": asked}] * 8}]}), encoding="utf-8")
    data = DataSpec("squad", train_file=file, eval_file=file, max_length=16)
    found = quietly(dataclasses.replace(tiny_recipe, data=data), tmp_path / "run")
    assert [list(stage.metrics) for stage in found.stages] == [["f1", "exact_match"]] * 4
    assert found.provenance["rows"] == {"train": 96, "eval": 96}, "three windows for each of 32 questions"
    assert staged(found, "progressive").pruned == pytest.approx(0.8, abs=0.04)
