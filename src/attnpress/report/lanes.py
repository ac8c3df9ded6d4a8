"""Load balance of P V over lanes: the figure of a run, and the table of the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from attnpress.records.lanes import LaneRecord
from attnpress.report.figures import Drawing

WORDS = {"in_order": "rows in order", "packed": "rows packed", "split": "rows split and packed"}


def lane_drawings(number: int, record: LaneRecord | None) -> Iterator[Drawing]:
    """Cycles of P V over the ideal number, by layer, with a panel for each number of lanes."""
    from attnpress.report import plots

    if record is None or not record.layers:
        return
    layers = list(range(len(record.layers)))
    panels = {
        f"{lanes} lanes": [
            plots.Line(words, layers, [times_ideal(record, layer, lanes, schedule) for layer in layers], series)
            for series, (schedule, words) in enumerate(WORDS.items())
        ]
        for lanes in record.lanes
    }
    told = "; ".join(
        f"{lanes} lanes: "
        + ", ".join(
            f"{words} {record.total(lanes, schedule) / max(1, record.total(lanes, 'ideal')):.2f}"
            for schedule, words in WORDS.items()
        )
        for lanes in record.lanes
    )
    figure = plots.grid_of_lines(panels, "layer", "cycles over ideal")
    title = f"Load balance of P V on {record.sequences} sequences of {record.task}"
    caption = "1 is perfect balance. The gap between the lines is what packing and splitting rows recover."
    words = f"Cycles over the ideal ones, all layers together. {told}."
    yield Drawing(f"lanes-{number}", title, caption, words, figure)


def times_ideal(record: LaneRecord, layer: int, lanes: int, schedule: str) -> float:
    """Cycles of a layer relative to a perfect balance; 1 is the best."""
    cycles = record.layers[layer].cycles[str(lanes)]
    return cycles[schedule] / max(1, cycles["ideal"])


def lanes_markdown(record: LaneRecord) -> str:
    """Cycles of each layer and in total, for every number of lanes."""
    heads = ("in order", "packed", "split", "ideal")
    lines = [
        "| layer | " + " | ".join(f"{lanes} lanes: {' / '.join(heads)}" for lanes in record.lanes) + " |",
        "| --- |" + " --- |" * len(record.lanes),
    ]
    for number, layer in enumerate(record.layers):
        cells = [" / ".join(f"{count:,}" for count in _in_turn(layer.cycles[str(lanes)])) for lanes in record.lanes]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    totals = [" / ".join(f"{record.total(lanes, each):,}" for each in (*WORDS, "ideal")) for lanes in record.lanes]
    lines.append("| all | " + " | ".join(totals) + " |")
    busy = [
        " / ".join(f"{record.total(lanes, 'ideal') / max(1, record.total(lanes, each)):.0%}" for each in WORDS)
        for lanes in record.lanes
    ]
    return "\n".join([*lines, "| lanes busy | " + " | ".join(busy) + " |"])


def _in_turn(cycles: dict[str, int]) -> list[int]:
    return [cycles[each] for each in (*WORDS, "ideal")]
