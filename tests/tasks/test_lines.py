"""Rows of files: what is read right, what is told as broken with its line, and what stops a whole file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnpress.tasks.lines import Broken, TaskError, foreign_kind, newline_of, read_rows
from attnpress.tasks.sources import Columns, read_file

BOM = b"\xef\xbb\xbf"
COLUMNS = Columns(("a",), "b")


def rows(path: Path, content: bytes, *wanted: str) -> list[tuple[int, Any]]:
    path.write_bytes(content)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline_of(path)) as lines:
        found = list(read_rows(path, lines, wanted))
    return [(line, row.reason.split(" (")[0] if isinstance(row, Broken) else row) for line, row in found]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b"a,b\n1,2\n"),
        ("x.CSV", BOM + b"a,b\r\n1,2\r\n\r\n"),
        ("x.csv", b"a,b\r1,2\r"),
        ("x.tsv", BOM + b"a\tb\r\n1\t2\r\n"),
        ("x.txt", b"a\tb\n1\t2"),
    ],
)
def test_tables_are_read_whatever_ends_their_lines(name: str, content: bytes, tmp_path: Path) -> None:
    assert rows(tmp_path / name, content) == [(2, {"a": "1", "b": "2"})]


@pytest.mark.parametrize("content", [b'{"a": "1"}\n', BOM + b'{"a": "1"}\r\n\r\n', BOM + BOM + b'{"a": "1"}'])
def test_json_lines_are_read_whatever_ends_their_lines(content: bytes, tmp_path: Path) -> None:
    assert rows(tmp_path / "x.jsonl", content) == [(1, {"a": "1"})]


def test_a_row_of_csv_is_named_by_the_line_in_which_it_begins(tmp_path: Path) -> None:
    found = rows(tmp_path / "x.csv", b'a,b\n"one\ntwo",2\n3,4,5\n"6"x,7\n8,9\n')
    assert found == [
        (2, {"a": "one\ntwo", "b": "2"}),
        (4, "3 fields, but 2 columns"),
        (5, "not CSV"),
        (6, {"a": "8", "b": "9"}),
    ]


def test_a_broken_line_costs_no_other(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b"{", b"[1]", b'{"a": "\xff"}', b'{"a": NaN}', b'{"a": 1, "a": 2}', b'"x"', b'{"a": 2}']
    assert rows(tmp_path / "x.jsonl", b"\n".join(lines)) == [
        (1, {"a": 1}), (2, "not JSON"), (3, "not a JSON object but list"), (4, "not UTF-8"), (5, "not JSON"),
        (6, "not JSON"), (7, "not a JSON object but str"), (8, {"a": 2}),
    ]  # fmt: skip
    assert rows(tmp_path / "x.tsv", b"a\tb\n\xff\t2\n3\x00\t4\n5\t6") == [
        (2, "not UTF-8"), (3, "a NUL byte in it"), (4, {"a": "5", "b": "6"}),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "comma"), [("x.csv", ","), ("x.tsv", "\t")])
def test_a_column_that_is_there_twice_is_refused_where_it_is_used(name: str, comma: str, tmp_path: Path) -> None:
    content = comma.join(["a", "b", "a"]).encode() + b"\n" + comma.join("123").encode() + b"\n"
    with pytest.raises(TaskError, match=rf"{name}, line 1: several columns are called 'a'; rename or remove one"):
        rows(tmp_path / name, content, "a")
    assert rows(tmp_path / name, content, "b") == [(2, {"a": "3", "b": "2"})]
    with pytest.raises(TaskError, match="several columns are called 'a'"):
        read_file(tmp_path / name, COLUMNS)


def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"x\.csv, line 3: not valid CSV: a quote opens .* is never closed"):
        rows(tmp_path / "x.csv", b'a,b\n1,2\n"3,4\n5,6\n7,8\n')


def test_a_field_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    text = "good film " * 14_000
    assert rows(tmp_path / "x.csv", f"a,b\n{text},2\n".encode()) == [(2, {"a": text, "b": "2"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "fine \\ud83d", "b": 1}', "line 1: column 'a' holds an unpaired surrogate"),
        (b'{"a": "fine", "b": "\\ud83d"}', "line 1: column 'b' must hold a name or a number"),
        (b'{"a": "fine", "b": [1]}', "line 1: column 'b' must hold a name or a number"),
        (b'{"a": "fine", "b": NaN}', r"line 1: not valid JSON \(NaN is not a JSON value\)"),
        (b'{"a": "fine", "b": 1, "b": 2}', r"line 1: not valid JSON \(duplicate key 'b'\)"),
        (b'[\n{"a": "fine", "b": 1}\n]', "line 1: not valid JSON .* the whole file looks like one JSON array"),
        ('{"a": "fine", "b": 1}'.encode("utf-16"), "not UTF-8 text but UTF-16"),
        (b"\x1f\x8b\x08\x00rest", "compressed by gzip; unpack it first"),
        (b"PK\x03\x04rest", "a zip archive or a spreadsheet"),
    ],
)
def test_training_data_that_cannot_be_used_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=rf"x\.jsonl.*{message}"):
        read_file(path, COLUMNS)


def test_a_published_file_may_have_a_few_broken_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.tsv"
    lines = ["a\tb", *(f"text {n}\t{n % 2}" for n in range(20))]
    lines[8:9] = ["one half", "of two\t0\t1"]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TaskError, match=r"train\.tsv, line 9: 1 fields, but 2 columns"):
        read_file(path, COLUMNS)
    found = read_file(path, COLUMNS, published=True)
    assert (len(found), found.lines[7:9]) == (19, [11, 12])
    assert "train.tsv: 2 broken rows are left out (first: line 9: 1 fields, but 2 columns (a, b))" in caplog.text
    path.write_text("a\tb\n" + "one half\n" * 11 + "text\t1\n" * 20, encoding="utf-8")
    with pytest.raises(TaskError, match=r"line 2: 1 fields"):
        read_file(path, COLUMNS, published=True)


def test_text_is_of_no_foreign_kind() -> None:
    assert foreign_kind(b'{"a": 1}') is None
    assert foreign_kind(b"") is None
