"""A look at a model before compressing it: what is measured a head at a time, and what is suggested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from attnpress.config import AttentionSpec
from attnpress.config.recipe import parse_spec
from attnpress.models.loading import load_backbone, load_tokenizer
from attnpress.runs import inspection
from attnpress.runs.inspection import TRIALS, Inspection, encode, inspect_model, recipe_lines, spec_of

TEXTS = ["the film was good and the plot is fine", "a dull story with a poor actor", "great"]


@pytest.fixture(scope="module")
def batch(tiny_model: Path) -> dict[str, torch.Tensor]:
    return encode(load_tokenizer(str(tiny_model)), TEXTS)


@pytest.fixture(scope="module")
def seen(tiny_model: Path, batch: dict[str, torch.Tensor]) -> Inspection:
    return inspect_model(load_backbone(str(tiny_model)), batch)


def test_every_head_is_looked_at(seen: Inspection) -> None:
    names = [f"encoder.layer.{layer}.attention.self" for layer in (0, 1)]
    assert [(head.layer, head.head) for head in seen.heads] == [(name, head) for name in names for head in (0, 1)]
    for head in seen.heads:
        assert 0 <= head.zeros < 1
        assert 1 <= head.keys_99 <= 11
        assert min(head.q_max, head.k_max, head.v_max) > 0
        assert 0 < head.change_4bit < 1
        assert 0 < head.change_pruned < 2


def test_ranges_are_those_of_the_projections(seen: Inspection, tiny_model: Path, batch: dict[str, Any]) -> None:
    model: Any = load_backbone(str(tiny_model))
    first = model.encoder.layer[0].attention.self
    with torch.no_grad():
        keys = first.key(model.embeddings(batch["input_ids"]))
    largest = (keys.abs() * batch["attention_mask"].unsqueeze(-1)).amax((0, 1)).view(2, -1).amax(-1)
    assert [head.k_max for head in seen.heads[:2]] == pytest.approx(largest.tolist(), rel=1e-5)


def test_one_head_changes_less_than_all(seen: Inspection) -> None:
    whole = {(trial.spec.p.bits, trial.spec.sparsity): trial.change for trial in seen.trials}
    assert max(head.change_pruned for head in seen.heads) < whole[8, 0.9]
    assert whole[8, 0.0] < whole[4, 0.0]
    assert whole[8, 0.0] < whole[8, 0.5] < whole[8, 0.95]


def test_the_cheapest_trial_within_the_tolerance_is_suggested(
    seen: Inspection, tiny_model: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    within = [trial for trial in seen.trials if trial.spec.p.bits == 8 and trial.change <= inspection.TOLERANCE]
    assert len(seen.trials) == len(TRIALS)
    assert all(0 < trial.work < 0.07 for trial in seen.trials)
    assert seen.suggestion == min(within, key=lambda trial: trial.work).spec
    monkeypatch.setattr(inspection, "TOLERANCE", 0.0)
    monkeypatch.setattr(inspection, "TRIALS", TRIALS[:1])
    assert inspect_model(load_backbone(str(tiny_model)), batch).suggestion is None


def test_a_suggestion_begins_at_8_bits_however_cheap_4_are(
    tiny_model: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "TRIALS", (spec_of(8, 0.0), spec_of(8, 0.5), spec_of(4, 0.5)))
    monkeypatch.setattr(inspection, "TOLERANCE", 10.0)
    found = inspect_model(load_backbone(str(tiny_model)), batch)
    assert min(found.trials, key=lambda trial: trial.work).spec == spec_of(4, 0.5)
    assert found.suggestion == spec_of(8, 0.5)


@pytest.mark.parametrize("spec", TRIALS)
def test_printed_lines_are_the_spec(spec: AttentionSpec) -> None:
    assert parse_spec(AttentionSpec, recipe_lines(spec)["attention"]) == spec


def test_lines_hold_what_differs_from_the_defaults() -> None:
    assert recipe_lines(spec_of(8, 0.9)) == {"attention": {"sparsity": 0.9}}
    tailed = recipe_lines(AttentionSpec(sparsity=0.9, tail="linear", tail_rank=4))
    assert tailed == {"attention": {"sparsity": 0.9, "tail": "linear", "tail_rank": 4}}


def test_an_empty_text_has_a_token_that_stands_for_it() -> None:
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[END]": 1, "good": 2}, unk_token="[END]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]")
    assert encode(tokenizer, [""])["input_ids"].tolist() == [[1]]
    assert encode(tokenizer, ["", "good"])["attention_mask"].tolist() == [[1], [1]]
