"""Summary of the tables of evidence: one row per task and tail, and a figure of the effect of a tail."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from attnpress.records.run import Record, StageRecord
from attnpress.report.evidence import TASKS, Cells, change_of, controls_of
from attnpress.report.figures import mean_and_spread
from attnpress.report.plots import Line
from attnpress.report.render import markdown_table, start_of

BITS = {"8888": "8 bits", "4444": "4 bits"}
ASKED = ("0.95", "0.98")
UNTRAINED = ("0.90", "0.95", "0.98", "0.99")
UNTRAINED_HEADER = ["task (metric)", "tail", "seeds", "dense", "quantized", *UNTRAINED, "keys per query"]
RULES_WITH_TAIL = ("topk", "mass", "threshold")
UNKNOWN = "not yet measured"
CELL = re.compile(r"(?P<bits>\d+)-(?P<asked>0\.\d+)(?:-(?P<tail>mean|linear\d*))?(?P<once>-at-once)?")
"""Names of the cells that are compared: bits, sparsity and tail, without other variants."""

Measured = list[tuple[Record, StageRecord]]


def headline_markdown(tasks: Mapping[str, Cells], chosen: Sequence[str]) -> str:
    """One row for each task and tail: score and loss of the most relevant cells.

    Args:
        tasks: cells by task.
        chosen: the tasks, in this order.

    Returns:
        Markdown. Losses are against the dense model trained equally long, seed by seed. A task has a row without a
        tail, and one for each measured tail.
    """
    cells = [(bits, asked) for bits in BITS for asked in ASKED]
    names = [f"{BITS[bits]}, {asked}" for bits, asked in cells]
    header = ["task (metric)", "tail", "dense", *names, "keys per query"]
    rows = []
    for task in chosen:
        found = tasks.get(task, {})
        known = {tail: [measured(found, bits, asked, tail) for bits, asked in cells] for tail in tails_of([found])}
        for tail, row in known.items():
            if tail == "none" or any(row):
                rows.append([*_task(task, found), *_of_tail(tail, found), *(_scored(one, found) for one in row)])
                rows[-1].append(_keys(row[: len(ASKED)]))
    return markdown_table(header, rows, header[:2])


def claim_in_words(tasks: Mapping[str, Cells]) -> str:
    """What the tables of MRPC, SQuAD, STS-B and a part of SST-2 support, in a few sentences.

    Args:
        tasks: cells by task.
    """
    lost = {
        (task, bits): _lost(measured(tasks[task], bits, "0.95", "none"), tasks[task])
        for task in ("mrpc", "squad")
        for bits in BITS
    }
    return (
        f"With 95 % of the valid pairs pruned, MRPC and SQuAD score {lost['mrpc', '8888']:+.2f} and "
        f"{lost['squad', '8888']:+.2f} points against dense models trained equally long with 8 bits, and "
        f"{lost['mrpc', '4444']:+.2f} and {lost['squad', '4444']:+.2f} with 4 bits for Q, K, V and P. Where a query is "
        f"left one or two keys, a tail for the pruned ones recovers most of the loss: MRPC with "
        f"{_with_tail(tasks['mrpc'], '0.98')}, STS-B with {_with_tail(tasks['stsb'], '0.95')}, a part of SST-2 with "
        f"{_with_tail(tasks['sst2part'], '0.95')}."
    )


def _with_tail(cells: Cells, asked: str) -> str:
    pair = [measured(cells, "8888", asked, tail) for tail in ("none", "linear32")]
    without, tailed = (_lost(found, cells) for found in pair)
    keys = statistics.mean(stage.keys_per_row for _, stage in pair[1])
    seeds = "" if len(pair[1]) > 1 else ", one seed"
    return f"{keys:.1f} keys {without:+.2f} without and {tailed:+.2f} with it{seeds}"


def _lost(found: Measured, cells: Cells) -> float:
    known = controls_of(cells)
    return statistics.mean(change_of(record, stage, known) for record, stage in found)


def untrained_markdown(tasks: Mapping[str, Cells], encoders: Mapping[str, Mapping[str, Any]]) -> str:
    """Points lost without training: quantized with 8 bits, and pruned one-shot at each sparsity, by task and tail.

    Args:
        tasks: cells by task, in the order of the rows.
        encoders: rows of a record of benchmarks/without_training.py (scores up to 1), by title.

    Returns:
        Markdown. Losses are against the dense model that was compressed, seed by seed. A task has a row without a
        tail, and one for each tail that was measured at a sparsity of the table.
    """
    return markdown_table(UNTRAINED_HEADER, _all_untrained(tasks, encoders), UNTRAINED_HEADER[:2])


def untrained_goals_markdown(
    tasks: Mapping[str, Cells],
    encoders: Mapping[str, Mapping[str, Any]],
    goals: Sequence[tuple[str, str, str, float]],
) -> str:
    """Goals without training, and whether they are met.

    Args:
        tasks, encoders: see `untrained_markdown`.
        goals: task as in that table, tail, sparsity asked, and the points that may be lost.
    """
    header = ["task (metric)", "tail", "asked", "may lose", "loses"]
    known = {(row[0], row[1]): dict(zip(UNTRAINED_HEADER, row, strict=True)) for row in _all_untrained(tasks, encoders)}
    rows = []
    for task, tail, asked, allowed in goals:
        lost = known.get((task, f"`{tail}`"), {}).get(asked)
        met = "not run" if not lost else f"{lost}: {'met' if float(lost) >= -allowed else 'not met'}"
        rows.append([task, f"`{tail}`", asked, f"{allowed}", met])
    return markdown_table(header, rows, header[:2])


def _all_untrained(tasks: Mapping[str, Cells], encoders: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = [row for title, found in encoders.items() for row in _encoder_rows(title, found)]
    return rows + [row for task, found in tasks.items() for row in _untrained_rows(task, found)]


def _untrained_rows(task: str, cells: Cells) -> Iterator[list[str]]:
    # By its weights, since a dense model that was trained again on another machine is another one.
    dense = {
        _dense_of(record): stage.metrics[record.headline]
        for records in cells.values()
        for record in records
        if (stage := record.stage("dense"))
    }
    for tail in tails_of([cells]):
        known = [
            [pair for pair in measured(cells, "8888", asked, tail, "one_shot") if _dense_of(pair[0]) in dense]
            for asked in UNTRAINED
        ]
        if not any(known):
            continue
        of_all = {
            _dense_of(record): (record, stage)
            for one in known
            for record, _ in one
            if (stage := record.stage("quantized"))
        }
        lost = [
            [stage.metrics[record.headline] - dense[_dense_of(record)] for record, stage in one]
            for one in (list(of_all.values()), *known)
        ]
        seeds = " or ".join(sorted({str(len(one)) for one in known if one}))
        figures = [f"{statistics.mean(one):+.2f}" if one else "" for one in lost]
        keys = [f"{statistics.mean(stage.keys_per_row for _, stage in one):.1f}" if one else "?" for one in known]
        starts = {_dense_of(record) for one in known for record, _ in one}
        score = f"{statistics.mean(dense[start] for start in starts):.2f}"
        yield [*_task(task, cells), f"`{tail}`", seeds, score, *figures, ", ".join(keys)]


def _dense_of(record: Record) -> str:
    return start_of(record)[0]


def rules_markdown(cells: Cells, others: Cells) -> str:
    """What a tail of the whole score is worth to each rule at 0.95, without training.

    Args:
        cells: of a task, with rule relative.
        others: cells named 8888-0.95-RULE and 8888-0.95-RULE-linear32, of the same dense models.
    """
    header = ["rule", "keys per query", "no tail", "`linear`, whole score", "gain by seed"]
    pairs = {"relative": [measured(cells, "8888", "0.95", tail, "one_shot") for tail in ("none", "linear32")]}
    for rule in RULES_WITH_TAIL:
        names = f"8888-0.95-{rule}", f"8888-0.95-{rule}-linear32"
        pairs[rule] = [[(r, s) for r in others.get(name, ()) if (s := r.stage("one_shot"))] for name in names]
    rows = []
    for rule, pair in pairs.items():
        plain, tailed = (
            {record.provenance["seed"]: stage.metrics[record.headline] for record, stage in found} for found in pair
        )
        both = sorted(plain.keys() & tailed.keys())
        if both:
            keys = statistics.mean(stage.keys_per_row for found in pair for _, stage in found)
            means = [f"{statistics.mean(scores[seed] for seed in both):.2f}" for scores in (plain, tailed)]
            gains = ", ".join(f"{tailed[seed] - plain[seed]:+.2f}" for seed in both)
            rows.append([f"`{rule}`", f"{keys:.1f}", *means, gains])
    return markdown_table(header, rows, header[:1])


def _encoder_rows(title: str, found: Mapping[str, Any]) -> Iterator[list[str]]:
    dense = found["dense"]["score"]
    for tail in ("none", "mean", *(f"linear:{2**place}" for place in range(9))):
        known = [found.get(f"{tail} {float(asked):g}") for asked in UNTRAINED]
        if not any(known):
            continue
        figures = [f"{100 * (row['score'] - dense):+.2f}" if row else "" for row in (found["quantized"], *known)]
        keys = ", ".join(f"{row['keys_per_row']:.1f}" if row else "?" for row in known)
        yield [title, f"`{tail.replace(':', '')}`", "", f"{100 * dense:.2f}", *figures, keys]


def tails_of(cells: Iterable[Cells]) -> list[str]:
    """Tails in order: none, mean, and each rank of linear that a cell has; plain linear if none has."""
    parts = [CELL.fullmatch(name) for found in cells for name in found]
    ranks = {one["tail"] for one in parts if one and (one["tail"] or "").startswith("linear")}
    ordered = sorted(ranks, key=lambda tail: int(tail.removeprefix("linear") or 0))
    return ["none", "mean", *(ordered or ["linear"])]


def measured(cells: Cells, bits: str, asked: str, tail: str, stage: str = "progressive") -> Measured:
    """Records of a cell with their stage, one per seed."""
    found: list[Measured] = []
    for name, records in cells.items():
        parts = CELL.fullmatch(name)
        if parts is None or (parts["bits"], parts["asked"], parts["tail"] or "none") != (bits, asked, tail):
            continue
        found.append([(record, known) for record in records if (known := record.stage(stage))])
    return max(found, key=len, default=[])


def tail_lines(tasks: Mapping[str, Cells], chosen: Sequence[str], bits: str) -> dict[str, list[Line]]:
    """Points against dense over keys per query, a line for each tail: trained, and pruned without training.

    Args:
        tasks: cells by task.
        chosen: the tasks, in this order; those without a cell with a tail are left out.
        bits: of the cells.

    Returns:
        Lines by the title of their panel; two panels for each task.
    """
    known = {task: cells for task in chosen if _has_tail(cells := tasks.get(task, {}), bits)}
    tails = tails_of(known.values())
    return {
        f"{TASKS.get(task, task)}, {words}": [
            _line(cells, bits, tail, stage, place) for place, tail in enumerate(tails)
        ]
        for task, cells in known.items()
        for stage, words in (("progressive", "trained"), ("one_shot", "untrained"))
    }


def _has_tail(cells: Cells, bits: str) -> bool:
    parts = [CELL.fullmatch(name) for name in cells]
    return any(one["bits"] == bits and one["tail"] for one in parts if one)


def tail_words(panels: Mapping[str, Sequence[Line]]) -> str:
    """Description of the figure in words: each point, panel by panel."""
    parts = []
    for title, lines in panels.items():
        drawn = [
            f"{line.label} {', '.join(f'{y:+.1f} at {x:.1f}' for x, y in zip(line.x, line.y, strict=True))}"
            for line in lines
            if line.x
        ]
        parts.append(f"{title}: {', '.join(drawn) or UNKNOWN}")
    return f"Points against dense at the keys per query that are left, by tail. {'; '.join(parts)}."


def _line(cells: Cells, bits: str, tail: str, stage: str, series: int) -> Line:
    asked = sorted({parts["asked"] for name in cells if (parts := CELL.fullmatch(name)) and parts["bits"] == bits})
    points = [
        (
            statistics.mean(stage.keys_per_row for _, stage in found),
            _lost(found, cells),
        )
        for each in asked
        if (found := measured(cells, bits, each, tail, stage))
    ]
    points.sort()
    return Line(tail, [x for x, _ in points], [y for _, y in points], series)


def _task(task: str, cells: Cells) -> list[str]:
    metric = next((record.headline for records in cells.values() for record in records), "")
    return [f"{TASKS.get(task, task)} ({metric})" if metric else TASKS.get(task, task)]


def _of_tail(tail: str, cells: Cells) -> list[str]:
    dense = [
        stage.metrics[record.headline]
        for record in cells.get("dense", ())
        if (stage := record.stage("dense_control") or record.stage("dense"))
    ]
    return [f"`{tail}`", mean_and_spread(dense) if dense else UNKNOWN]


def _scored(found: Measured, cells: Cells) -> str:
    if not found:
        return UNKNOWN
    score = mean_and_spread([stage.metrics[record.headline] for record, stage in found])
    seeds = "" if len(found) > 1 else ", one seed"
    return f"{score} ({_lost(found, cells):+.2f}{seeds})"


def _keys(row: Sequence[Measured]) -> str:
    """Of the cells of 8 bits, at each sparsity, and of how many."""
    every = [stage for found in row for _, stage in found]
    if not every:
        return UNKNOWN
    keys = [f"{statistics.mean(stage.keys_per_row for _, stage in found):.1f}" if found else "?" for found in row]
    valid = statistics.mean(stage.keys_per_row / (1 - stage.sparsity) for stage in every)
    return f"{', '.join(keys)} of {valid:.0f}"
