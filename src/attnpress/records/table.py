"""Table of records: many runs in brief form in one file, the source of the tables and figures of evidence.

`NAME.json` holds the runs of one table, one line each, by cell and seed. A brief record lacks the figures of layers and
heads and the training logs, which are nine tenths of the full record in the run folder.
It has the scores of rows of the compared stages only.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from attnpress.records.reading import RecordError, read_text
from attnpress.records.run import Record, StageRecord, from_plain, read_record
from attnpress.records.strict_json import JsonError, parse_json

FORMAT = 1
RUN_NAME = re.compile(r".+-seed[0-9]{1,18}")
"""Pattern of a run's name in a table: cell and seed."""

HEADER = re.compile(r'\s*\{\s*"format"\s*:')
"""How a table starts; records of other kinds start differently."""


def brief(record: Record) -> Record:
    """The record without layers, heads and training logs; it keeps the errors of the layers' outputs.

    Scores of rows are kept for the dense model trained equally long and for the last stage.
    """
    compared = {"dense_control", *(stage.name for stage in record.stages[-1:])}
    stages = [_brief_stage(stage, has_rows=stage.name in compared) for stage in record.stages]
    return dataclasses.replace(record, stages=stages, training={})


def _brief_stage(stage: StageRecord, *, has_rows: bool) -> StageRecord:
    rows = stage.row_scores if has_rows else None
    return dataclasses.replace(stage, layers=[], output_errors=stage.errors_by_layer(), row_scores=rows)


def table_text(records: Mapping[str, Record]) -> str:
    """Content of a table file: one line per run, ordered by name, so that another run adds one line.

    Args:
        records: brief records, by the name of their run.
    """
    lines = [f"{json.dumps(name)}: {_line(records[name])}" for name in sorted(records)]
    return f'{{"format": {FORMAT}, "records": {{\n' + ",\n".join(lines) + "\n}}\n"


def _line(record: Record) -> str:
    plain = dataclasses.asdict(record)
    for part, key in [(plain, "targets"), *((stage, "row_scores") for stage in plain["stages"])]:
        if part[key] is None:  # so that a record from before there were any stays the line that it was
            del part[key]
    return json.dumps(plain, separators=(",", ":"), allow_nan=False)


def is_table(file: Path) -> bool:
    """True if a file starts like a table; the rest may still be damaged."""
    return file.is_file() and bool(HEADER.match(read_text(file)))


def read_table(file: Path) -> dict[str, Record]:
    """The records of a table file, by the name of their run.

    Raises:
        RecordError: the file is missing, is not a table or of a newer format, or `run.from_plain` refuses a record.
    """
    try:
        data = parse_json(read_text(file))
    except JsonError as error:
        raise RecordError(f"{file}: not a table of records (line {error.line}: {error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("records"), dict):
        raise RecordError(f"{file}: not a table of records; name another folder, or move this file away")
    if data.get("format") != FORMAT:
        raise RecordError(f"{file}: format {data.get('format')!r:.40}; this version reads {FORMAT}: update attnpress")
    if unknown := sorted(data.keys() - {"format", "records"}):
        raise RecordError(f"{file}: damaged table ({unknown[0]!r:.40}): this key is not known")
    for name in data["records"]:
        if not RUN_NAME.fullmatch(name):
            raise RecordError(f"{file}: damaged table ({name!r:.40}): runs are called CELL-seedN")
    return {name: from_plain(plain, f"{file}: {name:.80}") for name, plain in data["records"].items()}


def recorded(file: Path) -> dict[str, Record]:
    """All records of a table: those in its file, if it exists, and those in separate files beside it.

    If a run is in both, the record in the table is used.

    Raises:
        RecordError: see `read_table` and `run.read_record`.
    """
    apart = {run: read_record(path) for run, path in records_apart(file).items()}
    return apart | (read_table(file) if file.is_file() else {})


def records_apart(file: Path) -> dict[str, Path]:
    """Records of a table in separate files, by the name of their run.

    They are named `NAME-CELL-seedN.json` and lie beside the table's file, as in older versions.
    """
    found = {path.stem.removeprefix(f"{file.stem}-"): path for path in sorted(file.parent.glob(f"{file.stem}-*.json"))}
    return {run: path for run, path in found.items() if RUN_NAME.fullmatch(run)}


def table_files(folder: Path) -> list[Path]:
    """The tables of a folder: existing ones, and those that separate records belong to.

    A separate record belongs to the table that its name starts with, up to the first hyphen.
    """
    found = set()
    for path in folder.glob("*.json"):
        if is_table(path):
            found.add(path)
        elif apart := re.fullmatch(r"([a-z0-9]+)-.+-seed[0-9]+", path.stem):
            found.add(folder / f"{apart[1]}.json")
    return sorted(found)
