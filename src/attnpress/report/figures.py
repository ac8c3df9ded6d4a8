"""Which figures a report has, from records to drawings with a title and a description in words."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpress.records.run import StageRecord
from attnpress.report.inputs import AFTER, Group, Run
from attnpress.report.render import TITLES

if TYPE_CHECKING:
    from attnpress.report.plots import Line, Plot

WORK = {"multiply-accumulates": "macs", "bit operations": "bit_operations", "bytes of P": "bytes"}
ERRORS = {
    "q": "error of quantizing Q", "k": "error of quantizing K", "v": "error of quantizing V",
    "p": "error of P, pruning included", "output": "error of the head's output, pruning included",
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure: its file name, what it shows, and the same in words for those who do not see it."""

    name: str
    title: str
    description: str
    figure: Plot


def metric_drawings(groups: Sequence[Group]) -> Iterator[Drawing]:
    """Metric against sparsity, one figure a recipe."""
    from attnpress.report import plots

    for number, group in enumerate(groups, start=1):
        lines, words = [], []
        record = group.records[0]
        for series, name in enumerate(TITLES):
            stages = [stage for one in group.records if (stage := one.stage(name))]
            if stages:
                scores = [stage.metrics[record.headline] for stage in stages]
                lines.append(plots.Line(TITLES[name], [stage.sparsity for stage in stages], scores, series))
                words.append(f"{TITLES[name]}: {mean_and_spread(scores)} at sparsity {_mean(lines[-1].x):.3f}")
        if lines:
            figure = plots.metric_against_sparsity(lines, f"{record.headline} (points)", record.majority)
            title = _capital(f"{record.headline} against sparsity{_suffix(group, groups)}")
            yield Drawing(f"metric-{number}", title, "; ".join(words) + ".", figure)


def training_drawings(number: int, group: Group) -> Iterator[Drawing]:
    """Loss, sparsity asked and achieved, and the metric, by step, of every trained stage and seed."""
    from attnpress.report import plots

    wanted = {
        "loss": ("Loss", ("loss",)),
        "sparsity": ("Sparsity asked and achieved", ("sparsity_asked", "sparsity_achieved")),
        "metric": (f"{group.records[0].headline} while training", (f"eval_{group.records[0].headline}",)),
    }
    for name, (title, keys) in wanted.items():
        lines = [line for key in keys for line in _training_lines(group, key)]
        if lines:
            figure = plots.curves(lines, name if name != "metric" else title, unit_range=name == "sparsity")
            yield Drawing(f"training-{name}-{number}", _capital(title), f"By step. {describe_curves(lines)}.", figure)


def describe_curves(lines: Sequence[Line]) -> str:
    """Where the curves of each label begin and end, in words; those of several runs by their mean."""
    words = []
    for label in dict.fromkeys(line.label for line in lines):
        same = [line for line in lines if line.label == label]
        first, last = (_mean([line.y[place] for line in same]) for place in (0, -1))
        words.append(f"{label}: from {first:.3g} to {last:.3g}" + (f", mean of {len(same)} runs" * (len(same) > 1)))
    return "; ".join(words)


def _training_lines(group: Group, key: str) -> list[Line]:
    from attnpress.report import plots

    lines = []
    for record in group.records:
        for series, name in enumerate(TITLES):
            entries = [entry for entry in record.training.get(name, []) if key in entry]
            label = {"sparsity_asked": "asked", "sparsity_achieved": "achieved in the step"}.get(key, TITLES[name])
            if entries:
                steps, values = ([entry[field] for entry in entries] for field in ("step", key))
                color = {"sparsity_asked": 0, "sparsity_achieved": 1}.get(key, series)
                lines.append(plots.Line(label, steps, values, color, dashed=key == "sparsity_asked"))
    return lines


def head_drawings(number: int, run: Run) -> Iterator[Drawing]:
    """Maps of layers by heads of the compressed stage: sparsity, threshold, scales, errors."""
    from attnpress.report import plots

    stage = run.record.stage(AFTER)
    for name, (title, values) in head_values(stage).items() if stage else ():
        figure = plots.head_map(values)
        yield Drawing(f"heads-{name}-{number}", _capital(title), describe_heads(values), figure)


def head_values(stage: StageRecord) -> dict[str, tuple[str, list[list[float]]]]:
    """What can be drawn a head, by name: title, and values by layer; old records lack the errors."""
    found: dict[str, tuple[str, list[list[float]]]] = {}
    for name in ("sparsity", "threshold"):
        values = [[getattr(head, name) for head in layer.heads] for layer in stage.layers]
        if any(any(row) for row in values):
            found[name] = (f"{name} of each head", values)
    for name in ("q", "k", "v"):
        values = [layer.scales[name] for layer in stage.layers if name in layer.scales]
        if values and all(len(row) <= len(layer.heads) for row, layer in zip(values, stage.layers, strict=False)):
            found[f"scale-{name}"] = (f"scale of {name.upper()}", values)
    for name, title in ERRORS.items():
        values = [[head.errors[name] for head in layer.heads if name in head.errors] for layer in stage.layers]
        if values and all(values):
            found[f"error-{name}"] = (title, values)
    return found


def describe_heads(values: Sequence[Sequence[float]]) -> str:
    """Extent, extremes and mean of a map of heads, in words."""
    flat = [(value, layer, head) for layer, row in enumerate(values) for head, value in enumerate(row)]
    (low, *at_low), (high, *at_high) = min(flat), max(flat)
    return (
        f"{len(values)} layers by {max(map(len, values))} heads: lowest {low:.3g} in layer {at_low[0]}, head "
        f"{at_low[1]}; highest {high:.3g} in layer {at_high[0]}, head {at_high[1]}; "
        f"mean {_mean([value for value, *_ in flat]):.3g}."
    )


def work_drawings(groups: Sequence[Group]) -> Iterator[Drawing]:
    """Remaining work of each stage as percent of the dense one's, one figure a recipe."""
    from attnpress.report import plots

    for number, group in enumerate(groups, start=1):
        rows = {TITLES[stage.name]: remaining_work(stage) for stage in group.records[0].stages if stage.work}
        if rows:
            words = "; ".join(
                f"{name}: " + ", ".join(f"{value:.3g} % of the {what}" for what, value in row.items())
                for name, row in rows.items()
            )
            figure = plots.bars(rows, "percent of dense attention's", reference=100)
            title = f"Remaining work of attention{_suffix(group, groups)}"
            yield Drawing(f"work-{number}", title, words + ".", figure)


def remaining_work(stage: StageRecord) -> dict[str, float]:
    """Percent of the dense operations and bytes that a stage leaves, by name."""
    work = {"macs_dense": stage.macs_dense, "macs_remaining": stage.macs_remaining, **stage.work}
    return {name: 100 * work[f"{key}_remaining"] / work[f"{key}_dense"] for name, key in WORK.items()}


def speed_drawings(timings: Sequence[Mapping[str, Any]]) -> Iterator[Drawing]:
    """How many times faster than each peer, by length and threads."""
    from attnpress.report import plots

    for peer in dict.fromkeys(row["peer"] for row in timings):
        rows = {
            f"{row['seq_len']} tokens, {row['threads']} thread{'s' * (row['threads'] != 1)}, "
            f"sparsity {row['sparsity']:.2f}": {f"times as fast as {peer}": row["ratio"]}
            for row in timings
            if row["peer"] == peer
        }
        words = "; ".join(f"{name}: {value:.3g}" for name, row in rows.items() for value in row.values())
        figure = plots.bars(rows, f"time of {peer} over ours", reference=1.0)
        title = f"Speed of one attention call against {peer}"
        yield Drawing(f"speed-{peer}", title, f"Time of {peer} over time of the compiled kernel. {words}.", figure)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there is more than one value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{_mean(values):.2f}{spread}"


def _suffix(group: Group, groups: Sequence[Group]) -> str:
    return f": {group.label}" if len(groups) > 1 else ""


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
