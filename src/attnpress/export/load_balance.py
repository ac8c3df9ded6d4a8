"""Cycles of P V on parallel lanes, from the survivors of real rows, by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from attnpress.core.lanes import LANES, NO_CYCLES, PIECE, lane_cycles
from attnpress.export.sequences import AttendedSequence, by_layer
from attnpress.records.lanes import LaneRecord, LayerLanes


def load_balance(sequences: Iterable[AttendedSequence], task: str) -> LaneRecord:
    """Count the cycles of each layer.

    Args:
        sequences: of all layers.
        task: source of the sequences.
    """
    layers = by_layer(sequences)
    first = next(iter(layers.values()))
    return LaneRecord(
        task,
        len(first),
        sum(one.codes.shape[1] for one in first),
        PIECE,
        [_layer(name, found) for name, found in layers.items()],
    )


def _layer(name: str, sequences: list[AttendedSequence]) -> LayerLanes:
    heads = [rows for one in sequences for rows in one.survivors.tolist()]
    cycles = {str(lanes): asdict(sum((lane_cycles(rows, lanes) for rows in heads), NO_CYCLES)) for lanes in LANES}
    return LayerLanes(name, sum(map(sum, heads)), cycles)
