"""Texts without labels: from every kind of file, and what is said where they cannot be used."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from attnpress.tasks.lines import TaskError
from attnpress.tasks.texts import read_texts, texts_of

TEXTS = [f"text number {number}" for number in range(12)]


def written(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


def parquet(folder: Path, **columns: list[Any]) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt", "a", "a.parquet", "stream"])
def test_every_kind_of_file_gives_the_same_texts_in_the_same_order(tmp_path: Path, name: str) -> None:
    lines = {
        "a.jsonl": "\n".join(json.dumps({"text": text, "label": 1}) for text in TEXTS),
        "a.csv": "id,text\n" + "\n".join(f"{number},{text}" for number, text in enumerate(TEXTS)),
        "a.tsv": "text\tid\n" + "\n".join(f"{text}\t0" for text in TEXTS),
        "a.txt": "\n".join(TEXTS) + "\n\n",
        "a": "\r\n".join(TEXTS),
        "stream": "\n\n" + "\n".join(json.dumps({"text": text}) for text in TEXTS),
    }
    source = parquet(tmp_path, text=TEXTS, number=[0] * 12) if name == "a.parquet" else None
    found = read_texts(source or written(tmp_path, name, lines[name]))
    assert sorted(row[0] for row in found.rows) == sorted(TEXTS)
    assert found.rows == texts_of(TEXTS).rows != [(text,) for text in TEXTS]
    assert not found.skipped


def test_a_text_counts_once_and_no_more_are_drawn_than_asked_for(tmp_path: Path) -> None:
    found = read_texts(written(tmp_path, "a.txt", "\n".join(TEXTS + TEXTS[:5])), limit=7)
    assert len(found.rows) == len(set(found.rows)) == 7
    assert found.repeated == 5


def test_columns_by_name_give_pairs(tmp_path: Path) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}", "n": number} for number in range(30)]
    source = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert set(read_texts(source, ["question", "answer"]).rows) == {(f"q{n}", f"a{n}") for n in range(30)}


def test_usual_columns_need_no_name(tmp_path: Path) -> None:
    rows = [{"id": "x", "query": f"q{number}", "passage": f"p{number}"} for number in range(3)]
    found = read_texts(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert found.columns == ("query", "passage")


def test_bad_rows_are_counted_by_reason(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', "{", '{"text": 3}', '{"text": "  "}', '{"other": "x"}', '{"text": "fine"}']
    found = read_texts(written(tmp_path, "a.jsonl", "\n".join(lines)))
    assert len(found.rows) == 2
    assert found.skipped == {"not JSON": 1, "no text": 2, "no column 'text'": 1}


LABELLED = "text,label\n" + "\n".join(f"text {number},{number % 2}" for number in range(40))


@pytest.mark.parametrize(
    ("name", "content", "columns", "said"),
    [
        ("a.jsonl", "", [], "is empty; give a few hundred texts"),
        ("a.txt", "\n \n", [], "is empty"),
        ("a.csv", "body,title\nx,y\n", [], "has the columns body, title; say which holds the texts: --column NAME"),
        ("a.csv", "body,title\nx,y\n", ["txt"], "--column txt: .* has no such column; it has body, title"),
        ("a.csv", LABELLED, ["text", "label"], "--column label: looks like labels .* none are needed"),
        ("a.txt", "plain\nlines\n", ["text"], "no such column"),
        ("a.log", "plain\nlines\n", ["text"], "holds plain lines, which have no columns; drop --column"),
        ("a.jsonl", "PK\x03\x04", [], "unpack it"),
        ("a.parquet", "not parquet", [], "not a whole Parquet file"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str, columns: list[str], said: str
) -> None:
    with pytest.raises(TaskError, match=said) as refused:
        read_texts(written(tmp_path, name, content), columns)
    assert "\n" not in str(refused.value)


def test_a_place_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no such file"):
        read_texts(str(tmp_path / "none.jsonl"))
    with pytest.raises(TaskError, match="is a folder"):
        read_texts(str(tmp_path))
    with pytest.raises(TaskError, match="no data set of that name could be read"):
        read_texts("nobody/nothing:test")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("one text", "found one string; give a list"),
        ([], "is empty"),
        (["good", 3], r"texts\[1\]: found 3"),
        ([("a fine film", 1)], "labels are not needed"),
        (["good", ("a", "b")], "some are single texts and some are pairs"),
    ],
)
def test_texts_of_python_are_checked(rows: Any, said: str) -> None:
    with pytest.raises(TaskError, match=re.compile(said)):
        texts_of(rows)


def test_a_stream_is_read_as_a_file_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS)))
    writer.start()
    found = read_texts(str(pipe))
    writer.join()
    assert found.rows == texts_of(TEXTS).rows


def test_scores_are_read_beside_the_texts(tmp_path: Path) -> None:
    rows = [{"a": f"a{n}", "b": f"b{n}", "gold": n / 2 if n % 2 else str(n / 2)} for n in range(10)]
    rows += [
        {"a": "x", "b": "y", "gold": "much"},
        {"a": "x", "b": "y", "gold": "nan"},
        {"a": "a0", "b": "b0", "gold": 9},
    ]
    found = read_texts(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))), ["a", "b"], scores="gold")
    assert found.scores == {(f"a{n}", f"b{n}"): n / 2 for n in range(10)}, "numbers of tables are texts"
    assert set(found.rows) == set(found.scores)
    assert found.skipped == {"no number in column 'gold'": 2}


@pytest.mark.parametrize(
    ("scores", "said"),
    [("marks", "--scores marks: .* has no such column; it has a, b"), ("b", "no number in column 'b'.* by --scores")],
)
def test_scores_that_are_none_are_refused(tmp_path: Path, scores: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        read_texts(written(tmp_path, "a.csv", "a,b\nx,y\n"), ["a", "b"], scores=scores)
