"""`--to csv`: survivors of every row, Sanger's load balance, and cycles on parallel lanes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from attnpress.export.load_balance import load_balance
from attnpress.export.sanger import write_sanger
from attnpress.export.sequences import AttendedSequence, by_layer
from attnpress.files import write_text
from attnpress.records.lanes import FILE as LANES
from attnpress.records.lanes import LaneRecord
from attnpress.records.reading import to_json

ROWS = "rows.csv"
ROWS_HEADER = ("layer", "sequence", "head", "query", "pairs", "survivors")

NOTES = (
    "rows.csv: valid pairs and survivors (P codes above zero) of every row of a real token, layers from 0.",
    "load_balance.csv is what bench_sanger.py of Sanger reads; its overall-sparsity is the share of pairs kept.",
    "lanes.json: cycles of P V by layer, lanes and schedule; attnpress report draws it from RUN_DIR/export/csv.",
)


def write_tables(sequences: Sequence[AttendedSequence], folder: Path, task: str) -> LaneRecord:
    """Write `rows.csv`, `load_balance.csv` and `lanes.json`; returns the last."""
    _write_rows(sequences, folder / ROWS)
    write_sanger(sequences, folder)
    found = load_balance(sequences, task)
    write_text(folder / LANES, to_json(found))
    return found


def _write_rows(sequences: Sequence[AttendedSequence], file: Path) -> None:
    numbers = {name: number for number, name in enumerate(by_layer(sequences))}
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow(ROWS_HEADER)
        for one in sequences:
            for head, (pairs, survivors) in enumerate(zip(one.pairs.tolist(), one.survivors.tolist(), strict=True)):
                for query, counts in enumerate(zip(pairs, survivors, strict=True)):
                    table.writerow((numbers[one.layer], one.number, head, query, *counts))
