"""The model card: what the record says, in the form that the Hub reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from attnpress.config import LARGEST_HEAD
from attnpress.records.run import Record, read_record
from attnpress.runs.card import model_card

ROOT = Path(__file__).parents[2]


@pytest.fixture
def record() -> Record:
    return read_record(ROOT / "records" / "demo.json")


def test_a_run_writes_the_card_of_its_model(finished: Path) -> None:
    record = read_record(finished)
    assert (finished / "progressive" / "README.md").read_text(encoding="utf-8") == model_card(record, "classification")
    stage = record.stage("progressive")
    assert stage is not None
    text = model_card(record, "classification")
    for name in ("sparsity", "pruned", "padded_sparsity", "tile_sparsity"):
        assert f"| {name} | {getattr(stage, name):.3f} |" in text
    assert "at 8/8/8/8 bits" in text
    assert f"{stage.metrics['accuracy']:.2f}" in text
    assert "| accuracy |" in text


def test_the_header_is_what_the_hub_reads(record: Record) -> None:
    _, header, body = model_card(record, "classification").split("---\n", 2)
    values = yaml.safe_load(header)
    stage = record.stage("progressive")
    assert stage is not None
    assert (values["library_name"], values["pipeline_tag"]) == ("transformers", "text-classification")
    assert values["model-index"][0]["results"][0]["metrics"] == [
        {"type": "accuracy", "value": round(stage.metrics["accuracy"], 2)}
    ]
    assert "import attnpress" in body


def test_the_card_names_no_folder_of_the_machine_it_was_made_on(record: Record) -> None:
    folder = "/".join(["", "home", "me", "models", "my-bert"])
    local = dataclasses.replace(record, recipe=record.recipe | {"model": folder})
    text = model_card(local, "qa")
    assert "/me/" not in text
    assert "\nmy-bert, fine-tuned" in text
    assert "AutoModelForQuestionAnswering" in text


def test_the_card_says_what_becomes_of_pruned_pairs(record: Record) -> None:
    attention = record.recipe["attention"]
    tails = {"none": "`relative`. Made", "mean": "a tail (`mean`).", "linear": "a tail (`linear`, 4 directions)."}
    whole = {"tail": "linear", "tail_rank": LARGEST_HEAD}
    cases = [({"tail": tail, "tail_rank": 4}, says) for tail, says in tails.items()]
    for change, says in [*cases, (whole, "a tail (`linear`, whole score).")]:
        own = record.recipe | {"attention": attention | change}
        text = model_card(dataclasses.replace(record, recipe=own), "classification")
        assert says in text
        assert "attnpress.deploy(model)  # optional" in text


def test_a_run_that_is_not_finished_has_no_card(record: Record) -> None:
    with pytest.raises(ValueError, match="no stage 'progressive'"):
        model_card(dataclasses.replace(record, stages=[]), "classification")
