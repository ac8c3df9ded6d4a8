"""sampling: record the attention of a bound model on a few evaluation rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from attnpress.config import RuleName
from attnpress.core.call import AttentionCall
from attnpress.core.probe import Probe, probe, relative_error
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import probed
from attnpress.models.outputs import outputs
from attnpress.records.samples import Samples
from attnpress.tasks import TaskData

ROWS, BATCH = 32, 4
"""Number of evaluation rows for errors and histograms, and rows per batch."""

MAPS, MAP_TOKENS, MAP_CHOICE = 3, 18, 200
"""Inputs drawn as maps: of the first 200 evaluation rows, those with a length closest to 18 tokens, whose labels fit a
page."""

HeadFigures = dict[str, list[dict[str, Any]]]
"""By layer name, for each head: values of fields of its `HeadRecord`."""


def take_samples(model: nn.Module, data: TaskData, tokenizer: Any, rule: RuleName) -> tuple[Samples, HeadFigures]:
    """Maps, histograms and errors of a bound model on the first evaluation rows; the same on every rank.

    Args:
        model: bound; calibrated if its spec is not dense.
        tokenizer: names the tokens of the maps.
        rule: of the run; a dense stage also counts its pairs in the unit of this rule.

    Returns:
        The samples, and if anything is compressed, the errors and the pruned mass of each head.
    """
    totals, chosen = Totals(rule), _short_rows(data)
    for begin in range(0, min(ROWS, len(data.eval)), BATCH):
        _show(model, data, range(begin, min(begin + BATCH, ROWS, len(data.eval))), totals)
    maps = [Maps(rule) for _ in chosen]
    for row, look in zip(chosen, maps, strict=True):
        _show(model, data, [row], look)
    tokens = [tokenizer.convert_ids_to_tokens(data.eval[row]["input_ids"]) for row in chosen]
    by_layer = {name: [look.found[name] for look in maps] for name in totals.histograms}
    counts = {name: found.round().long().cpu().numpy() for name, found in totals.histograms.items()}
    return Samples(rule, tokens, by_layer, counts), totals.figures()


class Totals:
    """Sums over calls, by layer: the histogram of pairs [H, bins], errors [2, H] and the pruned mass."""

    def __init__(self, rule: RuleName) -> None:
        self.rule = rule
        self.histograms: dict[str, Tensor] = {}
        self.losses: dict[str, dict[str, Tensor]] = {}
        self.masses: dict[str, Tensor] = {}

    def __call__(self, name: str, state: CompressedAttention, call: AttentionCall) -> None:
        """Add one call."""
        found = probe_state(state, call, self.rule)
        self.histograms[name] = self.histograms.get(name, 0) + found.histogram
        if not state.spec.is_dense:
            before = self.losses.get(name, {})
            self.losses[name] = {key: before.get(key, 0) + loss for key, loss in found.loss.items()}
            self.masses[name] = self.masses.get(name, 0) + found.mass

    def figures(self) -> HeadFigures:
        """The relative error of each matrix and the pruned share of P, by layer and head."""
        found = {}
        for name, losses in self.losses.items():
            columns = [relative_error(loss).tolist() for loss in losses.values()]
            errors = [dict(zip(losses, row, strict=True)) for row in zip(*columns, strict=True)]
            pruned, whole = self.masses[name]
            masses = (pruned / whole.clamp(min=1e-30)).clamp(max=1).tolist()
            found[name] = [{"errors": a, "pruned_mass": b} for a, b in zip(errors, masses, strict=True)]
        return found


class Maps:
    """P of one row as float16 [heads, queries, keys], by layer; the first call of a shared layer."""

    def __init__(self, rule: RuleName) -> None:
        self.rule = rule
        self.found: dict[str, NDArray[np.float16]] = {}

    def __call__(self, name: str, state: CompressedAttention, call: AttentionCall) -> None:
        """Store one call."""
        if name not in self.found:
            self.found[name] = probe_state(state, call, self.rule).after[0].half().cpu().numpy()


def probe_state(state: CompressedAttention, call: AttentionCall, rule: RuleName | None = None) -> Probe:
    """Probe a call of a bound module with the module's own compression."""
    return probe(call if rule is None else call.with_(spec=dataclasses.replace(state.spec, rule=rule)))


def _show(model: nn.Module, data: TaskData, rows: Iterable[int], look: Totals | Maps) -> None:
    with probed(model, look):
        for _ in outputs(model, [data.collate([data.eval[row] for row in rows])]):
            pass


def _short_rows(data: TaskData) -> list[int]:
    lengths = [len(ids) for ids in data.eval[:MAP_CHOICE]["input_ids"]]
    return sorted(sorted(range(len(lengths)), key=lambda row: abs(lengths[row] - MAP_TOKENS))[:MAPS])
