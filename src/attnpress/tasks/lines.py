"""Read rows of CSV, tab-separated text and JSON lines one at a time. A broken row is reported and reading continues.

Training rejects the first broken row; `attnpress run` skips and counts them. Both read files through this module.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpress.records.strict_json import JsonError, is_unicode, parse_json

Record = dict[str, Any]

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABS = (".tsv", ".txt")
SUFFIXES = (".csv", *TABS, *JSON_LINES)
"""Quoted CSV, unquoted tab-separated text (.tsv, .txt), JSON lines (the last three)."""

LONGEST_FIELD = 2**31 - 1
"""Maximum length of a CSV field in characters. Python's default is 131,072; its maximum is a C long."""

FOREIGN = {
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
    b"%PDF": "a PDF; convert it to JSON lines",
    b"\xff\xfe": "not UTF-8 text but UTF-16 or UTF-32; save it as UTF-8",
    b"\xfe\xff": "not UTF-8 text but UTF-16; save it as UTF-8",
    b"\x00\x00\xfe\xff": "not UTF-8 text but UTF-32; save it as UTF-8",
}


class TaskError(ValueError):
    """Data or a task cannot be used. The message names the field, file or line and says what to do."""


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read.

    Attributes:
        reason: short; the part before the first bracket is the same for all rows of one kind.
        refusal: message for rejecting the whole file because of this row.
    """

    reason: str
    refusal: str


Numbered = Iterator[tuple[int, Record | Broken]]
"""Rows with the number of their first line, from 1."""


def ending(path: Path) -> str:
    """The extension of a file's name, in lower case."""
    return path.suffix.lower()


def newline_of(path: Path) -> str:
    """The `newline` argument of `open` that `read_rows` needs for a file.

    Fields of CSV may contain line ends. In other formats only a line feed ends a line, since texts may contain exotic
    separators.
    """
    return "" if ending(path) == ".csv" else "\n"


def read_rows(
    path: Path, lines: Iterable[str], wanted: Sequence[str] = (), header: Sequence[str] | None = None
) -> Numbered:
    """Read rows of an open file by its extension: CSV, tab-separated text, or JSON lines for all others.

    Args:
        path: for its extension, and for messages.
        lines: opened with `newline_of`, as "utf-8-sig". With errors="surrogateescape", lines that are not UTF-8 are
            reported as broken.
        wanted: columns that must not be duplicated.
        header: column names of a file without a header line.

    Raises:
        TaskError: two columns have the same name, or a quote is never closed and consumes the rest of a CSV file.
    """
    if ending(path) in (".csv", *TABS):
        fields = _csv_fields(path, lines) if ending(path) == ".csv" else _tab_fields(lines)
        return _named(path, fields, wanted, header)
    return _json_rows(lines)


def plain_rows(lines: Iterable[str], column: str) -> Numbered:
    """Nonblank lines, each a row with its text under `column`; opened as for `read_rows`."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text = line.removesuffix("\n").removesuffix("\r")
            yield number, _not_text(text) or {column: text}


def foreign_kind(head: bytes) -> str | None:
    """The kind of file that starts with these bytes, and what to do; None if it may be UTF-8 text."""
    return next((text for magic, text in FOREIGN.items() if head.startswith(magic)), None)


def _named(
    path: Path, fields: Iterator[tuple[int, list[str] | Broken]], wanted: Sequence[str], header: Sequence[str] | None
) -> Numbered:
    names: Sequence[str] | None = header
    for line, values in fields:
        if isinstance(values, Broken):
            yield line, values
        elif names is None:
            names = values
            if twice := [name for name, times in Counter(names).items() if times > 1 and name in wanted]:
                raise TaskError(f"{path}, line {line}: several columns are called {twice[0]!r}; rename or remove one")
        elif len(values) != len(names):
            columns = ", ".join(names)[:200]
            reason = f"{len(values)} fields, but {len(names)} columns ({columns})"
            yield line, Broken(reason, f"{reason}; correct or delete this line")
        else:
            yield line, dict(zip(names, values, strict=True))


def _tab_fields(lines: Iterable[str]) -> Iterator[tuple[int, list[str] | Broken]]:
    for number, line in enumerate(lines, start=1):
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield number, _not_text(text) or text.split("\t")


def _csv_fields(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str] | Broken]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(lines, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise TaskError(
                    f"{path}, line {begin}: not valid CSV: a quote opens in this row and is never closed; correct it"
                ) from None
            yield begin, Broken(f"not CSV ({error})", f"not valid CSV ({error}); correct this line")
            continue
        if values:
            yield begin, next((broken for value in values if (broken := _not_text(value))), values)


def _json_rows(lines: Iterable[str]) -> Numbered:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _not_utf8(line) or _json_row(line)


def _json_row(line: str) -> Record | Broken:
    try:
        row = parse_json(line)
    except JsonError as error:
        return Broken(f"not JSON ({error})", f"not valid JSON ({error}); write one object a line")
    if not isinstance(row, dict):
        kind = type(row).__name__
        return Broken(f"not a JSON object but {kind}", f"a row is a JSON object, found {kind}; write one a line")
    return row


def _not_text(text: str) -> Broken | None:
    if "\0" in text:
        return Broken("a NUL byte in it", "a NUL byte, which no text holds; save the file as UTF-8 text")
    return _not_utf8(text)


def _not_utf8(text: str) -> Broken | None:
    return None if is_unicode(text) else Broken("not UTF-8", "not UTF-8 text; save the file as UTF-8")
