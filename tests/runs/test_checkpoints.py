"""Runs that begin from a checkpoint: its names and order of classes, its head, its precision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from attnpress.config import ConfigError, RunConfig
from attnpress.models.binding import attentions
from attnpress.models.hub import ModelError
from attnpress.models.loading import class_names, load_compressed, load_model, load_tokenizer
from attnpress.records.run import Record
from attnpress.runs.compression import compress
from attnpress.runs.evaluation import reevaluate
from tests.runs.recipes import quietly, staged


def test_a_checkpoint_that_is_not_there_is_not_trained_instead(from_dense: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint: no folder .*absent; give one that save_pretrained wrote"):
        quietly(dataclasses.replace(from_dense, checkpoint=tmp_path / "absent"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def renamed(folder: Path, to: Path, names: tuple[str, str], *, turned: bool) -> Path:
    """The two classes of a saved classifier under other names, and in the other order if `turned`."""
    model: Any = load_model(str(folder), "classification", names[::-1] if turned else names)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: n for n, name in enumerate(names)}
    if turned:
        with torch.no_grad():
            for tensor in model.classifier.parameters():
                tensor.copy_(tensor.flip(0))
    model.save_pretrained(to)
    load_tokenizer(str(folder)).save_pretrained(to)
    return to


@pytest.mark.parametrize("names", [("yes", "no"), ("YES", "NO")])
def test_a_checkpoint_keeps_its_own_names_and_order_of_classes(
    names: tuple[str, str], finished: Path, record: Record, from_dense: RunConfig, tmp_path: Path
) -> None:
    checkpoint = renamed(finished / "dense", tmp_path / "turned", names, turned=True)
    config = dataclasses.replace(from_dense, checkpoint=checkpoint)
    found = quietly(config, tmp_path / "run")
    for name in ("dense", "quantized", "one_shot"):
        assert staged(found, name).metrics == staged(record, name).metrics
    assert staged(found, "progressive").metrics["accuracy"] > (record.majority or 0) + 20, (
        "taught by a teacher in order"
    )
    saved = json.loads((tmp_path / "run" / "progressive" / "config.json").read_text(encoding="utf-8"))
    assert saved["id2label"] == {"0": names[0], "1": names[1]}
    assert saved["label2id"] == {names[0]: 0, names[1]: 1}
    again = reevaluate(tmp_path / "run", config)
    assert again.metrics == staged(found, "progressive").metrics


def test_labels_that_are_numbers_are_those_of_the_checkpoint(
    finished: Path, record: Record, from_dense: RunConfig, reviews: Path, tmp_path: Path
) -> None:
    """Data that say 0 and 1 mean the outputs of the model, whose names stay."""
    checkpoint = renamed(finished / "dense", tmp_path / "turned", ("yes", "no"), turned=True)
    rows = [json.loads(line) for line in (reviews / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    numbered = "".join(json.dumps(row | {"verdict": int(row["verdict"] == "no")}) + "\n" for row in rows)
    (tmp_path / "eval.jsonl").write_text(numbered, encoding="utf-8")
    held_out = tmp_path / "eval.jsonl"
    data = dataclasses.replace(from_dense.data, train_file=held_out, eval_file=held_out)
    config = dataclasses.replace(from_dense, checkpoint=checkpoint, data=data)
    found = compress(config, tmp_path / "run", notify=lambda _: None, stages=("dense",))
    assert staged(found, "dense").metrics == staged(record, "dense").metrics


@pytest.mark.parametrize("names", [("good", "bad"), ("LABEL_1", "LABEL_0"), ("yes", "maybe")])
def test_a_checkpoint_of_other_classes_is_refused_by_their_names(
    names: tuple[str, str], finished: Path, from_dense: RunConfig, tmp_path: Path
) -> None:
    checkpoint = renamed(finished / "dense", tmp_path / "other", names, turned=False)
    message = rf"checkpoint: .* has the labels {names[0]}, {names[1]}, the data have no, yes; make them the same"
    with pytest.raises(ConfigError, match=message):
        quietly(dataclasses.replace(from_dense, checkpoint=checkpoint), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_below_the_commonest_class_is_warned_of(
    finished: Path, from_dense: RunConfig, tmp_path: Path
) -> None:
    """Names that say nothing count as the data do: here the other way round."""
    checkpoint = renamed(finished / "dense", tmp_path / "turned", ("LABEL_0", "LABEL_1"), turned=True)
    config = dataclasses.replace(from_dense, checkpoint=checkpoint)
    with pytest.warns(
        UserWarning, match=r"less than always predicting the most frequent class \(\d+\.\d+\); is it fine-"
    ):
        compress(config, tmp_path / "run", notify=lambda _: None, stages=("dense",))


def test_a_model_without_a_trained_head_is_no_checkpoint(from_dense: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(from_dense, checkpoint=Path(from_dense.model))
    with pytest.raises(
        ModelError, match=r"checkpoint: .* was not fine-tuned for this task: it lacks classifier\.bias, "
    ):
        quietly(config, tmp_path / "run")


def test_a_model_that_names_the_same_classes_is_trained_in_its_own_order(
    finished: Path, tiny_recipe: RunConfig, tmp_path: Path
) -> None:
    short = dataclasses.replace(tiny_recipe.dense, epochs=0.1, learning_rate=1e-6)
    for names, kept in ((("yes", "no"), ("yes", "no")), (("good", "bad"), ("no", "yes"))):
        base = renamed(finished / "dense", tmp_path / names[0], names, turned=True)
        output = tmp_path / f"run-{names[0]}"
        compress(
            dataclasses.replace(tiny_recipe, model=str(base), dense=short), output, lambda _: None, stages=["dense"]
        )
        assert class_names(str(output / "dense")) == kept


def test_a_given_checkpoint_is_said_to_be_evaluated(from_dense: RunConfig, tmp_path: Path) -> None:
    lines = list[str]()
    compress(from_dense, tmp_path / "run", notify=lines.append, stages=("dense",))
    assert lines == [f"dense: evaluate the checkpoint {from_dense.checkpoint}, without compression"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save_dtype", ["float32", "original"])
def test_weights_of_few_bits_are_trained_in_float32_and_saved_as_asked(
    dtype: torch.dtype, save_dtype: Any, tiny_recipe: RunConfig, tmp_path: Path
) -> None:
    base: Any = AutoModel.from_pretrained(tiny_recipe.model)
    base.to(dtype).save_pretrained(tmp_path / "base")
    load_tokenizer(tiny_recipe.model).save_pretrained(tmp_path / "base")
    short = dataclasses.replace(tiny_recipe.dense, epochs=0.5, learning_rate=1e-4, checkpoints=1)
    config = dataclasses.replace(
        tiny_recipe, model=str(tmp_path / "base"), dense=short, compress=short, save_dtype=save_dtype
    )
    lines = list[str]()
    found = compress(config, tmp_path / "run", notify=lines.append)
    assert any(line.startswith(f"model: its weights are {dtype}; trained in torch.float32, saved as") for line in lines)
    before, after = base.state_dict(), load_file(tmp_path / "run" / "dense" / "model.safetensors")
    moved = [after[f"bert.{name}"] != tensor.float() for name, tensor in before.items() if "pooler" not in name]
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert float(torch.cat([part.flatten() for part in moved]).float().mean()) > 0.9, (
        "also by less than a step of dtype"
    )
    saved = load_compressed(tmp_path / "run" / "progressive", "classification", ("no", "yes"))
    assert saved.dtype == (torch.float32 if save_dtype == "float32" else dtype)
    assert next(iter(attentions(saved).values())).q_scale.dtype == torch.float32
    assert reevaluate(tmp_path / "run", config).metrics == staged(found, "progressive").metrics
    assert staged(found, "progressive").pruned == pytest.approx(0.8, abs=0.03)
