"""Tiles by their survivors, and the models of them: against drawings, SciPy, and masks whose model is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attnpress.export.density import (
    distances,
    fits,
    fixed,
    hypergeometric,
    layer_density,
    tile_histogram,
    write_density,
)
from tests.export.factories import LAYERS, made, sequences


def test_tiles_are_counted_where_they_are_whole() -> None:
    one = made(["xx..x", "x...x", "....x", "xxxxx", "xxxxx"])
    assert tile_histogram(one, 2, 2).tolist() == [1, 0, 2, 1, 0]
    causal = ["v....", "vv...", "vvv..", "vvvv.", "vvvvv"]
    assert tile_histogram(made(["x....", "xx...", ".....", "....x", "....."], causal), 2, 2).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(("size", "population", "marked"), [(16, 100, 7), (4, 4, 2), (16, 16, 16), (8, 3000, 0)])
def test_the_hypergeometric_model_is_that_of_scipy(size: int, population: int, marked: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.hypergeom(population, marked, size).pmf(range(size + 1))
    assert hypergeometric(size, population, marked) == pytest.approx(expected.tolist(), abs=1e-9)


def test_the_fixed_model_has_the_mean() -> None:
    assert fixed(4, 0.5) == [0, 0, 1, 0, 0]
    assert fixed(4, 0.3) == pytest.approx([0, 0.8, 0.2, 0, 0])
    assert fixed(4, 1.0) == [0, 0, 0, 0, 1]


def test_distances_are_0_for_the_same_and_1_for_disjoint_ones() -> None:
    assert distances([0.5, 0.5], [0.5, 0.5]) == {"total_variation": 0, "kolmogorov_smirnov": 0}
    assert distances([1.0, 0.0], [0.0, 1.0]) == {"total_variation": 1, "kolmogorov_smirnov": 1}
    assert distances([0.5, 0.3, 0.2], [0.2, 0.3, 0.5])["kolmogorov_smirnov"] == pytest.approx(0.3)


def test_random_masks_fit_the_hypergeometric_model_and_regular_ones_the_fixed_one() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(256, 256, generator=generator) < 0.1
    random = layer_density([made(["".join("x" if x else "." for x in row) for row in mask.tolist()])])
    models = random["tiles"]["4x4"]["models"]
    assert models["hypergeometric"]["total_variation"] < 0.03
    assert models["fixed"]["total_variation"] > 0.2
    regular = layer_density([made(["x..." * 16] * 64)])["tiles"]["1x16"]["models"]
    assert regular["fixed"]["total_variation"] == 0
    assert regular["hypergeometric"]["total_variation"] > 0.5


def test_a_shape_without_room_is_left_out() -> None:
    assert layer_density([made(["x.", ".x"])])["tiles"] == {}


def test_the_file_says_what_the_masks_do(tmp_path: Path) -> None:
    found = write_density(sequences(seeds=(5, 6)), tmp_path)
    assert json.loads((tmp_path / "density.json").read_text("utf-8")) == found
    for layer in LAYERS:
        said = found["layers"][layer]
        own = [one for one in sequences(seeds=(5, 6)) if one.layer == layer]
        assert said["survivors"] == sum(int((one.codes > 0).sum()) for one in own)
        assert said["density"] == said["survivors"] / said["pairs"]
        for tile in said["tiles"].values():
            assert len(tile["histogram"]) == tile["tile_pairs"] + 1
            assert sum(tile["histogram"]) == tile["tiles"]
            assert tile == fits(tile["histogram"], tile["models"]["hypergeometric"]["population"], said["density"])
