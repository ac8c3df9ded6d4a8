"""Figures of attention from the samples beside a record: histograms of P with thresholds, and maps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnpress.records.run import HeadRecord, StageRecord
from attnpress.records.samples import Samples
from attnpress.report.figures import Drawing
from attnpress.report.inputs import AFTER, Run

BINS_PER_OCTAVE = 4
UNITS = {
    "mass": "share of the row's mass that ranks before the pair",
    "threshold": "P, in octaves below 1",
}
RELATIVE = "P over its row maximum, in octaves below 1"

Head = tuple[int, int]
"""Layer and head, from 0."""


def chosen_heads(stage: StageRecord) -> list[Head]:
    """The heads with the smallest, median and largest error of the output; by sparsity if errors are unknown."""

    def rank(place: Head) -> float:
        head = stage.layers[place[0]].heads[place[1]]
        return head.errors.get("output", head.sparsity)

    heads = [(layer, head) for layer, one in enumerate(stage.layers) for head in range(len(one.heads))]
    ranked = sorted(heads, key=rank)
    return list(dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]]))


def histogram_drawings(number: int, run: Run) -> Iterator[Drawing]:
    """Distribution of P in the chosen heads, with the threshold of each."""
    from attnpress.report import plots

    stage, after = run.record.stage(AFTER), run.after
    if stage is None or after is None:
        return
    for layer, head in chosen_heads(stage):
        name, record = stage.layers[layer].name, stage.layers[layer].heads[head]
        counts = after.histograms[name][head]
        dense = None if run.before is None else run.before.histograms[name][head]
        used = _last_used(counts, dense)
        edges = np.arange(used + 1) / (len(counts) if after.rule == "mass" else BINS_PER_OCTAVE)
        before = None if dense is None else _shares(dense, used)
        at, unit = threshold_at(after.rule, record.threshold), UNITS.get(after.rule, RELATIVE)
        figure = plots.threshold_histogram(edges, before, _shares(counts, used), at, unit)
        title = f"P in layer {layer}, head {head}"
        caption = "Pairs to the left of the line are pruned. A tall left part means many small probabilities."
        words = _histogram_words(after.rule, record)
        yield Drawing(f"histogram-{number}-{layer}-{head}", title, caption, words, figure)


def threshold_at(rule: str, threshold: float) -> float | None:
    """A recorded threshold on the axis of the histogram; None if the rule has none or it prunes nothing."""
    if rule in ("topk", "nm") or threshold <= 0:
        return None
    return threshold if rule == "mass" else -math.log2(threshold)


def map_drawings(number: int, run: Run) -> Iterator[Drawing]:
    """P of the chosen heads on each recorded input, for the dense and the compressed model."""
    from attnpress.report import plots

    stage, before, after = run.record.stage(AFTER), run.before, run.after
    if stage is None or before is None or after is None:
        return
    for layer, head in chosen_heads(stage):
        name = stage.layers[layer].name
        for index, tokens in enumerate(after.tokens):
            dense, pruned = (_map(samples, name, index, head) for samples in (before, after))
            figure = plots.attention_maps(dense, pruned, tokens, ("dense model", "compressed and pruned"))
            kept = int((pruned > 0).sum())
            words = (
                f"Attention of layer {layer}, head {head} on “{' '.join(tokens)}”: the dense model gives P of 0.01 or "
                f"more to {int((dense >= 0.01).sum())} of {dense.size} pairs; the compressed one leaves {kept}, "
                f"{kept / len(pruned):.1f} keys per query."
            )
            title = f"Layer {layer}, head {head}, input {index + 1}"
            caption = "Does the pattern survive? Rows are queries, columns are keys; grey pairs are skipped."
            yield Drawing(f"map-{number}-{layer}-{head}-{index}", title, caption, words, figure)


def _map(samples: Samples, layer: str, index: int, head: int) -> NDArray[Any]:
    return np.asarray(samples.maps[layer][index][head])


def _last_used(*counts: NDArray[Any] | None) -> int:
    """Bins up to the last that holds a thousandth of the pairs, without the long empty tail."""
    ends = [
        np.flatnonzero(found >= 1e-3 * found.sum())[-1] + 1 for found in counts if found is not None and found.any()
    ]
    return int(max(ends, default=1))


def _shares(counts: NDArray[Any], used: int) -> NDArray[Any]:
    return np.asarray(counts[:used] / max(1, counts.sum()))


def _histogram_words(rule: str, head: HeadRecord) -> str:
    fitted = f"threshold {head.threshold:.3g}" if threshold_at(rule, head.threshold) is not None else "no threshold"
    return (
        f"Rule “{rule}”, {fitted}: {head.pruned:.1%} of valid pairs pruned, {head.keys_per_row:.2f} keys kept per "
        "query on the whole evaluation set; the bars are a few of its rows."
    )
