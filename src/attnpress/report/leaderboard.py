"""A leaderboard as a table and a figure, from its record alone. Cells that were not run are listed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from attnpress.records.leaderboard import BoardRecord, CellRecord
from attnpress.report import plots
from attnpress.report.noise import standard_error
from attnpress.report.render import markdown_table

COLUMNS = (
    "task",
    "asked",
    "rule",
    "metric",
    "score",
    "against dense",
    "sparsity",
    "keys per query",
    "QK^T skipped",
    "PV skipped",
    "seeds",
)
MISSING = "not run yet"

GROUP = 4
"""Keys per group of rule "nm"."""


def skipped(entry: Mapping[str, Any], asked: float, measured: Mapping[str, Any]) -> tuple[float, float]:
    """Share of the bit operations of Q K^T and of P V that the design of a rule would skip at the measured sparsity.

    A mask of exact scores needs all of Q K^T, with any rule. A design that predicts its mask from a low-bit product
    computes that product for every pair, and the full one for pairs that the rule keeps. P V is skipped where the code
    of P is zero, except that N:M hardware skips a fixed number of every four keys.

    Args:
        entry: EntrySpec as plain data.
        asked: requested sparsity.
        measured: StageRecord as plain data.
    """
    bits, predictor = measured["bits"], entry["predictor_bits"] or entry["attention"].get("predictor_bits")
    product = 0.0
    if predictor is not None:
        product = max(0.0, measured["pruned"] - predictor**2 / ((bits["q"] or 32) * (bits["k"] or 32)))
    structured = entry["attention"].get("rule") == "nm"
    return product, int(asked * GROUP) / GROUP if structured else measured["sparsity"]


def board_rows(record: BoardRecord) -> list[tuple[str, ...]]:
    """Header, and a row of text for each rule, sparsity and task, ordered by task, then by sparsity."""
    groups: dict[tuple[str, float, str], list[CellRecord]] = {}
    tasks, rules = list(record.board["tasks"]), list(record.board["rules"])
    order = sorted(record.cells, key=lambda cell: (tasks.index(cell.task), cell.asked, rules.index(cell.rule)))
    for cell in order:
        groups.setdefault((cell.task, cell.asked, cell.rule), []).append(cell)
    return [COLUMNS, *(_row(record, cells) for cells in groups.values())]


def _row(record: BoardRecord, cells: Sequence[CellRecord]) -> tuple[str, ...]:
    first = cells[0]
    done = [(cell, cell.measured) for cell in cells if cell.measured is not None]
    place = (first.task, f"{first.asked:g}", first.rule)
    if not done:
        return (*place, MISSING, *[""] * (len(COLUMNS) - len(place) - 2), f"0 of {len(cells)}")
    baselines = [record.baseline(cell.task, cell.seed) for cell, _ in done]
    headline = next((one.headline for one in baselines if one), next(iter(done[0][1]["metrics"])))
    scores = [measured["metrics"][headline] for _, measured in done]
    losses = [score - one.reference for score, one in zip(scores, baselines, strict=True) if one]
    entry = record.board["rules"][first.rule]
    product, value = zip(*(skipped(entry, first.asked, measured) for _, measured in done), strict=True)
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return (
        *place,
        headline,
        f"{statistics.mean(scores):.2f}{spread}",
        f"{statistics.mean(losses):+.2f}" if losses else "",
        f"{statistics.mean(measured['sparsity'] for _, measured in done):.3f}",
        f"{statistics.mean(measured['keys_per_row'] for _, measured in done):.2f}",
        f"{statistics.mean(product):.0%}",
        f"{statistics.mean(value):.0%}",
        f"{len(done)} of {len(cells)}",
    )


def board_table(record: BoardRecord) -> Table:
    """The leaderboard for a terminal."""
    header, *rows = board_rows(record)
    table = Table(title="pruning rules, everything else alike", caption=board_caption(record))
    for column in header:
        table.add_column(column, justify="left" if column in ("task", "rule", "metric") else "right")
    for row in rows:
        table.add_row(*row)
    return table


def board_markdown(record: BoardRecord) -> str:
    """The leaderboard as Markdown: the cells that were run, and a sentence listing the others."""
    header, *rows = board_rows(record)
    shown = [row for row in rows if row[COLUMNS.index("metric")] != MISSING]
    table = markdown_table(header, shown, ("task", "rule", "metric")) if shown else ""
    return "\n\n".join(part for part in (table, board_caption(record), missing_words(record)) if part)


def board_caption(record: BoardRecord) -> str:
    """The dense models that scores are compared with."""
    return " ".join(
        f"{one.task}, seed {one.seed}: {one.headline} {one.dense:.2f} dense"
        + ("" if one.control is None else f", {one.control:.2f} trained equally long")
        + ("" if one.majority is None else f", {one.majority:.2f} for always predicting the most frequent class")
        + f"; {one.provenance['rows']['train']} training rows, {one.provenance['rows']['eval']} to evaluate."
        for one in record.baselines
    )


def missing_words(record: BoardRecord) -> str:
    """A sentence listing the cells that were not run."""
    missing: dict[str, list[str]] = {}
    for cell in record.cells:
        if cell.measured is None:
            several = f" (seed {cell.seed})" if len(record.board["seeds"]) > 1 else ""
            missing.setdefault(f"{cell.rule} on {cell.task}", []).append(f"{cell.asked:g}{several}")
    if not missing:
        return f"All {len(record.cells)} cells were run."
    named = "; ".join(f"{name} at {', '.join(at)}" for name, at in missing.items())
    return f"Not run yet, {sum(map(len, missing.values()))} of {len(record.cells)} cells: {named}."


def board_figure(record: BoardRecord) -> plots.Plot:
    """Score against achieved sparsity: a panel for each task, a line for each rule, means over seeds."""
    panels, references = {}, {}
    for task in record.board["tasks"]:
        known = [one for one in record.baselines if one.task == task]
        name = f"{task}: {known[0].headline} (points)" if known else f"{task} ({MISSING})"
        panels[name] = [line for line in _lines(record, task) if line.x]
        if known:
            dense, rows = statistics.mean(one.reference for one in known), known[0].provenance["rows"]["eval"]
            references[name] = plots.Band(dense, standard_error(known[0].headline, dense, rows))
    return plots.leaderboard(panels, references)


def _lines(record: BoardRecord, task: str) -> list[plots.Line]:
    lines = []
    for series, rule in enumerate(record.board["rules"]):
        by_asked: dict[float, list[Mapping[str, Any]]] = {}
        for cell in record.cells:
            if (cell.task, cell.rule) == (task, rule) and cell.measured is not None:
                by_asked.setdefault(cell.asked, []).append(cell.measured)
        points = sorted(
            (
                statistics.mean(one["sparsity"] for one in found),
                statistics.mean(next(iter(one["metrics"].values())) for one in found),
            )
            for found in by_asked.values()
        )
        lines.append(plots.Line(rule, [x for x, _ in points], [y for _, y in points], series))
    return lines


def figure_words(record: BoardRecord) -> str:
    """Description of the figure in words: the best rule at each sparsity with several rules."""
    done = [(cell, next(iter(cell.measured["metrics"].values()))) for cell in record.cells if cell.measured is not None]
    best: dict[tuple[str, float], tuple[float, str]] = {}
    for cell, score in done:
        best[cell.task, cell.asked] = max(best.get((cell.task, cell.asked), (score, cell.rule)), (score, cell.rule))
    words = [f"{task} at {asked:g}: best {rule}, {score:.1f}" for (task, asked), (score, rule) in sorted(best.items())]
    return f"Score against achieved sparsity for each rule. {'; '.join(words) if words else 'Nothing was run yet'}."
