"""run: every line answered once, in order, however often the process dies; bad lines named and skipped."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from attnpress.runs import row_files
from attnpress.runs.row_files import PredictionError, Progress, Row, predict_file
from attnpress.tasks import TaskError
from attnpress.tasks.lines import Broken
from tests.runs.prediction_files import read, write

BAD = ['{"text": 3}', "[1]", "{", '{"other": "x"}']


def texts(count: int) -> list[str]:
    return [json.dumps({"text": "x" * (number % 7), "id": f"n{number}"}) for number in range(count)]


def lengths(rows: Sequence[Row]) -> list[Row]:
    return [{"length": len(row["text"])} for row in rows]


def predict(source: Path, output: Path, said: list[str] | None = None, **changes: Any) -> Progress:
    arguments: dict[str, Any] = {"answer": lengths, "columns": ["text"], "made_from": {"model": "m"}} | changes
    warn = (lambda _: None) if said is None else said.append
    return predict_file(arguments["answer"], arguments["columns"], source, output, arguments["made_from"], warn=warn)


def test_bad_lines_are_named_and_the_others_answered(tmp_path: Path) -> None:
    lines: list[str | bytes] = [*texts(2), "", *BAD, b'{"text": "\xff"}', '{"text": "fine"}']
    said: list[str] = []
    done = predict(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", said)
    assert read(tmp_path / "out.jsonl") == [
        {"line": 1, "id": "n0", "length": 0},
        {"line": 2, "id": "n1", "length": 1},
        {"line": 9, "length": 4},
    ]
    assert [line.removeprefix(f"{tmp_path}/in.jsonl:").split(" (")[0].split(";")[0] for line in said] == [
        "4: no text under 'text'",
        "5: not a JSON object but list",
        "6: not JSON",
        "7: no text under 'text'",
        "8: not UTF-8",
    ]
    assert (done.written, done.skipped) == (3, 5)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        "in.jsonl",
        "out.jsonl",
    ]


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_killed_run_goes_on(dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 4)
    source = write(tmp_path / "in.jsonl", [*texts(5), "{", *texts(6)])
    predict(source, tmp_path / "whole.jsonl")
    calls: list[int] = []

    def dying(rows: Sequence[Row]) -> list[Row]:
        calls.append(len(rows))
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return lengths(rows)

    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict(source, output, answer=dying)
    assert not output.exists()
    with (tmp_path / ".out.jsonl.unfinished").open("ab") as file:
        file.write(b'{"line": 99, "half')  # what a killed process may leave

    def counting(rows: Sequence[Row]) -> list[Row]:
        calls.append(len(rows))
        return lengths(rows)

    done = predict(source, output, answer=counting)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (done.lines, done.written, done.skipped) == (12, 11, 1)
    assert sum(calls) == 11 + calls[dies_at - 1], "only the chunk that died is answered twice"


def test_an_output_begun_from_something_else_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 2)
    source, output = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.jsonl"
    calls: list[int] = []

    def dying(rows: Sequence[Row]) -> list[Row]:
        calls.append(len(rows))
        return lengths(rows) if len(calls) < 2 else [][1]

    with pytest.raises(IndexError):
        predict(source, output, answer=dying)
    with pytest.raises(PredictionError, match=r"was begun with another model; .*delete"):
        predict(source, output, made_from={"model": "other"})
    write(source, texts(6))
    with pytest.raises(PredictionError, match="was begun with another input"):
        predict(source, output)


def test_outputs_are_not_overwritten_and_inputs_have_to_be_there(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", texts(1))
    with pytest.raises(PredictionError, match=r"none\.jsonl: no such file"):
        predict(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    predict(source, tmp_path / "out.jsonl")
    with pytest.raises(PredictionError, match="exists already"):
        predict(source, tmp_path / "out.jsonl")


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(1)), tmp_path / "out.jsonl"

    def again(rows: Sequence[Row]) -> list[Row]:
        with pytest.raises(PredictionError, match="another process is writing it"):
            predict(source, output)
        return lengths(rows)

    assert predict(source, output, answer=again).written == 1


def test_an_empty_input_gives_an_empty_output(tmp_path: Path) -> None:
    predict(write(tmp_path / "in.jsonl", ["", "  "]), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def dying_after(chunks: int) -> row_files.Answer:
    calls: list[int] = []

    def answer(rows: Sequence[Row]) -> list[Row]:
        calls.append(len(rows))
        if len(calls) > chunks:
            raise KeyboardInterrupt
        return lengths(rows)

    return answer


STATES: dict[str, Callable[[Path, Path], object]] = {
    "cut short": lambda partial, _: partial.write_bytes(partial.read_bytes()[:-9]),
    "emptied": lambda partial, _: partial.write_bytes(b""),
    "gone": lambda partial, _: partial.unlink(),
    "changed": lambda partial, _: partial.write_bytes(partial.read_bytes().replace(b"n1", b"n7")),
    "zeros": lambda partial, _: partial.write_bytes(bytes(len(partial.read_bytes()))),
    "progress is no JSON": lambda _, notes: notes.write_text("{", "utf-8"),
    "progress is a list": lambda _, notes: notes.write_text("[]", "utf-8"),
    "progress is no text": lambda _, notes: notes.write_bytes(b"\xff"),
    "lines skipped": lambda _, notes: change(notes, lines=11),
    "lines negative": lambda _, notes: change(notes, lines=-4),
    "lines a text": lambda _, notes: change(notes, lines="8"),
    "size too large": lambda _, notes: change(notes, size=10**9),
    "written otherwise": lambda _, notes: change(notes, written=7, skipped=1),
    "without its hash": lambda _, notes: change(notes, sha256=None),
    "with another key": lambda _, notes: change(notes, more=1),
}


def change(notes: Path, **changes: Any) -> None:
    notes.write_text(json.dumps(json.loads(notes.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_is_not_what_it_says_is_begun_anew(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 4)
    source, output, said = write(tmp_path / "in.jsonl", texts(14)), tmp_path / "out.jsonl", list[str]()
    with pytest.raises(KeyboardInterrupt):
        predict(source, output, answer=dying_after(2))
    STATES[state](tmp_path / ".out.jsonl.unfinished", tmp_path / ".out.jsonl.progress")
    assert predict(source, output, said).written == 14
    assert [row["id"] for row in read(output)] == [f"n{number}" for number in range(14)]
    assert len(said) == 1
    assert "is not what .out.jsonl.progress says of it; restarted" in said[0]
    assert b"\0" not in output.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"".join(b'{"other": "x"}\n' for _ in range(900)),
            "none of its 900 lines can be used .line 1: no text under 't",
        ),
        (b"[\n" + b",\n".join(b'{"text": "x"}' for _ in range(900)) + b"]", "the file looks like one JSON array"),
        (b"text\n" + b"x\n" * 900, "none of its 901 lines can be used .line 1: not JSON"),
        ("".join(f"{line}\n" for line in texts(30)).encode("utf-16"), "not UTF-8 text but UTF-16"),
        (gzip.compress(b'{"text": "x"}\n' * 900, mtime=0), "compressed by gzip; unpack it first"),
        (b"\xff" * 90, "none of its 1 lines can be used .line 1: not UTF-8"),
    ],
)
def test_an_input_of_which_nothing_can_be_used_is_an_error_and_leaves_nothing(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    said: list[str] = []
    with pytest.raises((PredictionError, TaskError), match=rf"in\.jsonl: .*{message}"):
        predict(tmp_path / "in.jsonl", tmp_path / "out.jsonl", said)
    assert said == []
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name and not path.name.endswith(".lock")]
    write(tmp_path / "in.jsonl", texts(3))
    assert predict(tmp_path / "in.jsonl", tmp_path / "out.jsonl").written == 3, "the next try is not blocked"


def test_many_bad_lines_are_told_in_few(tmp_path: Path) -> None:
    said: list[str] = []
    done = predict(write(tmp_path / "in.jsonl", [*texts(2), *BAD * 100]), tmp_path / "out.jsonl", said)
    assert (done.written, done.skipped) == (2, 400)
    assert len(said) == 6
    assert said[-1].endswith(
        "400 of 402 lines skipped: 200 no text under 'text' (line 3, 6, 7, 10, 11, ...); "
        "100 not a JSON object but list (line 4, 8, 12, 16, 20, ...); 100 not JSON (line 5, 9, 13, 17, 21, ...)"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", b'\xef\xbb\xbfid,text\r\n0,"good, ""film"""\r\n1,"two\r\nlines"\r\n'),
        ("in.tsv", b'id\ttext\n0\tgood, "film"\n1\ttwo lines!\n'),
        ("in.jsonl", b'\xef\xbb\xbf{"id": "0", "text": "good, \\"film\\""}\r\n{"text": "two lines!", "id": "1"}\r\n'),
    ],
)
def test_tables_and_lines_of_windows_are_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    predict(tmp_path / name, tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert [(row["id"], row["length"]) for row in found] == [("0", 12), ("1", 10)]
    assert found[0]["line"] == (1 if name == "in.jsonl" else 2)


def test_parquet_is_answered_as_lines_are_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [json.loads(line) for line in texts(9)]
    parquet.write_table(pa.Table.from_pylist([*rows, {"text": None, "id": "bad"}]), tmp_path / "in.parquet")
    predict(write(tmp_path / "in.jsonl", [*texts(9), '{"text": null, "id": "bad"}']), tmp_path / "lines.jsonl")
    monkeypatch.setattr(row_files, "CHUNK", 4)
    calls: list[int] = []

    def dies(chunk: Sequence[Row]) -> list[Row]:
        calls.append(len(chunk))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return lengths(chunk)

    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "in.parquet", tmp_path / "rows.jsonl", answer=dies)
    done = predict(tmp_path / "in.parquet", tmp_path / "rows.jsonl")
    assert (done.written, done.skipped) == (9, 1)
    assert read(tmp_path / "rows.jsonl") == read(tmp_path / "lines.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TaskError, match="not a whole Parquet file"):
        predict(tmp_path / "broken.parquet", tmp_path / "none.jsonl")


def test_a_table_is_gone_on_with_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 3)
    (tmp_path / "in.csv").write_text("text\n" + "".join(f'"{"x" * n}\nx"\n' for n in range(10)), "utf-8")
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "in.csv", tmp_path / "out.jsonl", answer=dying_after(2))
    predict(tmp_path / "in.csv", tmp_path / "out.jsonl")
    assert [(row["line"], row["length"]) for row in read(tmp_path / "out.jsonl")] == [
        (2 + 2 * n, n + 2) for n in range(10)
    ]


@pytest.mark.parametrize(
    "bad",
    ['{"text": "fine \\ud83d"}', '{"text": "x", "id": "\\ud83d"}', '{"text": "x", "id": NaN}',
     '{"text": "x", "id": 1e999}', '{"text": "x", "text": "y"}'],
)  # fmt: skip
def test_what_json_cannot_hold_costs_its_own_line_only(bad: str, tmp_path: Path) -> None:
    said: list[str] = []
    predict(write(tmp_path / "in.jsonl", [*texts(1), bad, *texts(1)]), tmp_path / "out.jsonl", said)
    assert [row["line"] for row in read(tmp_path / "out.jsonl")] == [1, 3]
    assert len(said) == 1
    assert ":2: " in said[0]


def test_a_line_that_the_model_fails_costs_no_other_its_answer(tmp_path: Path) -> None:
    def failing(rows: Sequence[Row]) -> list[Row | Broken]:
        if any(row["text"] == "xx" for row in rows):
            raise RuntimeError("cannot reshape\nmore")
        return [Broken("the model says NaN", "") if row["text"] == "xxx" else {"ok": 1} for row in rows]

    said: list[str] = []
    done = predict(write(tmp_path / "in.jsonl", texts(6)), tmp_path / "out.jsonl", said, answer=failing)
    assert (done.written, done.skipped) == (4, 2)
    assert [row["line"] for row in read(tmp_path / "out.jsonl")] == [1, 2, 5, 6]
    assert [line.partition("in.jsonl:")[2] for line in said] == [
        "3: not answered (RuntimeError: cannot reshape); skipped", "4: the model says NaN; skipped",
    ]  # fmt: skip


def test_a_model_that_answers_nothing_is_an_error(tmp_path: Path) -> None:
    def failing(rows: Sequence[Row]) -> list[Row]:
        raise RuntimeError("no memory")

    with pytest.raises(PredictionError, match=r"the model answers none of the lines 1 to 3: .*RuntimeError: no memory"):
        predict(write(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.jsonl", answer=failing)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_stream_is_read_and_written_on(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: write(pipe, texts(3)))
    writer.start()
    predict(pipe, tmp_path / "out.jsonl")
    writer.join()
    assert len(read(tmp_path / "out.jsonl")) == 3
    assert (
        predict(
            tmp_path / "out.jsonl", Path(os.devnull), columns=["id"], answer=lambda rows: [{} for _ in rows]
        ).written
        == 3
    )
