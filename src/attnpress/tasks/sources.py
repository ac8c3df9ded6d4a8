"""Read sentences from delimited text, JSON lines and Hub datasets into the same columns.

Every reader names the file and line of an error. Nothing here depends on tasks or tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpress.records.strict_json import is_unicode
from attnpress.tasks.lines import JSON_LINES, Broken, Record, ending, foreign_kind, newline_of, read_rows
from attnpress.tasks.lines import TaskError as TaskError

if TYPE_CHECKING:
    from datasets import Dataset

TOLERATED, TOLERATED_SHARE = 10, 0.01
"""Maximum number of broken rows in a published file, or this share of its rows if that is more."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Names of a source's columns.

    Attributes:
        text: one column, or two for a pair of sentences.
        label: column of the label.
        header: column names of a file without a header line; None if the first line names them.
        mend: advice when a column is missing.
    """

    text: tuple[str, ...]
    label: str
    header: tuple[str, ...] | None = None
    mend: str = "name the columns of your file in data.text, data.text_pair and data.label"

    @property
    def names(self) -> tuple[str, ...]:
        """All columns to read."""
        return (*self.text, self.label)


@dataclass(frozen=True)
class Rows:
    """The examples of one split, as columns of equal length.

    Attributes:
        name: the file or dataset, for messages.
        text: one list of strings for each text column.
        label: the labels as stored in the source.
        lines: line number of each example in the source, from 1.
        sha256: hash of the source's bytes, or of the rows when they come from the Hub.
    """

    name: str
    text: tuple[list[str], ...]
    label: list[Any]
    lines: Sequence[int]
    sha256: str = field(repr=False, default="")

    def __len__(self) -> int:
        return len(self.label)

    def select(self, rows: Sequence[int]) -> Rows:
        """A selection of the examples in the given order, from the same source."""
        text = tuple([column[row] for row in rows] for column in self.text)
        label, lines = ([column[row] for row in rows] for column in (self.label, self.lines))
        return Rows(self.name, text, label, lines, self.sha256)

    def place(self, row: int) -> str:
        """Location of an example, for a message."""
        return f"{self.name}, line {self.lines[row]}"


def read_file(path: Path, columns: Columns, *, published: bool = False) -> Rows:
    """Read the named columns of a CSV, TSV or JSON-lines file. Blank lines are skipped.

    Args:
        path: UTF-8 file; its extension selects the format.
        columns: what to read.
        published: leave out a few broken rows, with a warning, since users cannot correct a published file.

    Raises:
        TaskError: unreadable or malformed file, a missing or duplicate column, or a text that is not a string.
    """
    text, sha256 = read_text(path)
    rows, lines = Rows(str(path), tuple([] for _ in columns.text), [], [], sha256), list[int]()
    broken: list[tuple[int, Broken]] = []
    stream = io.StringIO(text, newline=newline_of(path))
    for line, record in read_rows(path, stream, columns.names, columns.header):
        if not isinstance(record, Broken):
            _append(rows, record, columns, f"{path}, line {line}")
            lines.append(line)
        elif published:
            broken.append((line, record))
        else:
            raise _refused(path, text, line, record)
    if broken:
        _leave_out(path, text, broken, len(lines))
    return Rows(rows.name, rows.text, rows.label, lines, sha256)


def _leave_out(path: Path, text: str, broken: Sequence[tuple[int, Broken]], whole: int) -> None:
    if len(broken) > max(TOLERATED, TOLERATED_SHARE * whole) or len(broken) >= whole:
        raise _refused(path, text, *broken[0])
    line, first = broken[0]
    log.warning("%s: %d broken rows are left out (first: line %d: %s)", path, len(broken), line, first.reason)


def _refused(path: Path, text: str, line: int, row: Broken) -> TaskError:
    if ending(path) in JSON_LINES and text.lstrip().startswith("[") and row.reason.startswith("not"):
        return TaskError(f"{path}, line {line}: {row.refusal}; the whole file looks like one JSON array")
    return TaskError(f"{path}, line {line}: {row.refusal}")


def read_text(path: Path) -> tuple[str, str]:
    """The text of a UTF-8 file without its byte-order mark, and the sha256 of its bytes.

    Raises:
        TaskError: the file cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
        if foreign := foreign_kind(content[:8]):
            raise TaskError(f"{path}: {foreign}")
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
    """Load one split from the Hub, or from the cache of `datasets`.

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
    """The sha256 of rows without a file; the same on all machines and versions."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _append(rows: Rows, record: Record, columns: Columns, place: str) -> None:
    _require(record, columns.names, place, columns.mend)
    for name, column in zip(columns.text, rows.text, strict=True):
        if not isinstance(record[name], str):
            raise TaskError(f"{place}: column {name!r} must hold text, found {record[name]!r:.80}")
        if not is_unicode(record[name]):
            raise TaskError(f"{place}: column {name!r} holds an unpaired surrogate; correct or delete this line")
        column.append(record[name])
    label = record[columns.label]
    if isinstance(label, list | dict) or (isinstance(label, str) and not is_unicode(label)):
        raise TaskError(f"{place}: column {columns.label!r} must hold a name or a number, found {label!r:.80}")
    rows.label.append(label)


def _require(record: Record, names: Sequence[str], place: str, mend: str) -> None:
    missing = [name for name in names if name not in record]
    if missing:
        found = ", ".join(repr(name) for name in record) or "none"
        raise TaskError(f"{place}: no column {missing[0]!r}; columns found: {found}; {mend}")
