"""Table and figure of evidence, from records alone: each task's cells, compared with the dense model seed by seed."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from attnpress.records.run import Record, StageRecord
from attnpress.records.table import recorded, table_files
from attnpress.report.figures import mean_and_spread
from attnpress.report.paired import Pair, paired_words
from attnpress.report.plots import Line
from attnpress.report.render import (
    TITLES,
    Start,
    control_scores,
    control_stages,
    markdown_table,
    reference_score,
    start_of,
)

Cells = Mapping[str, Sequence[Record]]
"""Records of one task by the name of their cell, one a seed."""

DENSE_CELL = "dense"
DETAILED = "0.95"
"""Cells of this sparsity also show quantization and pruning without training."""
PADDED = {"squad": 384, "squadpart": 384}
"""Customary padded lengths other than 128."""
TASKS = {
    "mrpc": "MRPC",
    "sst2": "SST-2",
    "sst2part": "SST-2, part",
    "cola": "CoLA",
    "colacpu": "CoLA, on a CPU",
    "rte": "RTE",
    "squad": "SQuAD",
    "squadpart": "SQuAD, part",
    "stsb": "STS-B",
}
"""Titles that differ from the names."""
COLUMNS = (
    "bits, asked",
    "stage",
    "{metric}",
    "against dense",
    "sparsity",
    "padded to {length}",
    "keys per query",
    "bit operations left",
    "bytes of P left",
    "seeds",
)
DIFFERENCE = "against dense"
PAIRED = "paired test"
GOAL_COLUMNS = (
    "task",
    "bits, asked",
    "keys per query",
    "may lose",
    "against dense, trained equally long",
    "against the best dense",
)


def read_cells(folder: Path) -> dict[str, dict[str, list[Record]]]:
    """Tables of a folder by task and cell: dense first, then most bits, then least sparsity; then by seed.

    Raises:
        RecordError: a table or record cannot be read.
    """
    return {file.stem: _cells(recorded(file)) for file in table_files(folder)}


def _cells(records: Mapping[str, Record]) -> dict[str, list[Record]]:
    found: dict[str, list[tuple[int, Record]]] = defaultdict(list)
    for name in sorted(records):
        cell, _, seed = name.rpartition("-seed")
        found[cell].append((int(seed), records[name]))
    return {
        cell: [record for _, record in sorted(found[cell], key=lambda one: one[0])]
        for cell in sorted(found, key=_place)
    }


def _place(cell: str) -> tuple[bool, int, str]:
    bits, _, asked = cell.partition("-")
    return bits != DENSE_CELL, -int(bits) if bits.isdigit() else 0, asked


def padded_to(stage: StageRecord, length: int) -> float:
    """Sparsity over sequences padded to another length than the stage's own; the number of survivors is unchanged."""
    return 1 - (1 - stage.padded_sparsity) * (stage.padded_length / length) ** 2


def evidence_markdown(task: str, cells: Cells) -> str:
    """Table of one task: mean and standard deviation over seeds of each cell.

    Args:
        task: its name.
        cells: by name. "against dense" compares each record with the dense model trained equally long from the same
            weights; if those were retrained, with the one of its seed; if there is neither, with the dense model before
            that. A dense cell of another length than the recipe's shows only that control.

    Returns:
        Markdown; with a column of paired tests if records hold the scores of rows.
    """
    known, stages = controls_of(cells), _control_stages(cells)
    length = PADDED.get(task, 128)
    header = [column.format(metric=_every(cells)[0].headline, length=length) for column in COLUMNS]
    shown = [(*named, records) for cell, records in cells.items() for named in _stages(cell, records)]
    rows = [_row(label, stage, records, known, length) for label, stage, records in shown]
    tests = [paired_words(_pairs(stage, records, stages)) for _, stage, records in shown]
    if any(tests):
        place = COLUMNS.index(DIFFERENCE) + 1
        header.insert(place, PAIRED)
        for row, test in zip(rows, tests, strict=True):
            row.insert(place, test)
    return markdown_table(header, rows, header[:2])


def _pairs(name: str, records: Sequence[Record], known: Mapping[Start, tuple[Record, StageRecord]]) -> list[Pair]:
    """Row scores of a stage of each record and of its control, if both are known for the same rows."""
    found = []
    for record in records:
        stage = record.stage(name)
        of, control = known.get(start_of(record), (record, record.stage("dense")))
        ours, theirs = stage and stage.row_scores, control and control.row_scores
        is_same = record.provenance.get("data", {}).get("eval") == of.provenance.get("data", {}).get("eval")
        if ours and theirs and stage is not control and is_same and ours.rows == theirs.rows:
            found.append(Pair(record.headline, ours, theirs, record.targets))
    return found


def ablation_markdown(cells: Cells) -> str:
    """Effect of each choice: the last stage of each cell compared with the last of the dense model."""
    every = _every(cells)
    known = controls_of(cells) or control_scores(every, "dense")
    header = ["choice", every[0].headline, "against dense", "sparsity", "keys per query", "seeds"]
    rows = []
    for cell, records in cells.items():
        row = _row(cell.replace("-", " "), records[0].stages[-1].name, records, known, 128)
        rows.append([row[0], *row[2:5], row[6], row[-1]])
    return markdown_table(header, rows, header[:1])


def errors_markdown(tasks: Mapping[str, Cells], bits: str) -> str:
    """Error of each layer's attention output under one-shot pruning, with the remaining keys, fewest first.

    Args:
        tasks: cells by task; records without this stage or without errors are left out.
        bits: of the cells to show, as their names begin.

    Returns:
        A table: for each layer, the mean over heads and records of the output's relative root-mean-square error.
    """
    rows: list[tuple[float, list[str]]] = []
    for task, cells in tasks.items():
        for cell, records in cells.items():
            found = [known for record in records if (known := record.stage("one_shot")) and known.errors_by_layer()]
            if not found or not cell.startswith(f"{bits}-"):
                continue
            by_layer = zip(*(known.errors_by_layer() for known in found), strict=True)
            errors = [statistics.mean(seeds) for seeds in by_layer]
            keys = statistics.mean(known.keys_per_row for known in found)
            valid = statistics.mean(known.keys_per_row / (1 - known.sparsity) for known in found)
            asked = cell.removeprefix(f"{bits}-")
            rows.append((keys, [task, asked, f"{keys:.1f}", f"{valid:.0f}", *(f"{error:.2f}" for error in errors)]))
    names = ["task", "asked", "keys per query", "of"]
    depth = max((len(row) for _, row in rows), default=len(names)) - len(names)
    header = [*names, *(f"layer {layer}" for layer in range(depth))]
    return markdown_table(header, [row for _, row in sorted(rows)], header[:1])


def goals_markdown(tasks: Mapping[str, Cells], goals: Sequence[tuple[str, str, float]]) -> str:
    """Goals and results.

    Args:
        tasks: cells by task.
        goals: task, cell, and the allowed loss in points.

    Returns:
        A table. Losses are against the dense model trained equally long, seed by seed (mean and standard deviation),
        and against the best mean of any dense model of the task, before or after further training.
    """
    rows = []
    for task, cell, allowed in goals:
        bits, _, asked = cell.partition("-")
        named, may = [task, f"{'/'.join(bits)}, {asked}"], f"{allowed:.1f}"
        found = [(one, stage) for one in tasks.get(task, {}).get(cell, ()) if (stage := one.stage("progressive"))]
        if not found:
            rows.append([*named, "", may, "not run", "not run"])
            continue
        known = controls_of(tasks[task])
        lost = [change_of(record, stage, known) for record, stage in found]
        score = statistics.mean(stage.metrics[record.headline] for record, stage in found)
        below_best = score - _best_dense(tasks[task])
        keys = statistics.mean(stage.keys_per_row for _, stage in found)
        rows.append(
            [
                *named,
                f"{keys:.1f}",
                may,
                f"{mean_and_spread(lost)}: {_verdict(statistics.mean(lost), allowed)}",
                f"{below_best:.2f}: {_verdict(below_best, allowed)}",
            ]
        )
    return markdown_table(GOAL_COLUMNS, rows, GOAL_COLUMNS[:2])


def summary_markdown(tasks: Mapping[str, Cells], chosen: Sequence[tuple[str, str]]) -> str:
    """One row for each chosen cell: its score, that of the dense model, and the keys per query.

    Args:
        tasks: cells by task.
        chosen: task and cell.
    """
    header = ["task (metric)", "bits", "training", "dense", "compressed", "difference", "keys per query", "seeds"]
    rows = []
    for task, cell in chosen:
        found = [(one, stage) for one in tasks[task][cell] if (stage := one.stage("progressive"))]
        known = controls_of(tasks[task])
        dense = [reference_score(record, known) for record, _ in found]
        scores = [stage.metrics[record.headline] for record, stage in found]
        change = statistics.mean(scores) - statistics.mean(dense)
        keys = [stage.keys_per_row for _, stage in found]
        valid = statistics.mean(stage.keys_per_row / (1 - stage.sparsity) for _, stage in found)
        rows.append(
            [
                f"{TASKS.get(task, task)} ({found[0][0].headline})",
                "/".join(cell.partition("-")[0]),
                "fine-tuned",
                mean_and_spread(dense),
                mean_and_spread(scores),
                f"{change:+.2f}",
                f"{statistics.mean(keys):.1f} of {valid:.0f}",
                str(len(found)),
            ]
        )
    return markdown_table(header, rows, header[:3])


def _verdict(change: float, allowed: float) -> str:
    return "met" if change >= -allowed else "not met"


def _best_dense(cells: Cells) -> float:
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for cell, records in cells.items():
        for record in records if cell.startswith(DENSE_CELL) else ():
            for stage in record.stages:
                scores[cell, stage.name].append(stage.metrics[record.headline])
    return max(statistics.mean(found) for found in scores.values())


def caption(cells: Cells, hidden: int) -> str:
    """Data and machine of a table, the score of the most frequent class, and attention's share of the whole model.

    Args:
        cells: of one task.
        hidden: width of the model, whose feed-forward layers are four times as wide.
    """
    record = next(record for records in cells.values() for record in records)
    rows = record.provenance["rows"]
    keys = record.stages[0].keys_per_row
    share = keys / (keys + 6 * hidden)
    floor = (
        "" if record.majority is None else f" Always predicting the most frequent class gives {record.majority:.2f}."
    )
    gpus = {one.provenance.get("machine", {}).get("accelerator") for one in _every(cells)}
    named = " and ".join(f"one {gpu}" if gpu else "processors" for gpu in sorted(gpus, key=str))
    machine = f" Run on {named}." if any(gpus) else ""
    return (
        f"Trained on {rows['train']:,} rows, evaluated on {rows['eval']:,}; a query has {keys:.1f} valid keys, so "
        f"attention is {share:.1%} of the model's multiply-accumulates.{floor}{machine}"
    )


def losses(tasks: Mapping[str, Cells], bits: str) -> tuple[list[Line], list[Line]]:
    """For each task, loss of progressive pruning against the dense model, by sparsity and by keys per query.

    Args:
        tasks: cells by task.
        bits: of the cells to draw: those named BITS-SPARSITY, without variants.
    """
    plain = re.compile(rf"{re.escape(bits)}-[0-9.]+")
    by_sparsity, by_keys = [], []
    for series, (task, cells) in enumerate(tasks.items()):
        known = controls_of(cells)
        points = sorted(
            point for cell, records in cells.items() if plain.fullmatch(cell) for point in _points(records, known)
        )
        if points:
            lost, sparsity, keys = ([point[index] for point in points] for index in (2, 0, 1))
            by_sparsity.append(Line(task, sparsity, lost, series))
            by_keys.append(Line(task, keys, lost, series))
    return by_sparsity, by_keys


def _every(cells: Cells) -> list[Record]:
    return [record for records in cells.values() for record in records]


def controls_of(cells: Cells) -> dict[Start, float]:
    """Score of the dense model that each start is compared with: its own control, or else that of its seed."""
    found = _control_stages(cells)
    return {start: control.metrics[record.headline] for start, (record, control) in found.items()}


def _control_stages(cells: Cells) -> dict[Start, tuple[Record, StageRecord]]:
    every = _every(cells)
    of_seed = {_seed(record): (record, control) for record in every if (control := record.stage("dense_control"))}
    made_anew = {start_of(record): of_seed[_seed(record)] for record in every if _seed(record) in of_seed}
    return made_anew | control_stages(every)


def _seed(record: Record) -> tuple[int, float]:
    return record.provenance["seed"], start_of(record)[1]


def _points(records: Sequence[Record], known: Mapping[Start, float]) -> Iterable[tuple[float, float, float]]:
    found = [(record, stage) for record in records if (stage := record.stage("progressive"))]
    if found:
        yield (
            statistics.mean(stage.sparsity for _, stage in found),
            statistics.mean(stage.keys_per_row for _, stage in found),
            statistics.mean(change_of(record, stage, known) for record, stage in found),
        )


def change_of(record: Record, stage: StageRecord, known: Mapping[Start, float]) -> float:
    """Points of a stage above those of its dense model trained equally long; see `controls_of`."""
    return stage.metrics[record.headline] - reference_score(record, known)


def _stages(cell: str, records: Sequence[Record]) -> list[tuple[str, str]]:
    bits, _, asked = cell.partition("-")
    if bits == DENSE_CELL:
        longer = [(f"float, {records[0].recipe['compress']['epochs']:g} epochs", "dense_control")]
        return longer if asked else [("float", stage.name) for stage in records[0].stages]
    label = f"{'/'.join(bits)}, {asked}"
    names = ("quantized", "one_shot", "progressive") if asked == DETAILED else ("progressive",)
    return [(label, name) for name in names if records[0].stage(name)]


def _row(label: str, name: str, records: Sequence[Record], known: Mapping[Start, float], length: int) -> list[str]:
    found = [(record, stage) for record in records if (stage := record.stage(name))]
    stages = [stage for _, stage in found]
    scores = [stage.metrics[record.headline] for record, stage in found]
    lost = [change_of(record, stage, known) for record, stage in found]
    left = [
        statistics.mean(stage.work[f"{kind}_remaining"] / stage.work[f"{kind}_dense"] for stage in stages)
        for kind in ("bit_operations", "bytes")
    ]
    return [
        label,
        TITLES[name],
        mean_and_spread(scores),
        f"{statistics.mean(lost):+.2f}",
        f"{statistics.mean(stage.sparsity for stage in stages):.3f}",
        f"{statistics.mean(padded_to(stage, length) for stage in stages):.4f}",
        f"{statistics.mean(stage.keys_per_row for stage in stages):.2f}",
        *(f"{share:.1%}" for share in left),
        str(len(scores)),
    ]
