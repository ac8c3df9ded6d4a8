"""Where sentences come from: delimited text, JSON lines and Hub datasets, read into the same columns.

Every reader names the file and line of what it cannot use. Nothing here knows about tasks or tokens.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]
Numbered = Iterator[tuple[int, Record]]

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json")
"""What `read_file` reads: quoted CSV, unquoted tab-separated text (.tsv, .txt), JSON lines (the last three)."""


class TaskError(ValueError):
    """Data or a task that cannot be used; the message names the field, file or line and how to mend it."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a source hold what.

    Attributes:
        text: one column, or two for a pair of sentences.
        label: column of the label.
        header: names of the columns of a file that has no header line; None when the first line names them.
        mend: advice for when a column is missing.
    """

    text: tuple[str, ...]
    label: str
    header: tuple[str, ...] | None = None
    mend: str = "name the columns of your file in data.text, data.text_pair and data.label"

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.text, self.label)


@dataclass(frozen=True)
class Rows:
    """The examples of one split, as columns of equal length.

    Attributes:
        name: the file or dataset, as messages call it.
        text: one list of strings for each text column.
        label: the labels as the source holds them.
        lines: where each example stands in the source, counted from 1.
        sha256: hash of the source's bytes, or of the rows when they come from the Hub.
    """

    name: str
    text: tuple[list[str], ...]
    label: list[Any]
    lines: Sequence[int]
    sha256: str = field(repr=False, default="")

    def __len__(self) -> int:
        return len(self.label)

    def place(self, row: int) -> str:
        """Where the example stands, for a message."""
        return f"{self.name}, line {self.lines[row]}"


def read_file(path: Path, columns: Columns) -> Rows:
    """Read the named columns of a CSV, TSV or JSON-lines file; blank lines are skipped.

    Raises:
        TaskError: unreadable or malformed file, a missing column, or a text that is not a string.
    """
    text, sha256 = read_text(path)
    rows = Rows(str(path), tuple([] for _ in columns.text), [], [], sha256)
    lines: list[int] = []
    for line, record in _records(path, text, columns.header):
        _append(rows, record, columns, f"{path}, line {line}")
        lines.append(line)
    return Rows(rows.name, rows.text, rows.label, lines, sha256)


def read_text(path: Path) -> tuple[str, str]:
    """A file's text (UTF-8, a byte-order mark dropped) and the sha256 of its bytes.

    Raises:
        TaskError: the file cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TaskError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None


def read_hub(path: str, config: str | None, split: str, columns: Columns) -> Rows:
    """Read one split of a Hub dataset.

    Raises:
        TaskError: the dataset cannot be loaded, or lacks a column.
    """
    table = load_hub(path, config, split, columns.names)
    text = tuple(list(table[name]) for name in columns.text)
    label = list(table[columns.label])
    rows = zip(*text, label, strict=True)
    return Rows(f"{path} ({split})", text, label, range(1, len(label) + 1), hash_rows(rows))


def load_hub(path: str, config: str | None, split: str, names: Sequence[str]) -> Dataset:
    """Load one split from the Hub, or from the cache that `datasets` keeps.

    Raises:
        TaskError: the dataset cannot be loaded, or lacks one of the columns `names`.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        table = load_dataset(path, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise TaskError(
            f"data.task: {path} ({split}) could not be loaded from the Hub: {error}; "
            "check the connection, or set data.data_dir to a local folder in the published layout"
        ) from error
    assert isinstance(table, Dataset)
    _require(dict.fromkeys(table.column_names), names, f"{path} ({split})", "the dataset on the Hub has changed")
    return table


def hash_rows(rows: Iterator[Any]) -> str:
    """The sha256 of rows that have no file of their own; stable over machines and versions."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _append(rows: Rows, record: Record, columns: Columns, place: str) -> None:
    _require(record, columns.names, place, columns.mend)
    for name, column in zip(columns.text, rows.text, strict=True):
        if not isinstance(record[name], str):
            raise TaskError(f"{place}: column {name!r} must hold text, found {record[name]!r}")
        column.append(record[name])
    rows.label.append(record[columns.label])


def _require(record: Record, names: Sequence[str], place: str, mend: str) -> None:
    missing = [name for name in names if name not in record]
    if missing:
        found = ", ".join(repr(name) for name in record) or "none"
        raise TaskError(f"{place}: no column {missing[0]!r}; columns found: {found}; {mend}")


def _records(path: Path, text: str, header: tuple[str, ...] | None) -> Numbered:
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return _json_records(path, text)
    fields = _csv_fields(path, text) if path.suffix == ".csv" else _tab_fields(text)
    return _named(path, fields, header)


def _named(path: Path, fields: Iterator[tuple[int, list[str]]], header: tuple[str, ...] | None) -> Numbered:
    names = list(header) if header else next(fields, (0, []))[1]
    for line, values in fields:
        if len(values) != len(names):
            raise TaskError(
                f"{path}, line {line}: {len(values)} fields, but {len(names)} columns ({', '.join(names)}); "
                "mend or delete this line"
            )
        yield line, dict(zip(names, values, strict=True))


def _tab_fields(text: str) -> Iterator[tuple[int, list[str]]]:
    # Published TSV files hold bare quotes, and text with exotic line separators: only \n ends a line here.
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.removesuffix("\r"):
            yield number, line.split("\t")


def _csv_fields(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            if values:
                yield reader.line_num, values
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num}: not valid CSV ({error}); mend this line") from None


def _json_records(path: Path, text: str) -> Numbered:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}, line {number}: not valid JSON ({error.msg}); write one object a line") from None
        if not isinstance(record, dict):
            raise TaskError(f"{path}, line {number}: a row is a JSON object, found {type(record).__name__}")
        yield number, record
