"""What each stage leaves beside its record: maps and histograms of a few rows, and errors of every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnpress.models.binding import attentions
from attnpress.models.loading import load_compressed, load_tokenizer
from attnpress.records.run import STAGES, Record
from attnpress.records.samples import Samples, read_samples
from attnpress.runs.sampling import ROWS, take_samples
from attnpress.tasks import TaskData


def sampled(finished: Path, stage: str) -> Samples:
    found = read_samples(finished, stage)
    assert found is not None
    return found


def test_every_compressed_stage_records_the_errors_of_its_heads(record: Record) -> None:
    for stage in record.stages:
        errors = [head.errors for layer in stage.layers for head in layer.heads]
        if stage.name == "dense":
            assert not any(errors)
            continue
        assert all(list(found) == ["q", "k", "v", "p", "output"] for found in errors)
        assert all(0 < value < 10 for found in errors for value in found.values())
        assert all(found["q"] < 0.05 for found in errors), "8 bits"
    quantized, one_shot = ({h.errors["p"] for l in record.stages[i].layers for h in l.heads} for i in (1, 2))  # noqa: E741
    assert max(quantized) < min(one_shot), "pruning costs more than rounding"


def test_every_compressed_stage_records_how_much_of_p_it_prunes(record: Record) -> None:
    masses = {stage.name: [h.pruned_mass for layer in stage.layers for h in layer.heads] for stage in record.stages}
    assert set(masses["dense"]) == {None}
    quantized, one_shot = ([found for found in masses[i] if found is not None] for i in ("quantized", "one_shot"))
    assert len(quantized) == len(one_shot) == len(masses["dense"])
    assert max(quantized) < 0.05 < min(one_shot) <= max(one_shot) < 0.8, "far pairs weigh less than their number says"


def test_maps_are_rows_of_probabilities_with_their_tokens(finished: Path, record: Record, data: TaskData) -> None:
    rows = {tuple(map(int, ids)) for ids in data.eval["input_ids"]}
    tokenizer = load_tokenizer(str(finished / "dense"))
    for name in ("dense", "progressive"):
        samples = sampled(finished, name)
        assert list(samples.maps) == [layer.name for layer in record.stages[0].layers]
        assert len(samples.tokens) == 3
        for tokens, maps in zip(samples.tokens, zip(*samples.maps.values(), strict=True), strict=True):
            numbers: Any = tokenizer.convert_tokens_to_ids(tokens)
            assert tuple(numbers) in rows
            for found in maps:
                assert found.shape == (2, len(tokens), len(tokens))
                assert np.allclose(found.astype(float).sum(-1), 1, atol=0.01)
    pruned = [float((found == 0).mean()) for maps in sampled(finished, "progressive").maps.values() for found in maps]
    assert np.mean(pruned) == pytest.approx(0.8, abs=0.1), "what the recipe asks for"


def test_histograms_count_the_valid_pairs_of_the_first_rows(finished: Path, data: TaskData) -> None:
    pairs = sum(len(ids) ** 2 for ids in data.eval[:ROWS]["input_ids"])
    for name in STAGES:
        samples = read_samples(finished, name)
        for found in samples.histograms.values() if samples else ():
            assert found.sum(-1).tolist() == [pairs, pairs]
    assert read_samples(finished, "dense_control") is None


def test_samples_are_those_of_the_saved_model(finished: Path, data: TaskData) -> None:
    tokenizer = load_tokenizer(str(finished / "progressive"))
    model = load_compressed(finished / "progressive", "classification", data.label_names)
    before, (again, errors) = sampled(finished, "progressive"), take_samples(model, data, tokenizer, "relative")
    assert before.tokens == again.tokens
    for name, maps in before.maps.items():
        assert all(np.array_equal(a, b) for a, b in zip(maps, again.maps[name], strict=True))
    assert errors.keys() == before.maps.keys()
    assert all(not module.watchers for module in attentions(model).values())
