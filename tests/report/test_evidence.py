"""The table of evidence: which records are compared with which, and what is worked out from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from attnpress.config import DataSpec, RunConfig
from attnpress.config.recipe import spec_to_dict
from attnpress.records.reading import to_json
from attnpress.records.run import HeadRecord, LayerRecord, Record, StageRecord
from attnpress.report.evidence import (
    ablation_markdown,
    caption,
    errors_markdown,
    evidence_markdown,
    goals_markdown,
    losses,
    padded_to,
    read_cells,
)

WORK = {f"{kind}_{side}": 10 if side == "remaining" else 100 for kind in ("bit_operations", "bytes") for side in ("dense", "remaining")}  # fmt: skip # noqa: E501
BITS = dict.fromkeys("qkvp", 8)


def stage(name: str, score: float, sparsity: float = 0.95, keys: float = 2.0) -> StageRecord:
    return StageRecord(name, {"f1": score}, sparsity, sparsity, 0.96, 64, 0.0, keys, BITS, 200, 105, WORK, [], 1.0)


def record(seed: int, *stages: StageRecord, epochs: float = 3.0) -> Record:
    provenance = {"rows": {"train": 4000, "eval": 408}, "seed": seed, "weights": {"dense": f"hash {seed}"}}
    recipe = spec_to_dict(RunConfig(model="tiny", data=DataSpec(task="mrpc")))
    recipe["compress"]["epochs"] = epochs
    return Record(recipe, "f1", 81.22, provenance, list(stages))


@pytest.fixture
def cells() -> dict[str, list[Record]]:
    dense = [
        record(seed, stage("dense", 80.0, 0, 50), stage("dense_control", control, 0, 50))
        for seed, control in enumerate([84.0, 86.0])
    ]
    eight = [
        record(seed, *(stage(name, score) for name in ("dense", "quantized", "one_shot", "progressive")))
        for seed, score in enumerate([85.0, 84.0])
    ]
    other = [record(7, stage("dense", 80.0), stage("progressive", 83.0, 0.9, 5.0))]
    return {"dense": dense, "8888-0.95": eight, "4444-0.90": other}


def test_each_seed_is_compared_with_its_dense_model_trained_as_long(cells: dict[str, list[Record]]) -> None:
    lines = evidence_markdown("mrpc", cells).splitlines()
    assert "| f1 | against dense | sparsity | padded to 128 | keys per query |" in lines[0]
    figures = "0.950 | 0.9900 | 2.00 | 10.0% | 10.0% | 2 |"
    assert f"| 8/8/8/8, 0.95 | progressive pruning | 84.50 ± 0.71 | -0.50 | {figures}" in lines
    assert sum("8/8/8/8" in line for line in lines) == 3, "quantized, at once, progressively"
    assert "| float | dense, trained equally long | 85.00 ± 1.41 | +0.00 |" in "\n".join(lines)
    assert lines[-1].startswith("| 4/4/4/4, 0.90 | progressive pruning | 83.00 | +3.00 | 0.900 |"), "its own dense: 80"


def test_choices_are_shown_beside_the_dense_model_trained_as_long(cells: dict[str, list[Record]]) -> None:
    lines = ablation_markdown({"dense": cells["dense"], "cubic-to-0.5": cells["8888-0.95"]}).splitlines()
    assert lines[0] == "| choice | f1 | against dense | sparsity | keys per query | seeds |"
    assert lines[2:] == [
        "| dense | 85.00 ± 1.41 | +0.00 | 0.000 | 50.00 | 2 |",
        "| cubic to 0.5 | 84.50 ± 0.71 | -0.50 | 0.950 | 2.00 | 2 |",
    ]


def test_a_cell_trained_for_longer_is_compared_with_a_dense_model_trained_for_longer(
    cells: dict[str, list[Record]],
) -> None:
    longer = [
        record(seed, stage("dense", 80.0, 0, 50), stage("dense_control", 83.0, 0, 50), epochs=6.0) for seed in (0, 1)
    ]
    four = [record(seed, stage("dense", 80.0), stage("progressive", 82.5), epochs=6.0) for seed in (0, 1)]
    lines = evidence_markdown("mrpc", {**cells, "dense-6epochs": longer, "4444-0.95": four}).splitlines()
    assert any(
        line.startswith("| float, 6 epochs | dense, trained equally long | 83.00 ± 0.00 | +0.00 |") for line in lines
    )
    assert any(line.startswith("| 4/4/4/4, 0.95 | progressive pruning | 82.50 ± 0.00 | -0.50 |") for line in lines)
    assert any(line.startswith("| 8/8/8/8, 0.95 | progressive pruning | 84.50 ± 0.71 | -0.50 |") for line in lines)


def test_a_cell_from_a_dense_model_made_anew_is_compared_with_that_of_its_seed(cells: dict[str, list[Record]]) -> None:
    elsewhere = record(1, stage("dense", 70.0), stage("progressive", 83.0))
    elsewhere.provenance["weights"] = {"dense": "another hash"}
    last = evidence_markdown("mrpc", {"dense": cells["dense"], "4444-0.90": [elsewhere]}).splitlines()[-1]
    assert last.startswith("| 4/4/4/4, 0.90 | progressive pruning | 83.00 | -3.00 |"), "86 of seed 1"


def test_the_figure_has_a_point_for_each_cell(cells: dict[str, list[Record]]) -> None:
    lines = [line for bits in ("8888", "4444") for panel in losses({"mrpc": cells}, bits) for line in panel]
    assert [(line.label, line.x, line.y) for line in lines] == [
        ("mrpc", [0.95], [-0.5]), ("mrpc", [2.0], [-0.5]), ("mrpc", [0.9], [3.0]), ("mrpc", [5.0], [3.0]),
    ]  # fmt: skip


def test_the_figure_leaves_variants_of_a_cell_to_the_table(cells: dict[str, list[Record]]) -> None:
    tried = {**cells, "8888-0.98-linear8": [record(0, stage("dense", 85.0), stage("progressive", 70.0))]}
    assert losses({"mrpc": tried}, "8888") == losses({"mrpc": cells}, "8888")


def test_errors_of_layers_are_means_over_heads_and_seeds() -> None:
    def layer(*errors: float) -> LayerRecord:
        heads = [HeadRecord(0.9, 0.9, 0.0, 2.0, 0.1, {"output": error}) for error in errors]
        return LayerRecord("attention", 0.9, 0.9, 0.9, 0.0, 2.0, {}, heads)

    def pruned(keys: float, *layers: LayerRecord) -> StageRecord:
        return dataclasses.replace(stage("one_shot", 80.0, 0.9, keys), layers=list(layers))

    two = [record(seed, pruned(2.0, layer(0.2, error), layer(1.0, 1.0))) for seed, error in enumerate([0.4, 0.6])]
    other = [record(0, pruned(1.5, layer(0.7), layer(0.8)))]
    old = [record(0, pruned(1.0, LayerRecord("attention", 0.9, 0.9, 0.9, 0.0, 2.0, {}, [HeadRecord(0, 0, 0, 2, 0)])))]
    lines = errors_markdown(
        {"rte": {"8888-0.90": two, "4444-0.90": other}, "mrpc": {"8888-0.95": other, "8888-0.90": old}}, "8888"
    ).splitlines()
    assert lines[0] == "| task | asked | keys per query | of | layer 0 | layer 1 |"
    assert lines[2:] == [
        "| mrpc | 0.95 | 1.5 | 15 | 0.70 | 0.80 |", "| rte | 0.90 | 2.0 | 20 | 0.35 | 1.00 |"
    ], "fewest keys first; other bits, and records made before errors were, are left out"  # fmt: skip


def test_goals_are_judged_by_both_dense_models(cells: dict[str, list[Record]]) -> None:
    wanted = [
        ("mrpc", "8888-0.95", 0.5),
        ("mrpc", "8888-0.95", 0.4),
        ("mrpc", "4444-0.90", 0.7),
        ("mrpc", "4444-0.99", 0.7),
    ]
    cells["dense-6epochs"] = [record(seed, stage("dense_control", 86.0, 0, 50), epochs=6.0) for seed in (0, 1)]
    lines = goals_markdown({"mrpc": cells}, wanted).splitlines()
    assert lines[2:] == [
        "| mrpc | 8/8/8/8, 0.95 | 2.0 | 0.5 | -0.50 ± 2.12: met | -1.50: not met |",
        "| mrpc | 8/8/8/8, 0.95 | 2.0 | 0.4 | -0.50 ± 2.12: not met | -1.50: not met |",
        "| mrpc | 4/4/4/4, 0.90 | 5.0 | 0.7 | 3.00: met | -3.00: not met |",
        "| mrpc | 4/4/4/4, 0.99 |  | 0.7 | not run | not run |",
    ]  # fmt: skip


def test_survivors_stay_when_padding_grows() -> None:
    # Two sequences of 64, 4 % of 64 x 64 pairs left: of 128 x 128 it is a quarter of that.
    assert padded_to(stage("progressive", 1), 128) == pytest.approx(0.99)
    assert padded_to(stage("progressive", 1), 64) == 0.96


def test_the_caption_says_what_attention_weighs(cells: dict[str, list[Record]]) -> None:
    said = caption(cells, hidden=100)
    assert "Trained on 4,000 rows, evaluated on 408" in said
    assert "7.7% of the model" in said, "50 keys: 2 * 100 * 50 of attention, 12 * 100 * 100 of linear layers a token"
    assert "81.22" in said
    one = {"dense": [dataclasses.replace(cells["dense"][0], majority=None)]}
    assert "most frequent class" not in caption(one, 100)
    assert "Run on" not in said
    first = cells["dense"][0]
    on_gpu = dataclasses.replace(first, provenance={**first.provenance, "machine": {"accelerator": "NVIDIA H100"}})
    assert caption({"dense": [on_gpu]}, 100).endswith("Run on one NVIDIA H100.")


def test_records_are_found_by_their_names(cells: dict[str, list[Record]], tmp_path: Path) -> None:
    for name in ("mrpc-dense-seed0", "mrpc-8888-0.95-seed1", "sst2-8888-0.95-seed0"):
        (tmp_path / f"{name}.json").write_text(to_json(cells["dense"][0]))
    (tmp_path / "demo.json").write_text("no record")
    found = read_cells(tmp_path)
    assert {task: list(rows) for task, rows in found.items()} == {"mrpc": ["dense", "8888-0.95"], "sst2": ["8888-0.95"]}
