"""Samples of attention on a few inputs at the end of a stage: `samples/STAGE.safetensors` of a run folder.

They are too large for the record: P as maps over a few short inputs, and the histogram that thresholds are fitted to.
Arrays only, with the tokens in the header. They are written and read without torch, so a report needs no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from attnpress.records.strict_json import parse_json
from attnpress.records.typed_json import build

FORMAT = 1
HEADER = "attnpress"


@dataclass(frozen=True)
class Samples:
    """A few inputs of one stage.

    Attributes:
        rule: pruning rule; the histograms count pairs in the unit that it compares.
        tokens: of each input.
        maps: by layer name, for each input: P, float16 [heads, queries, keys].
        histograms: by layer name: int64 [heads, bins]. A bin spans a quarter of an octave of P over its row maximum
            (rule "threshold": of P), from 1 downwards; for rule "mass", an equal share of the row's mass.
    """

    rule: str
    tokens: list[list[str]]
    maps: dict[str, list[NDArray[np.float16]]]
    histograms: dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class _About:
    """The header of the file."""

    format: int
    rule: str
    tokens: list[list[str]]
    layers: list[str]


def samples_bytes(samples: Samples) -> bytes:
    """The content of the file."""
    arrays: dict[str, NDArray[np.generic]] = {f"{name}|histogram": found for name, found in samples.histograms.items()}
    for name, maps in samples.maps.items():
        arrays |= {f"{name}|{index}": found for index, found in enumerate(maps)}
    whole = {name: np.ascontiguousarray(found) for name, found in arrays.items()}  # not views of larger buffers
    about = {"format": FORMAT, "rule": samples.rule, "tokens": samples.tokens, "layers": list(samples.histograms)}
    # A single entry, since several are written in any order, and equal samples must give equal bytes.
    return bytes(save(whole, metadata={HEADER: json.dumps(about)}))


def samples_file(run_folder: Path, stage: str) -> Path:
    """Path of the samples in a run folder."""
    return run_folder / "samples" / f"{stage}.safetensors"


def read_samples(run_folder: Path, stage: str) -> Samples | None:
    """The samples of a stage; None if there are none, or if this version does not know their format."""
    file = samples_file(run_folder, stage)
    try:
        with safe_open(file, framework="np") as opened:
            about = build(_About, parse_json((opened.metadata() or {})[HEADER]))
            if about.format != FORMAT:
                return None
            tokens, layers = about.tokens, about.layers
            maps = {name: [opened.get_tensor(f"{name}|{index}") for index in range(len(tokens))] for name in layers}
            histograms = {name: opened.get_tensor(f"{name}|histogram") for name in layers}
    except (OSError, SafetensorError, KeyError, ValueError):  # includes FieldError and JsonError
        return None
    samples = Samples(about.rule, tokens, maps, histograms)
    return samples if _is_whole(samples) else None


def _is_whole(samples: Samples) -> bool:
    """True if maps and histograms have the shapes that their tokens require, without NaN."""
    lengths = [len(tokens) for tokens in samples.tokens]
    for name, maps in samples.maps.items():
        histogram = samples.histograms[name]
        if histogram.ndim != 2 or not np.issubdtype(histogram.dtype, np.integer):
            return False
        for found, length in zip(maps, lengths, strict=True):
            if found.shape != (len(histogram), length, length) or not np.isfinite(found).all():
                return False
    return True
