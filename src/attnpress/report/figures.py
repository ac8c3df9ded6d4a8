"""The figures of a report: from records to drawings with a title and a description in words."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpress.records.run import StageRecord
from attnpress.report.inputs import AFTER, Group, Run
from attnpress.report.noise import WATCHED_ROWS, standard_error
from attnpress.report.render import TITLES

if TYPE_CHECKING:
    from attnpress.report.plots import Band, Line, Plot

WORK = {"multiply-accumulates": "macs", "bit operations": "bit_operations", "bytes of P": "bytes"}
ERRORS = {
    "q": "quantization error of Q",
    "k": "quantization error of K",
    "v": "quantization error of V",
    "p": "error of P, pruning included",
    "output": "output error, pruning included",
}
HEAD_CAPTIONS = {
    "sparsity": "Share of pairs that each head skips. Dark heads read many keys.",
    "threshold": "Pairs below it are pruned. Heads with a high threshold are flat.",
    "mass": "Share of exact P on pairs without a P code: lost without a tail. Bright heads are flat.",
    "scale": "Step between two codes. A bright head has large values and a coarse grid.",
    "error": "0 is exact, 1 is as wrong as zeros. Bright heads are candidates for more bits.",
    "error-p": "0 is exact, 1 is as wrong as zeros. Bright heads lose most to pruning.",
    "error-output": "0 is exact, 1 is as wrong as an output of zeros. Bright heads lose most.",
}
"""What to look for in a map of heads, by its name or the beginning of it."""


SCORE_CAPTION = "Right is sparser, up is better. Marks inside the grey band differ from dense by no more than chance."
TRAINING_CAPTIONS = {
    "loss": "Falls as the model learns; it may rise while the sparsity rises, and should fall again after that.",
    "sparsity": "Achieved should follow asked. A gap means that thresholds lag behind the model.",
    "metric": "Watched on at most 200 rows. The grey band is one standard error of the dense score on as many rows.",
}
WORK_CAPTION = "The dotted line is dense attention. Shorter bars are less work; scores keep half of the MACs."


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: of its file.
        title: what it shows.
        caption: what to look for; shown below the title.
        description: its numbers in words, for readers who cannot see it.
        figure: the drawing.
    """

    name: str
    title: str
    caption: str
    description: str
    figure: Plot


def metric_drawings(groups: Sequence[Group]) -> Iterator[Drawing]:
    """Metric against sparsity, one figure per recipe."""
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
            noise = dense_noise(group)
            figure = plots.metric_against_sparsity(lines, f"{record.headline} (points)", record.majority, noise)
            title = _capital(f"{record.headline} against sparsity{_suffix(group, groups)}")
            yield Drawing(f"metric-{number}", title, SCORE_CAPTION, "; ".join(words) + ".", figure)


def dense_noise(group: Group, most_rows: int | None = None) -> Band | None:
    """One standard error of the dense model's score, from the evaluation rows; None if either is unknown.

    Args:
        group: runs that differ in their seed.
        most_rows: number of rows, if the score is computed on a part of them.
    """
    from attnpress.report.plots import Band

    record = group.records[0]
    scores = [stage.metrics[record.headline] for one in group.records if (stage := one.stage("dense"))]
    rows = record.provenance.get("rows", {}).get("eval")
    if not scores or not rows:
        return None
    return Band(_mean(scores), standard_error(record.headline, _mean(scores), min(rows, most_rows or rows)))


def training_drawings(number: int, group: Group) -> Iterator[Drawing]:
    """Loss, requested and achieved sparsity, and the metric, by step, for every trained stage and seed."""
    from attnpress.report import plots

    wanted = {
        "loss": ("Loss", ("loss",)),
        "sparsity": ("Sparsity asked and achieved", ("sparsity_asked", "sparsity_achieved")),
        "metric": (f"{group.records[0].headline} while training", (f"eval_{group.records[0].headline}",)),
    }
    for name, (title, keys) in wanted.items():
        lines = [line for key in keys for line in _training_lines(group, key)]
        if lines:
            noise = dense_noise(group, WATCHED_ROWS) if name == "metric" else None
            label = name if name != "metric" else title
            figure = plots.curves(lines, label, unit_range=name == "sparsity", noise=noise)
            words = f"By step. {describe_curves(lines)}."
            yield Drawing(f"training-{name}-{number}", _capital(title), TRAINING_CAPTIONS[name], words, figure)


def describe_curves(lines: Sequence[Line]) -> str:
    """First and last values of the curves of each label in words, averaged over runs."""
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
        caption = HEAD_CAPTIONS.get(name) or HEAD_CAPTIONS[name.partition("-")[0]]
        yield Drawing(f"heads-{name}-{number}", _capital(title), caption, describe_heads(values), figure)


def head_values(stage: StageRecord) -> dict[str, tuple[str, list[list[float]]]]:
    """Quantities by layer and head, by name: title and values. Old records have no errors."""
    found: dict[str, tuple[str, list[list[float]]]] = {}
    for name in ("sparsity", "threshold"):
        values = [[getattr(head, name) for head in layer.heads] for layer in stage.layers]
        if any(any(row) for row in values):
            found[name] = (f"{name} of each head", values)
    masses = [[head.pruned_mass for head in layer.heads if head.pruned_mass is not None] for layer in stage.layers]
    if masses and all(masses):
        found["mass"] = ("pruned share of P", masses)
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
    """Shape, extremes and mean of a map of heads, in words."""
    flat = [(value, layer, head) for layer, row in enumerate(values) for head, value in enumerate(row)]
    (low, *at_low), (high, *at_high) = min(flat), max(flat)
    return (
        f"{len(values)} layers by {max(map(len, values))} heads: lowest {low:.3g} in layer {at_low[0]}, head "
        f"{at_low[1]}; highest {high:.3g} in layer {at_high[0]}, head {at_high[1]}; "
        f"mean {_mean([value for value, *_ in flat]):.3g}."
    )


def work_drawings(groups: Sequence[Group]) -> Iterator[Drawing]:
    """Remaining work of each stage in percent of the dense one, one figure per recipe."""
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
            yield Drawing(f"work-{number}", title, WORK_CAPTION, words + ".", figure)


def remaining_work(stage: StageRecord) -> dict[str, float]:
    """Percent of the dense operations and bytes that remain after a stage, by name."""
    work = {"macs_dense": stage.macs_dense, "macs_remaining": stage.macs_remaining, **stage.work}
    return {name: 100 * work[f"{key}_remaining"] / work[f"{key}_dense"] for name, key in WORK.items()}


def speed_drawings(timings: Sequence[Mapping[str, Any]]) -> Iterator[Drawing]:
    """Speed-up over each peer, by length and threads."""
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
        caption = "Bars beyond the dotted line: the compiled kernel is faster."
        told = f"Time of {peer} over time of the compiled kernel. {words}."
        yield Drawing(f"speed-{peer}", title, caption, told, figure)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation if there is more than one value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{_mean(values):.2f}{spread}"


def _suffix(group: Group, groups: Sequence[Group]) -> str:
    return f": {group.label}" if len(groups) > 1 else ""


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
