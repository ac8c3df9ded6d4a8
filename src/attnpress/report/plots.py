"""Figures: pure functions from plain numbers to a matplotlib figure, and figures as SVG text.

Colours that a page may change are drawn in the markers of `THEME`; `recolored` replaces them.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

THEME = {"ink": "#010203", "line": "#020304", "paper": "#030405"}
PRINT = {"ink": "#1c1f24", "line": "#d4d8de", "paper": "#ffffff"}
COLORS = ("#3579b8", "#d9730d", "#2a9468", "#9166cc", "#cf4457", "#8a7a3c")
MARKERS = "Dos^vPX*"
"""Colours of series, readable on light and dark pages."""
SKIPPED = "#c3c7cd"
"""Background of the maps, distinct from every colour of the scale, on light and dark pages."""

SHORT = 22
"""Maximum length of a label that leaves room for another beside it."""

WIDTH = 4.0
"""Width of every figure in inches, narrow enough to be readable on a phone."""

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.dpi": 100,
    "text.color": THEME["ink"],
    "axes.labelcolor": THEME["ink"],
    "axes.edgecolor": THEME["ink"],
    "xtick.color": THEME["ink"],
    "ytick.color": THEME["ink"],
    "grid.color": THEME["line"],
    "axes.grid": True,
    "axes.facecolor": THEME["paper"],
    "figure.facecolor": THEME["paper"],
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


Plot: TypeAlias = Figure
"""What every function here gives; a name by which others can speak of it without knowing matplotlib."""


@dataclass(frozen=True)
class Band:
    """A score and one standard error of it. Scores within the band cannot be distinguished with these rows."""

    score: float
    error: float
    label: str = "dense ± one standard error"


@dataclass(frozen=True)
class Line:
    """One curve; `series` selects its colour, which the seeds of a stage share."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int = 0
    dashed: bool = False


@mpl.rc_context(STYLE)
def metric_against_sparsity(
    points: Sequence[Line], metric: str, floor: float | None, noise: Band | None = None
) -> Figure:
    """A mark for each stage: mean and range over seeds in both directions, and each seed as a dot.

    Args:
        points: for each stage, the sparsities and scores of its seeds.
        metric: name of the score.
        floor: score of always predicting the most frequent class.
        noise: of the dense model's score; None draws no band.
    """
    figure, axes = _axes(3.2)
    _noise_band(axes, noise)
    for point in points:
        color, x, y = COLORS[point.series % len(COLORS)], np.array(point.x), np.array(point.y)
        spread = y.std(ddof=1) if len(y) > 1 else 0.0
        axes.errorbar(x.mean(), y.mean(), yerr=spread or None, fmt="D", ms=6, capsize=4, color=color, label=point.label)
        if len(y) > 1:
            axes.plot(x, y, ".", ms=5, alpha=0.6, color=color)
    lowest = min(min(point.y) for point in points)
    if floor is not None and floor > lowest - 10:
        axes.axhline(floor, ls=":", color=THEME["ink"], lw=1, label="most frequent class")
    axes.set(xlabel="sparsity (fraction of valid pairs skipped)", ylabel=metric, xlim=(-0.05, 1.05))
    _legend_below(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def front(trials: Line, best: Line, metric: str, dense: float, noise: Band | None = None) -> Figure:
    """Trials of a sweep by their remaining work in percent, with the Pareto front as a step line.

    Args:
        trials: x is work, y is the score; `best` likewise, least work first.
        metric: name of the score.
        dense: score of the dense model, whose work of 100 percent is not drawn.
        noise: of that score; None draws no band.
    """
    figure, axes = _axes(3.2)
    _noise_band(axes, noise)
    if trials.x:
        axes.plot(trials.x, trials.y, "o", ms=5, alpha=0.5, color=COLORS[trials.series], label=trials.label)
    # Between two trials, only the score of the previous one is known.
    axes.step(best.x, best.y, "D-", where="post", ms=6, color=COLORS[best.series], label=best.label)
    axes.axhline(dense, ls=":", color=THEME["ink"], lw=1, label="dense model")
    axes.set(xlabel="bit operations left (percent of the dense ones)", ylabel=metric)
    _legend_below(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def leaderboard(panels: Mapping[str, Sequence[Line]], references: Mapping[str, Band]) -> Figure:
    """Score against achieved sparsity, a line for each rule; panels by score, each with its reference and noise."""
    figure = _figure(0.9 + 2.4 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(rows, panels.items(), strict=True):
        _marked(axes, lines)
        if name in references:
            _noise_band(axes, references[name])
            axes.axhline(references[name].score, ls=":", color=THEME["ink"], lw=1, label="dense model")
        axes.set_ylabel(name)
    rows[-1].set_xlabel("sparsity achieved (fraction of valid pairs)")
    _legend_below(figure, rows[0])
    return figure


@mpl.rc_context(STYLE)
def curves(lines: Sequence[Line], ylabel: str, *, unit_range: bool = False, noise: Band | None = None) -> Figure:
    """Training curves by step; `noise` is that of a score."""
    figure, axes = _axes(2.7)
    _noise_band(axes, noise)
    for line in lines:
        style: dict[str, Any] = {"color": COLORS[line.series % len(COLORS)], "lw": 1.6, "label": line.label}
        axes.plot(line.x, line.y, "--" if line.dashed else "-", marker="o" if len(line.x) < 9 else None, ms=3, **style)
    axes.set(xlabel="step", ylabel=ylabel)
    if unit_range:
        axes.set_ylim(-0.03, 1.03)
    _legend_below(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def head_map(values: Sequence[Sequence[float]]) -> Figure:
    """One square per head: rows are layers from the first, columns are heads. Missing heads stay blank."""
    widest = max(len(row) for row in values)
    grid = np.array([[*row, *[np.nan] * (widest - len(row))] for row in values], dtype=float)
    figure, axes = _axes(0.8 + 3.0 * max(0.35, min(1.6, len(grid) / widest)))
    shown = axes.imshow(grid, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set(xlabel="head", ylabel="layer")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    figure.colorbar(shown, ax=axes, pad=0.02)
    return figure


@mpl.rc_context(STYLE)
def attention_maps(before: ArrayLike, after: ArrayLike, tokens: Sequence[str], sides: tuple[str, str]) -> Figure:
    """P of one head on one input, before above after, with tokens on the axes. Pairs that are exactly zero are grey."""
    figure = _figure(7.6)
    panels = figure.subplots(2, 1, sharex=True)
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    for axes, values, side in zip(panels, (before, after), sides, strict=True):
        grid = np.ma.masked_equal(np.asarray(values, dtype=float), 0)
        shown = axes.imshow(grid, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        axes.set_title(side)
        axes.grid(visible=False)
        axes.set_facecolor(SKIPPED)
        _name(axes.yaxis, tokens, grid.shape[0])
    _name(panels[1].xaxis, tokens, grid.shape[1], rotation=90)
    bar = figure.colorbar(shown, ax=panels, location="bottom", pad=0.02, fraction=0.03, aspect=30)
    bar.set_label("P of a query (row) at a key (column)")
    return figure


@mpl.rc_context(STYLE)
def threshold_histogram(
    edges: ArrayLike, before: ArrayLike | None, after: ArrayLike, threshold: float | None, xlabel: str
) -> Figure:
    """Share of pairs by size of P, and the threshold; everything to its left is pruned.

    Args:
        edges: of the bins, in octaves below 1 (or in shares of the row's mass), one more than counts.
        before: shares of the dense model; None omits them.
        after: shares of the compressed model, before its threshold is applied.
        threshold: in the unit of `edges`.
    """
    figure, axes = _axes(2.7)
    at = np.asarray(edges, dtype=float)
    if before is not None:
        axes.stairs(np.asarray(before), at, color=COLORS[0], lw=1.4, label="dense model")
    axes.stairs(np.asarray(after), at, color=COLORS[1], fill=True, alpha=0.35, label="compressed model, before the cut")
    if threshold is not None:
        axes.axvline(threshold, color=COLORS[4], lw=1.8, label="threshold: smaller P is pruned")
    axes.set(xlabel=xlabel, ylabel="share of pairs")
    axes.invert_xaxis()
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_below(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def bars(groups: Mapping[str, Mapping[str, float]], xlabel: str, *, reference: float | None = None) -> Figure:
    """Horizontal bars: a row for each group, a colour for each quantity, the number at the end."""
    names, count = list(groups), len(next(iter(groups.values())))
    figure, axes = _axes(0.9 + 0.2 * len(names) * (count + 0.7))
    height = 0.8 / count
    for index, quantity in enumerate(next(iter(groups.values()))):
        values = [groups[name][quantity] for name in names]
        place = np.arange(len(names)) + (index - (count - 1) / 2) * height
        drawn = axes.barh(place, values, height * 0.9, color=COLORS[index % len(COLORS)], label=quantity)
        box = {"facecolor": THEME["paper"], "edgecolor": "none", "pad": 0.6}  # keeps numbers off the reference line
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8.5, bbox=box)
    if reference is not None:
        axes.axvline(reference, color=THEME["ink"], lw=1, ls=":")
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)
    _legend_below(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def side_by_side(names: Sequence[str], panels: Mapping[str, Sequence[float]]) -> Figure:
    """Horizontal bars with shared rows: a panel for each quantity, starting at zero, the number at the end.

    Args:
        names: of the rows, from the top.
        panels: by the quantity's name, a value for each row.
    """
    figure = _figure(0.8 + 0.32 * len(names))
    figure.set_figwidth(2 * WIDTH)
    for index, (axes, quantity) in enumerate(zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True)):
        drawn = axes.barh(range(len(names)), panels[quantity], 0.7, color=COLORS[index % len(COLORS)])
        axes.bar_label(drawn, fmt="%.1f", padding=3)
        axes.set(title=quantity, yticks=range(len(names)), yticklabels=names)
        axes.margins(x=0.16)
        axes.grid(visible=False)
    figure.axes[0].invert_yaxis()
    return figure


@mpl.rc_context(STYLE)
def two_axes(panels: Mapping[str, Sequence[Line]], ylabel: str, *, logarithmic: Sequence[str] = ()) -> Figure:
    """The same lines over several quantities, side by side, with a line at zero; some axes can be `logarithmic`."""
    figure = _figure(3.2)
    figure.set_figwidth(2 * WIDTH)
    for axes, (quantity, lines) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        _marked(axes, lines)
        axes.axhline(0, ls=":", color=THEME["ink"], lw=1)
        axes.set(xlabel=quantity, xscale="log" if quantity in logarithmic else "linear")
        if quantity in logarithmic:  # plain numbers, few enough not to overlap
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel(ylabel)
    figure.axes[0].legend()
    return figure


@mpl.rc_context(STYLE)
def grid_of_lines(
    panels: Mapping[str, Sequence[Line]], xlabel: str, ylabel: str, *, sharey: Literal["all", "col"] = "all"
) -> Figure:
    """The same lines in several panels, two per row; x counts from 0. Panels share axes; y, with "col", in a column."""
    rows = -(-len(panels) // 2)
    figure = _figure(0.9 + 1.9 * rows)
    every = figure.subplots(rows, 2, sharex=True, sharey=sharey, squeeze=False).flatten()
    for number, (axes, (title, lines)) in enumerate(zip(every, panels.items(), strict=False)):
        _marked(axes, lines)
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(xlabel=xlabel if number >= len(panels) - 2 else "", ylabel="" if number % 2 else ylabel)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    _legend_below(figure, every[0])
    return figure


def _noise_band(axes: Axes, noise: Band | None) -> None:
    if noise is not None:
        low, high = noise.score - noise.error, noise.score + noise.error
        axes.axhspan(low, high, color=THEME["ink"], alpha=0.12, lw=0, label=noise.label)


def _marked(axes: Axes, lines: Sequence[Line]) -> None:
    """Each line with its own marker, since there are more lines than colours."""
    for line in lines:
        color, mark = COLORS[line.series % len(COLORS)], MARKERS[line.series % len(MARKERS)]
        axes.plot(line.x, line.y, ls="-", lw=1.3, marker=mark, ms=5.5, color=color, label=line.label)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as SVG in marker colours. Equal figures give equal text: no dates, and ids begin with `name`."""
    text = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # the page sets the fonts
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'\bid="|(?<=url\()#|(?<=href=")#', lambda found: f"{found[0]}{name}-", svg)


def recolored(svg: str, colors: Mapping[str, str]) -> str:
    """The drawing with other colours, or `var(--...)` of a page, for ink, lines and paper."""
    for marker, color in THEME.items():
        svg = svg.replace(color, colors[marker])
    return svg


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = _figure(height)
    return figure, figure.subplots()


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in reversed(list(zip(handles, labels, strict=True)))}
    chosen = [label for label in dict.fromkeys(labels) if not label.startswith("_")]
    columns = 2 if max(map(len, chosen), default=0) <= SHORT else 1
    if chosen:
        figure.legend([first[name] for name in chosen], chosen, loc="outside lower left", ncols=columns, frameon=False)


def _name(axis: Any, tokens: Sequence[str], count: int, rotation: float = 0) -> None:
    shown = tokens if len(tokens) == count else [str(index) for index in range(count)]
    words = [token.translate({0x0120: "\N{MIDDLE DOT}", 0x2581: "\N{MIDDLE DOT}"}) for token in shown]
    axis.set_ticks(range(count), words, rotation=rotation, fontsize=8.5, parse_math=False)
