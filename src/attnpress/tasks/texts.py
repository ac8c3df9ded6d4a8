"""Texts without labels, for calibration and evaluation when no labels exist.

They come from a file of JSON lines, CSV, tab-separated text, Parquet or plain lines, from a stream, or from a Hub
dataset. Unusable rows are counted and skipped; a file without any usable row is an error.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from attnpress.records.strict_json import is_unicode
from attnpress.tasks.lines import (
    SUFFIXES,
    Broken,
    Record,
    TaskError,
    ending,
    foreign_kind,
    newline_of,
    plain_rows,
    read_rows,
)
from attnpress.tasks.parquet import PARQUET, parquet_rows

USUAL = (("text",), ("sentence",), ("query", "passage"), ("query", "document"), ("sentence1", "sentence2"))
"""Default names of text columns; the first that a file has are used."""

SCANNED = 20_000
"""Number of rows at the beginning of a file from which texts are drawn."""

FEW_VALUES = 20
"""A second column with at most this many different values, all of them short, is taken for labels."""

Text = tuple[str, ...]
"""One text, or the two of a pair."""


@dataclass
class Texts:
    """Unique texts of a source, in an order drawn with a fixed seed.

    Attributes:
        rows: one text, or the two of a pair, each.
        columns: their names; empty for plain lines.
        skipped: number of rows without usable text, by reason.
        repeated: number of duplicate rows.
    """

    rows: list[Text]
    columns: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)
    repeated: int = 0


def read_texts(source: str, columns: Sequence[str] = (), limit: int = 1024) -> Texts:
    """Read texts from a file, a stream or a Hub dataset.

    Args:
        source: a path or a stream, such as /dev/stdin. The extension selects the format: .jsonl, .ndjson, .json, .csv,
            .tsv, .parquet; anything else holds one text per line (.txt is a table if columns are named), or JSON lines
            if the first line is an object. Or the name of a Hub dataset; "name:split" selects a split other than train.
        columns: one or two text columns. By default USUAL, or the only column with texts.
        limit: number of texts drawn from the first SCANNED rows.

    Raises:
        TaskError: the source is missing or has no usable text, a column does not exist, or a second column holds
            labels.
    """
    path = Path(source)
    if path.is_dir():
        raise TaskError(f"--texts {source}: is a folder; name a file of JSON lines, CSV, Parquet or plain lines")
    if path.exists():
        records = _of_file(path, columns)
    elif ending(path) in (*SUFFIXES, PARQUET) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise TaskError(f"--texts {source}: no such file")
    else:
        records = _of_hub(source)
    return _usable(source, list(islice(records, SCANNED)), tuple(columns), limit)


def texts_of(rows: Sequence[Any], limit: int = 1024) -> Texts:
    """Validate texts given in Python: strings, or pairs of strings.

    Raises:
        TaskError: the argument is not a list of those, or is empty.
    """
    if isinstance(rows, str):
        raise TaskError("texts: found one string; give a list of texts, or a pathlib.Path to a file of them")
    found: list[Text] = []
    for number, row in enumerate(rows):
        parts = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, list | tuple) else ()
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise TaskError(
                f"texts[{number}]: found {row!r:.60}; give a text, or a pair of texts for a model of pairs; labels are "
                "not needed"
            )
        found.append(parts)
    if len(set(map(len, found))) > 1:
        raise TaskError("texts: some are single texts and some are pairs; give one kind")
    return _drawn("texts", Texts(found), limit)


def _of_file(path: Path, columns: Sequence[str]) -> Iterator[Record | Broken]:
    if ending(path) == PARQUET:
        yield from (record for _, record in parquet_rows(path, columns))
        return
    if path.is_file():
        with path.open("rb") as content:
            if foreign := foreign_kind(content.read(256)):
                raise TaskError(f"--texts {path}: {foreign}")
    plain = ending(path) not in SUFFIXES or (ending(path) == ".txt" and not columns)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline_of(path)) as lines:
        if plain:
            yield from _plain_or_json(path, lines, bool(columns))
        else:
            yield from (record for _, record in read_rows(path, lines, columns))


def _plain_or_json(path: Path, lines: Iterable[str], named: bool) -> Iterator[Record | Broken]:
    """One text per line; JSON lines if the first nonempty line starts like an object."""
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        yield from (record for _, record in read_rows(Path("lines.jsonl"), chain([first], lines)))
        return
    if named:
        raise TaskError(f"--texts {path}: holds plain lines, which have no columns; drop --column")
    yield from (record for _, record in plain_rows(chain([first], lines), ""))


def _of_hub(source: str) -> Iterator[Record]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        yield from load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the Hub, the network and a dataset's files raise errors of many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise TaskError(
            f"--texts {source}: no such file, and no data set of that name could be read ({reason})"
        ) from None


def _usable(source: str, records: Sequence[Record | Broken], columns: Text, limit: int) -> Texts:
    found = Texts([], columns or _usual_columns(source, [row for row in records if isinstance(row, dict)]))
    for record in records:
        parts = [record] if isinstance(record, Broken) else [record.get(name) for name in found.columns]
        if isinstance(record, Broken):
            found.skipped[record.reason.split(" (")[0]] += 1
        elif all(isinstance(part, str) and part.strip() and is_unicode(part) for part in parts):
            found.rows.append(tuple(map(str, parts)))
        else:
            missing = next((name for name in found.columns if name not in record), None)
            found.skipped["no text" if missing is None else f"no column {missing!r}"] += 1
    if not found.rows:
        raise TaskError(_useless(source, records, found))
    _check_labels(source, found)
    return _drawn(f"--texts {source}", found, limit)


def _useless(source: str, records: Sequence[Record | Broken], found: Texts) -> str:
    if not records:
        return f"--texts {source}: is empty; give a few hundred texts such as the model will see"
    known = next((list(record) for record in records if isinstance(record, dict)), [])
    missing = [name for name in found.columns if name not in known]
    if missing and known:
        return f"--column {missing[0]}: {source} has no such column; it has {', '.join(known)[:200]}"
    reason, count = found.skipped.most_common(1)[0]
    return (
        f"--texts {source}: none of its {count} rows can be used ({reason}); name the column of the texts by --column"
    )


def _usual_columns(source: str, records: Sequence[Record]) -> Text:
    """The columns that hold the texts, if none is named."""
    first = records[0] if records else {"": ""}
    for names in USUAL:
        if all(isinstance(first.get(name), str) for name in names):
            return names
    texts = [name for name, value in first.items() if isinstance(value, str)]
    if len(texts) != 1:
        known = ", ".join(map(str, first))[:200]
        raise TaskError(f"--texts {source}: has the columns {known}; say which holds the texts: --column NAME")
    return (texts[0],)


def _check_labels(source: str, found: Texts) -> None:
    for place, name in enumerate(found.columns if len(found.columns) > 1 else ()):
        values = {row[place] for row in found.rows}
        if len(values) <= min(FEW_VALUES, len(found.rows) // 4) and all(len(value) <= 30 for value in values):
            raise TaskError(
                f"--column {name}: looks like labels ({len(values)} different values in {len(found.rows)} rows of "
                f"{source}), and none are needed; name columns of texts alone"
            )


def _drawn(where: str, found: Texts, limit: int) -> Texts:
    different = list(dict.fromkeys(found.rows))
    if not different:
        raise TaskError(f"{where}: is empty; give a few hundred texts such as the model will see")
    found.repeated = len(found.rows) - len(different)
    random.Random(0).shuffle(different)
    found.rows = different[:limit]
    return found
