"""Inputs of a report: records, the samples beside them, and timings. Runs of one recipe are grouped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from attnpress.records.lanes import LaneRecord, read_lanes
from attnpress.records.reading import Amount, RecordError, Share, Some, build_record
from attnpress.records.run import Record, read_record
from attnpress.records.samples import Samples, read_samples
from attnpress.records.strict_json import parse_json
from attnpress.records.table import is_table, read_table


@dataclass(frozen=True)
class TimingRow:
    """Fields of a timing that are drawn; `attnpress bench --json` writes more."""

    seq_len: Some
    threads: Some
    sparsity: Share
    peer: str
    target: str
    ours_ms: Amount
    peer_ms: Amount
    ratio: Amount


TIMING_KEYS = {one.name for one in fields(TimingRow)}
BEFORE, AFTER = "dense", "progressive"
"""The stages that maps and histograms compare."""

LANES = Path("export", "csv", "lanes.json")
"""Where `attnpress export --to csv` writes a load balance in a run folder."""


@dataclass(frozen=True)
class Run:
    """One run: its name, its record, and files beside it."""

    name: str
    record: Record
    before: Samples | None
    after: Samples | None
    lanes: LaneRecord | None = None


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, one per seed."""

    label: str
    runs: list[Run]

    @property
    def records(self) -> list[Record]:
        """The records of the runs."""
        return [run.record for run in self.runs]


def read_runs(path: Path) -> list[Run]:
    """The runs of a table of records in the order of their names; for any other path, its one run.

    Raises:
        RecordError: see `records.table.read_table` and `records.run.read_record`.
    """
    if not is_table(path):
        return [read_run(path)]
    return [Run(f"{path.stem}-{name}", record, None, None) for name, record in sorted(read_table(path).items())]


def read_run(path: Path) -> Run:
    """Read a run folder, or a single record.

    Raises:
        RecordError: see `records.run.read_record`.
    """
    record = read_record(path)
    if not path.is_dir():
        return Run(path.stem, record, None, None)
    lanes = path / LANES
    found = read_lanes(lanes) if lanes.is_file() else None
    return Run(path.resolve().name, record, read_samples(path, BEFORE), read_samples(path, AFTER), found)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose recipes differ only in the seed, in the given order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_what_was_asked(run.record.recipe), sort_keys=True), []).append(run)
    labels = [_label(found[0].record) for found in groups.values()]
    return [
        Group(label if labels.count(label) == 1 else f"{label} ({found[0].name})", found)
        for label, found in zip(labels, groups.values(), strict=True)
    ]


def read_timings(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Timings that `attnpress bench --json` wrote: files given by name, and all in the given folders.

    Raises:
        RecordError: a file given by name holds no timings, or a field is of the wrong type.
    """
    timings = []
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            found = _timings(file)
            if found is None and not path.is_dir():
                raise RecordError(f"{file}: no timings; give a file that `attnpress bench --json` wrote")
            timings += found or []
    return timings


def _timings(file: Path) -> list[dict[str, Any]] | None:
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(data, list) and data and all(isinstance(row, dict) and row.keys() >= TIMING_KEYS for row in data)
    if whole:
        build_record(list[TimingRow], data, str(file), extra=True)
    return data if whole else None


def _what_was_asked(recipe: dict[str, Any]) -> dict[str, Any]:
    places = {"seed", "report_to", "checkpoint"}
    data = {key: value for key, value in recipe.get("data", {}).items() if key != "data_dir"}
    asked = {key: value for key, value in recipe.items() if key not in places}
    return {**asked, "data": data, "layers": recipe.get("layers", {})}  # old recipes have no layers


def _label(record: Record) -> str:
    attention = record.recipe["attention"]
    bits = "/".join(str(attention[name]["bits"] or "fp") for name in "qkvp")
    own = ", layers of their own" if record.recipe.get("layers") else ""
    return f"{record.recipe['data']['task']}, {bits} bits, sparsity {attention['sparsity']:g}{own}"
