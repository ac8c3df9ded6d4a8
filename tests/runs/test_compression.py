"""The main journey: four stages end to end on a tiny task, its record, its files, and each variant of a recipe."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from attnpress.config import AttentionSpec, ConfigError, RunConfig
from attnpress.config.recipe import load_config
from attnpress.files import MARKER, sha256_of
from attnpress.models.binding import attentions
from attnpress.models.forward import UnsupportedModelError
from attnpress.models.loading import load_compressed, load_model, load_tokenizer
from attnpress.records.reading import to_json
from attnpress.records.run import Record, from_json
from attnpress.runs.compression import compress
from attnpress.tasks import load_task
from tests.runs.recipes import no_training, quietly, staged

FRACTIONS = ("sparsity", "pruned", "padded_sparsity", "tile_sparsity")


LAYERS, HEADS, HEAD_DIM = 2, 2, 16


NAMES = ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"]


@pytest.fixture(scope="module")
def lengths(tiny_recipe: RunConfig) -> list[int]:
    """Tokens of each evaluation row."""
    data = load_task(tiny_recipe.data, load_tokenizer(tiny_recipe.model), tiny_recipe.seed)
    return [len(row) for row in data.eval["input_ids"]]


def test_the_precision_of_products_is_the_recipes_while_training_alone(
    tiny_recipe: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(*_: Any) -> None:
        seen.append(torch.get_float32_matmul_precision())
        raise KeyboardInterrupt

    monkeypatch.setattr("attnpress.runs.compression.train", train)
    with pytest.raises(KeyboardInterrupt):
        quietly(dataclasses.replace(tiny_recipe, matmul_precision="medium"), tmp_path / "run")
    assert [*seen, torch.get_float32_matmul_precision()] == ["medium", "highest"]


def test_four_stages_with_every_figure(record: Record) -> None:
    assert [stage.name for stage in record.stages] == ["dense", "quantized", "one_shot", "progressive"]
    for stage in record.stages:
        assert list(stage.metrics) == ["accuracy"]
        assert all(0 <= getattr(stage, name) <= 1 for name in FRACTIONS)
        assert stage.padded_length == 32
        assert stage.seconds > 0
        assert [layer.name for layer in stage.layers] == NAMES
    dense, quantized, one_shot, progressive = record.stages
    assert set(dense.bits.values()) == {None}
    assert (dense.sparsity, dense.pruned, dense.macs_remaining) == (0, 0, dense.macs_dense)
    assert quantized.pruned == 0 < quantized.sparsity, "small P are coded as zero"
    for stage in (quantized, one_shot, progressive):
        assert stage.bits == {"q": 8, "k": 8, "v": 8, "p": 8}
        assert set(stage.layers[0].scales) == {"q", "k", "v"}
        assert [len(scale) for scale in stage.layers[0].scales.values()] == [HEADS] * 3
    for stage in (one_shot, progressive):
        assert stage.pruned == pytest.approx(0.8, abs=0.02)
        assert stage.pruned <= stage.sparsity
        assert all(0 < head.threshold < 1 for layer in stage.layers for head in layer.heads)


def test_the_tiny_task_is_learned_and_compression_keeps_what_was_learned(record: Record) -> None:
    dense, *_, progressive = (stage.metrics["accuracy"] for stage in record.stages)
    assert record.majority is not None
    assert dense > record.majority + 20
    assert progressive > record.majority + 20


def test_totals_follow_from_the_rows_that_were_evaluated(record: Record, lengths: list[int]) -> None:
    rows, pairs = (LAYERS * HEADS * sum(length**power for length in lengths) for power in (1, 2))
    rectangle = LAYERS * HEADS * len(lengths) * 32**2
    for stage in record.stages:
        survivors = pairs * (1 - stage.sparsity)
        assert stage.macs_dense == 2 * pairs * HEAD_DIM
        assert stage.macs_remaining == pytest.approx((pairs + survivors) * HEAD_DIM)
        assert stage.padded_sparsity == pytest.approx(1 - survivors / rectangle)
        assert stage.keys_per_row == pytest.approx(survivors / rows)


def test_totals_are_those_of_layers_and_layers_those_of_heads(record: Record) -> None:
    for stage in record.stages:
        for name in ("sparsity", "pruned", "tile_sparsity", "keys_per_row"):
            assert getattr(stage, name) == pytest.approx(statistics.mean(getattr(one, name) for one in stage.layers))
            for layer in stage.layers:
                assert len(layer.heads) == HEADS
                assert getattr(layer, name) == pytest.approx(statistics.mean(getattr(one, name) for one in layer.heads))


def test_work_weighs_each_product_by_its_bits(record: Record) -> None:
    one_shot = staged(record, "one_shot")
    products = one_shot.macs_dense // 2
    survivors = one_shot.macs_remaining - products
    assert one_shot.work["bit_operations_dense"] == one_shot.macs_dense * 32 * 32
    assert one_shot.work["bit_operations_remaining"] == (products + survivors) * 8 * 8
    assert one_shot.work["bytes_dense"] == products // HEAD_DIM * 4


def test_provenance_says_what_the_figures_rest_on(record: Record, finished: Path, tiny_recipe: RunConfig) -> None:
    known = record.provenance
    assert {"attnpress", "torch", "transformers", "accelerate", "datasets", "numpy", "python"} <= set(known["versions"])
    assert (known["seed"], known["rows"]) == (0, {"train": 240, "eval": 80})
    assert tiny_recipe.data.train_file is not None
    assert tiny_recipe.data.eval_file is not None
    files = {"train": tiny_recipe.data.train_file, "eval": tiny_recipe.data.eval_file}
    assert known["data"] == {split: sha256_of(file) for split, file in files.items()}
    weights = {"base": Path(tiny_recipe.model), "dense": finished / "dense", "progressive": finished / "progressive"}
    assert known["weights"] == {name: sha256_of(folder / "model.safetensors") for name, folder in weights.items()}
    assert known["machine"]["processes"] == 1
    assert known["machine"]["threads"] == torch.get_num_threads()


def test_training_is_logged_step_by_step(record: Record, finished: Path) -> None:
    assert list(record.training) == ["dense", "progressive"]
    for name, history in record.training.items():
        assert [entry["step"] for entry in history] == list(range(1, 31))
        assert all(math.isfinite(entry["loss"]) for entry in history)
        logged = (finished / "logs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in logged] == history
    asked = [entry["sparsity_asked"] for entry in record.training["progressive"]]
    assert asked == sorted(asked)
    assert (asked[0], asked[-1]) == (0, 0.8)


def test_the_run_folder_is_complete_and_safe(finished: Path, tiny_recipe: RunConfig) -> None:
    assert load_config(finished / "recipe.yaml") == tiny_recipe
    files = [path.relative_to(finished) for path in finished.rglob("*") if path.is_file() and path.name != MARKER]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".yaml", ".safetensors", ".md", ".lock"}, (
        "nothing is left to unpickle"
    )
    assert not [path for path in files if path.name.startswith(".")], "no scratch files are left"
    for folder in ("dense", "progressive"):
        assert load_tokenizer(str(finished / folder)).vocab_size == 26


def test_the_saved_model_is_the_one_that_was_measured(finished: Path, record: Record) -> None:
    stage = staged(record, "progressive")
    saved = load_compressed(finished / "progressive", "classification", ("no", "yes"))
    for layer, module in zip(stage.layers, attentions(saved).values(), strict=True):
        assert module.spec == AttentionSpec(sparsity=0.8)
        assert [head.threshold for head in layer.heads] == module.threshold().tolist()
        assert layer.scales == {name: getattr(module, f"{name}_scale").flatten().tolist() for name in "qkv"}
    weights = load_file(finished / "progressive" / "model.safetensors")
    assert not [name for name in weights if name.endswith("histogram")], "only training needs it"
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_the_record_survives_json(record: Record) -> None:
    assert from_json(to_json(record)) == record


def test_a_second_call_does_nothing_and_returns_the_same_record(
    finished: Path, record: Record, tiny_recipe: RunConfig
) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

    before, lines = written(), list[str]()
    assert compress(tiny_recipe, finished, notify=lines.append) == record
    assert lines == [f"{stage.name}: already done" for stage in record.stages]
    assert written() == before


def test_a_fine_tuned_checkpoint_and_a_dense_model_trained_as_long(
    finished: Path, record: Record, from_dense: RunConfig, tmp_path: Path
) -> None:
    found = quietly(dataclasses.replace(from_dense, dense_control=True), tmp_path / "run")
    assert [stage.name for stage in found.stages] == ["dense", "dense_control", "quantized", "one_shot", "progressive"]
    for name in ("dense", "quantized", "one_shot"):
        once, again = (dataclasses.replace(staged(one, name), seconds=0) for one in (record, found))
        assert once == again
    assert list(found.training) == ["dense_control", "progressive"], "the checkpoint is evaluated, not trained"
    assert [len(history) for history in found.training.values()] == [8, 8]
    control = staged(found, "dense_control")
    assert (control.sparsity, set(control.bits.values())) == (0, {None})
    assert not (tmp_path / "run" / "dense").exists()
    checkpoint = sha256_of(finished / "dense" / "model.safetensors")
    assert found.provenance["weights"]["dense"] == found.provenance["weights"]["base"] == checkpoint


def test_a_model_off_the_interface_is_refused_before_it_is_trained(
    tiny_recipe: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=26, **shape)).save_pretrained(tmp_path / "deberta")
    load_tokenizer(tiny_recipe.model).save_pretrained(tmp_path / "deberta")
    monkeypatch.setattr("attnpress.runs.compression.train", no_training)
    with pytest.raises(UnsupportedModelError, match="DebertaV2ForSequenceClassification: its attention does not go"):
        quietly(dataclasses.replace(tiny_recipe, model=str(tmp_path / "deberta")), tmp_path / "run")


def test_inputs_longer_than_the_positions_of_a_model_are_refused_before_it_is_trained(
    tiny_recipe: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_recipe.model, tmp_path / "model")
    tokenizer = load_tokenizer(tiny_recipe.model)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(tmp_path / "model")
    longer = dataclasses.replace(tiny_recipe.data, max_length=1024)
    monkeypatch.setattr("attnpress.runs.compression.train", no_training)
    with pytest.raises(ConfigError, match=r"data\.max_length: 1024 exceeds the model's \d+ positions"):
        quietly(dataclasses.replace(tiny_recipe, model=str(tmp_path / "model"), data=longer), tmp_path / "run")


@pytest.mark.parametrize("stages", [["densee"], "dense"])
def test_stages_that_there_are_not_are_refused(stages: Any, from_dense: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages: no stage '.*'; give a list of some of dense, dense_control, "):
        compress(from_dense, tmp_path / "run", stages=stages)


def test_autocast_is_of_training_alone(from_dense: RunConfig, tmp_path: Path) -> None:
    found = quietly(dataclasses.replace(from_dense, autocast="bfloat16"), tmp_path / "run")
    plain = quietly(from_dense, tmp_path / "plain")
    first, other = (record.training["progressive"][0]["loss"] for record in (found, plain))
    assert first != other
    assert first == pytest.approx(other, rel=0.05)
    for name in ("dense", "quantized", "one_shot"):
        once, again = (dataclasses.replace(staged(one, name), seconds=0) for one in (found, plain))
        assert once == again
    saved = load_compressed(tmp_path / "run" / "progressive", "classification", ("no", "yes"))
    assert saved.dtype == torch.float32
    assert staged(found, "progressive").pruned == pytest.approx(0.8, abs=0.03)


def test_autocast_to_float16_needs_an_accelerator(
    from_dense: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ConfigError, match="autocast: float16 needs an accelerator, and there is none; take bfloat16"):
        quietly(dataclasses.replace(from_dense, autocast="float16"), tmp_path / "run")


@pytest.mark.parametrize("what", ["data.eval", "model"])
def test_a_run_does_not_go_on_with_other_files(
    what: str, from_dense: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run was stopped before its first stage was done."""
    assert from_dense.checkpoint is not None
    assert from_dense.data.eval_file is not None
    held_out = tmp_path / "eval.jsonl"
    held_out.write_bytes(from_dense.data.eval_file.read_bytes())
    model = load_model(str(from_dense.checkpoint), "classification", ("no", "yes"))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(from_dense.checkpoint)).save_pretrained(tmp_path / "model")
    config = dataclasses.replace(
        from_dense, checkpoint=tmp_path / "model", data=dataclasses.replace(from_dense.data, eval_file=held_out)
    )
    monkeypatch.setattr("attnpress.runs.compression.evaluate", no_training)
    with pytest.raises(AssertionError):
        quietly(config, tmp_path / "run")
    if what == "model":
        with torch.no_grad():
            next(model.parameters()).add_(1)
        model.save_pretrained(tmp_path / "model")
    else:
        held_out.write_text(held_out.read_text(encoding="utf-8").replace("film", "plot"), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"the sha256 of {what} is not what it was when this run began; restore"):
        quietly(config, tmp_path / "run")
