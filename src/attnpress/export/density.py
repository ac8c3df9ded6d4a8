"""`--to density`: occupancy of tiles by survivors, and the fit of the density models of simulators.

The models are those of Sparseloop (Wu et al., MICRO 2022): "fixed" (every tile has the mean density) and
"hypergeometric" (survivors at random), compared with the measured histogram.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpress.export.sequences import AttendedSequence, by_layer
from attnpress.files import write_text

FILE, FORMAT = "density.json", 1
TILES = ((1, 16), (4, 4), (16, 16))
"""Rows and keys of a tile."""

NOTES = (
    "A tile counts if it lies whole in a sequence and all of its pairs are valid; histogram[k] tiles have k survivors.",
    "total_variation is half the summed difference between the shares measured and the model's, 0 to 1; "
    "kolmogorov_smirnov the largest difference of their running sums.",
)


def write_density(sequences: Iterable[AttendedSequence], folder: Path) -> dict[str, Any]:
    """Write `density.json`; returns its content."""
    layers = {name: layer_density(found) for name, found in by_layer(sequences).items()}
    found = {"format": FORMAT, "layers": layers}
    write_text(folder / FILE, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def layer_density(sequences: Sequence[AttendedSequence]) -> dict[str, Any]:
    """Density of one layer, with the histogram per tile shape and the fit of each model.

    Returns:
        pairs, survivors (of all heads), density, and tiles: by "ROWSxKEYS" the result of `fits`. A shape larger than
        every sequence is left out.
    """
    pairs, survivors = (sum(int(getattr(one, name).sum()) for one in sequences) for name in ("pairs", "survivors"))
    matrices = sum(one.codes.shape[0] for one in sequences)
    population = round(pairs / max(1, matrices))
    found = {}
    for rows, keys in TILES:
        histogram = torch.stack([tile_histogram(one, rows, keys) for one in sequences]).sum(0)
        if int(histogram.sum()):
            found[f"{rows}x{keys}"] = fits(histogram.tolist(), population, survivors / max(1, pairs))
    return {"pairs": pairs, "survivors": survivors, "density": survivors / max(1, pairs), "tiles": found}


def tile_histogram(sequence: AttendedSequence, rows: int, keys: int) -> Tensor:
    """Number of whole tiles of valid pairs with 0, 1, ... rows * keys survivors; int64 [rows * keys + 1]."""
    filled, valid = (
        _tile_sums(mask, rows, keys) for mask in (sequence.codes > 0, sequence.valid.expand_as(sequence.codes))
    )
    return torch.bincount(filled[valid == rows * keys], minlength=rows * keys + 1)


def _tile_sums(mask: Tensor, rows: int, keys: int) -> Tensor:
    whole = mask[:, : mask.shape[1] // rows * rows, : mask.shape[2] // keys * keys].long()
    found: Tensor = whole.unflatten(1, (-1, rows)).unflatten(-1, (-1, keys)).sum((2, 4)).flatten()
    return found


def fits(histogram: Sequence[int], population: int, density: float) -> dict[str, Any]:
    """Compare a measured histogram with the models.

    Args:
        histogram: tiles by their survivors, from 0 to the size of a tile.
        population: mean number of pairs of one head on one sequence.
        density: share of pairs that survive.
    """
    size, total = len(histogram) - 1, sum(histogram)
    measured = [count / total for count in histogram]
    marked = round(density * max(population, size))
    models = {
        "fixed": fixed(size, density),
        "hypergeometric": hypergeometric(size, max(population, size), marked),
    }
    parameters: dict[str, dict[str, float]] = {
        "fixed": {"density": density},
        "hypergeometric": {"population": max(population, size), "survivors": marked},
    }
    return {
        "tile_pairs": size,
        "tiles": total,
        "histogram": list(histogram),
        "empty": measured[0],
        "models": {
            name: {**parameters[name], "empty": model[0], **distances(measured, model)}
            for name, model in models.items()
        },
    }


def fixed(size: int, density: float) -> list[float]:
    """Every tile has the mean number of survivors; a fractional mean is split between its two neighbours."""
    low = min(size - 1, math.floor(size * density))
    share = size * density - low
    return [1 - share if k == low else share if k == low + 1 else 0.0 for k in range(size + 1)]


def hypergeometric(size: int, population: int, marked: int) -> list[float]:
    """Distribution of survivors in a tile of `size` pairs if `marked` of `population` pairs survive at random."""
    every = _log_choose(population, size)
    return [
        math.exp(_log_choose(marked, k) + _log_choose(population - marked, size - k) - every)
        if max(0, size - population + marked) <= k <= marked
        else 0.0
        for k in range(size + 1)
    ]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def distances(measured: Sequence[float], model: Sequence[float]) -> dict[str, float]:
    """Distances between two distributions over 0, 1, ...; 0 if they are equal, 1 if they are disjoint."""
    gaps = [a - b for a, b in zip(measured, model, strict=True)]
    return {
        "total_variation": sum(map(abs, gaps)) / 2,
        "kolmogorov_smirnov": max(map(abs, itertools.accumulate(gaps))),
    }
