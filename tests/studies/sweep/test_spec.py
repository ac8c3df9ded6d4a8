"""What a sweep may search, and the recipe that each choice gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attnpress.cli import main
from attnpress.config import AttentionSpec, ConfigError, ProbsSpec, RunConfig, TensorSpec
from attnpress.config.recipe import dump_config, load_spec, parse_spec
from attnpress.studies.sweep.spec import SearchSpec, SweepSpec, asked_work, choose, describe, trial_folder

RECIPE = RunConfig(attention=AttentionSpec(q=TensorSpec(granularity="tensor"), sparsity=0.9))


class Highest:
    """Always the last choice, and the highest number; keeps the names that were asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.names.append(name)
        return choices[-1]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        self.names.append(name)
        return high


def test_one_choice_for_the_whole_model_keeps_the_rest_of_the_recipe() -> None:
    trial, search = Highest(), SearchSpec(bits=(8, 4), sparsity=(0.5, 0.95), rule=("relative", "topk"))
    recipe = choose(trial, search, RECIPE, layers=3)
    assert trial.names == ["rule", "bits", "sparsity"]
    tensor = TensorSpec(bits=4)
    expected = AttentionSpec(
        TensorSpec(4, "tensor"), tensor, tensor, ProbsSpec(bits=4), rule="topk", sparsity=0.95
    )  # fmt: skip
    assert recipe == dataclasses.replace(RECIPE, attention=expected)


def test_what_is_chosen_by_layer_is_drawn_once_a_layer_and_the_rest_once() -> None:
    trial = Highest()
    search = SearchSpec(
        bits=(8, 4), probs_bits=(4, 6), sparsity=(0.5, 0.9), rule=("mass",), per_layer=("bits", "sparsity")
    )
    recipe = choose(trial, search, RECIPE, layers=2)
    layers = [f"layers.{index}.{name}" for index in range(2) for name in ("bits", "sparsity")]
    assert trial.names == ["rule", "probs_bits", *layers]
    assert list(recipe.layers) == ["0", "1"]
    for spec in recipe.layers.values():
        assert (spec.bits, spec.rule, spec.sparsity) == ({"q": 4, "k": 4, "v": 4, "p": 6}, "mass", 0.9)
        assert spec.q.granularity == "tensor"


def test_asked_work_is_what_bits_and_sparsity_leave() -> None:
    assert asked_work(RECIPE, 4) == pytest.approx((64 + 0.1 * 64) / 2048)
    own = dataclasses.replace(RECIPE, layers={"1": dataclasses.replace(RECIPE.attention, sparsity=0.5)})
    assert asked_work(own, 2) == pytest.approx((64 + 0.3 * 64) / 2048)


def test_a_recipe_has_a_folder_of_its_own() -> None:
    other = dataclasses.replace(RECIPE, attention=dataclasses.replace(RECIPE.attention, sparsity=0.91))
    assert trial_folder(Path("s"), RECIPE) == trial_folder(Path("s"), dataclasses.replace(RECIPE))
    assert trial_folder(Path("s"), RECIPE) != trial_folder(Path("s"), other)
    assert describe(other) == "8/8/8/8 bits, relative, sparsity 0.91"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"serch": {"bits": [4]}}, "serch: unknown key; did you mean 'search'"),
        ({"search": {"bit": [4]}}, "search.bit: unknown key; did you mean 'bits'"),
        ({"search": {"bits": [4]}, "recipe": {"data": {"tsak": "movie"}}}, "recipe.data.tsak: .* mean 'task'"),
        ({"search": {"bits": [9]}}, "search.bits.0: .*less than or equal to 8"),
        ({"search": {"rule": ["top"]}}, "search.rule.0: .*'topk'"),
        ({"search": {"sparsity": [0.9, 0.5]}}, "search: sparsity: the lowest first"),
        ({"search": {"bits": [4], "per_layer": ["sparsity"]}}, "per_layer: sparsity is not searched"),
        ({}, "search: nothing to search"),
        ({"search": {"bits": [4]}, "recipe": {"layers": {"0": {"sparsity": 0.5}}}}, "recipe.layers: a sweep chooses"),
        (
            {"search": {"rule": ["topk"]}, "recipe": {"attention": {"threshold": 0.1}}},
            "rule 'topk' keeps a count",
        ),
        (
            {"search": {"sparsity": [0.5, 0.9]}, "recipe": {"attention": {"threshold": 0.1}}},
            "threshold fixes what is pruned",
        ),
    ],
)
def test_a_mistake_is_named(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(SweepSpec, sweep)


def test_the_command_says_what_is_wrong_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("search: {bits: [4]}\ntrails: 3\n", encoding="utf-8")
    assert main(["sweep", str(file), "--output", str(tmp_path / "out")]) == 1
    assert "trails: unknown key; did you mean 'trials'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_read_overridden_and_written(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("search: {bits: [4, 8, null]}\n", encoding="utf-8")
    spec = load_spec(SweepSpec, file, ["recipe.compress.epochs=1", "search.sparsity=[0.5, 0.9]", "trials=7"])
    assert (spec.trials, spec.search.bits, spec.search.sparsity) == (7, (4, 8, None), (0.5, 0.9))
    assert spec.recipe.compress.epochs == 1
    file.write_text(dump_config(spec), encoding="utf-8")
    assert load_spec(SweepSpec, file) == spec
