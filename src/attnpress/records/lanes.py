"""Record of a load balance: cycles of P V by layer, number of lanes and schedule. Plain JSON, `lanes.json`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from attnpress.records.reading import RecordError, Some, Whole, read_json

FORMAT = 1
FILE = "lanes.json"
SCHEDULES = ("in_order", "packed", "split", "ideal")
"""Fields of `core.lanes.LaneCycles`."""


@dataclass(frozen=True)
class LayerLanes:
    """Load balance of one layer.

    Attributes:
        name: of the module.
        survivors: summed over heads and sequences.
        cycles: by number of lanes, by schedule.
    """

    name: str
    survivors: Whole
    cycles: dict[str, dict[str, Whole]]


@dataclass(frozen=True)
class LaneRecord:
    """Load balance of a model.

    Attributes:
        task: source of the texts.
        sequences, tokens: their numbers.
        piece: survivors per piece of a split row.
        layers: in the order of the model.
    """

    task: str
    sequences: Some
    tokens: Some
    piece: Some
    layers: list[LayerLanes]
    format: int = FORMAT

    @property
    def lanes(self) -> list[int]:
        """Numbers of lanes, fewest first."""
        return sorted(map(int, self.layers[0].cycles)) if self.layers else []

    def total(self, lanes: int, schedule: str) -> int:
        """Sum of the cycles of all layers."""
        return sum(layer.cycles[str(lanes)][schedule] for layer in self.layers)


def read_lanes(file: Path) -> LaneRecord:
    """Read the record.

    Raises:
        RecordError: the file is missing, damaged or of another format.
    """
    found = read_json(file, FORMAT, LaneRecord)
    for layer in found.layers:
        for lanes in layer.cycles:
            if not re.fullmatch(r"[1-9]\d{0,8}", lanes):
                raise RecordError(f"{file}: damaged (layer {layer.name!r}): {lanes!r:.40} is not a number of lanes")
    wanted = {(lanes, schedule) for lanes in found.lanes for schedule in SCHEDULES}
    for layer in found.layers:
        if {(int(lanes), each) for lanes, cycles in layer.cycles.items() for each in cycles} != wanted or not wanted:
            raise RecordError(f"{file}: damaged (layer {layer.name!r}): it lacks the cycles of some lanes or schedules")
    return found
