"""Folders of files of rows: each answered in its own file, what is missing alone, and nothing that is not ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from attnpress.files import OutputError, read_marker
from attnpress.locks import alone, locked
from attnpress.runs import row_files
from attnpress.runs.row_files import PredictionError, Progress, Row, finish_file
from attnpress.runs.row_folders import Outcome, Pair, are_many, held_folder, pair_files, predict_files
from attnpress.tasks import TaskError
from tests.runs.prediction_files import read, write

MADE = {"model": "m"}


def lengths(rows: Sequence[Row]) -> list[Row]:
    return [{"length": len(row["text"])} for row in rows]


def texts(count: int) -> list[str]:
    return [json.dumps({"text": "x" * number, "id": number}) for number in range(count)]


class Local:
    """Answers one file after the other, and counts them."""

    def __init__(self, answer: row_files.Answer = lengths) -> None:
        self.answer, self.begun = answer, list[str]()

    def __call__(self, pairs: Sequence[Pair]) -> Iterator[Outcome]:
        for pair in pairs:
            self.begun.append(pair.source.name)
            try:
                yield Outcome(pair, finish_file(self.answer, ["text"], pair.source, pair.output, MADE, warn=print))
            except (PredictionError, TaskError) as error:
                yield Outcome(pair, None, str(error))


def predict(
    sources: Path | Sequence[Path],
    output: Path,
    engine: Any = None,
    *,
    made_from: dict[str, str] = MADE,
    said: list[str] | None = None,
) -> Progress:
    warn = (lambda _: None) if said is None else said.append
    pairs = pair_files([sources] if isinstance(sources, Path) else sources, output, warn)
    with held_folder(output):
        return predict_files(engine or Local(), pairs, made_from, warn=warn, notify=lambda _: None)


def outputs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = [path for path in folder.rglob("*.jsonl") if not path.name.startswith(".")]
    return {str(path.relative_to(folder)): read(path) for path in sorted(files)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind, in folders."""
    import pyarrow as pa
    from pyarrow import parquet

    place = tmp_path / "in"
    (place / "deep" / "er").mkdir(parents=True)
    (place / ".hidden").mkdir()
    write(place / "a.jsonl", texts(3))
    (place / "a.csv").write_text("id,text\n7,xxxx\n", "utf-8")
    (place / "deep" / "b.tsv").write_text("text\tid\nxx\t8\n", "utf-8")
    (place / "deep" / "plain.txt").write_text("x y z\n\nxx\n", "utf-8")
    parquet.write_table(pa.Table.from_pylist([{"text": "xxx", "id": 9}]), place / "deep" / "er" / "c.parquet")
    write(place / "deep" / "empty.jsonl", [""])
    for left_out in (place / "readme.md", place / ".a.jsonl.swp", place / ".hidden" / "h.jsonl"):
        write(left_out, texts(1))
    return place


def test_the_output_mirrors_the_input(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = predict(folder, tmp_path / "out", said=said)
    assert outputs(tmp_path / "out") == {
        "a.csv.jsonl": [{"line": 2, "id": "7", "length": 4}],
        "a.jsonl": [{"line": line + 1, "id": line, "length": line} for line in range(3)],
        "deep/b.tsv.jsonl": [{"line": 2, "id": "8", "length": 2}],
        "deep/empty.jsonl": [],
        "deep/er/c.parquet.jsonl": [{"line": 1, "id": 9, "length": 3}],
        "deep/plain.txt.jsonl": [{"line": 1, "length": 5}, {"line": 3, "length": 2}],
    }
    assert (done.written, done.skipped) == (8, 0)
    assert read_marker(tmp_path / "out").what == "predictions"  # type: ignore[union-attr]
    assert [line.partition(": ")[2] for line in said] == ["left out, not of a kind that is read: readme.md"]


def test_several_inputs_keep_their_names(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.data", texts(1))
    assert not are_many([other])
    assert are_many([folder])
    assert are_many([other, folder])
    predict([other, folder / "deep", folder / "a.jsonl"], tmp_path / "out")
    assert list(outputs(tmp_path / "out")) == [
        "a.jsonl",
        "deep/b.tsv.jsonl",
        "deep/empty.jsonl",
        "deep/er/c.parquet.jsonl",
        "deep/plain.txt.jsonl",
        "other.data.jsonl",
    ]


def test_a_rerun_answers_what_is_missing(folder: Path, tmp_path: Path) -> None:
    first, again = Local(), Local()
    whole = predict(folder, tmp_path / "whole", first)
    stopped = Local(lambda rows: lengths(rows) if stopped.begun[-1] != "b.tsv" else [][1])
    with pytest.raises(IndexError):
        predict(folder, tmp_path / "out", stopped)
    assert list(outputs(tmp_path / "out")) == ["a.csv.jsonl", "a.jsonl"]
    assert predict(folder, tmp_path / "out", again) == whole, "sums are those of one run"
    assert again.begun == first.begun[2:]
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    write(folder / "new.jsonl", texts(2))
    (tmp_path / "out" / "a.jsonl").unlink()
    write(folder / "a.jsonl", texts(5))  # another input, for an output that its user has deleted
    third = Local()
    predict(folder, tmp_path / "out", third)
    assert third.begun == ["a.jsonl", "new.jsonl"]
    assert len(outputs(tmp_path / "out")["a.jsonl"]) == 5


def test_a_file_that_was_interrupted_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 2)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", texts(6))
    calls: list[int] = []

    def dying(rows: Sequence[Row]) -> list[Row]:
        calls.append(rows[0]["line"])
        return lengths(rows) if len(calls) != 3 else [][1]

    with pytest.raises(IndexError):
        predict(tmp_path / "in", tmp_path / "out", Local(dying))
    assert outputs(tmp_path / "out") == {}
    predict(tmp_path / "in", tmp_path / "out", Local(dying))
    assert calls == [1, 3, 5, 5]
    assert [row["id"] for row in outputs(tmp_path / "out")["a.jsonl"]] == list(range(6))


def test_a_file_that_cannot_be_answered_costs_no_other_its_answers(folder: Path, tmp_path: Path) -> None:
    write(folder / "a.jsonl", ["{", "["])
    (folder / "deep" / "er" / "c.parquet").write_bytes(b"PAR1")
    said: list[str] = []
    with pytest.raises(PredictionError, match=r"2 of 6 files are not answered, the others are: .*a\.jsonl: none of"):
        predict(folder, tmp_path / "out", said=said)
    assert len(outputs(tmp_path / "out")) == 4
    assert [line for line in said if "not a whole Parquet file" in line]
    write(folder / "a.jsonl", texts(1))
    (folder / "deep" / "er" / "c.parquet").unlink()
    rest = Local()
    assert predict(folder, tmp_path / "out", rest).written == 5
    assert rest.begun == ["a.jsonl"]


def test_a_file_that_cannot_be_read_is_one_of_them(folder: Path, tmp_path: Path) -> None:
    (folder / "a.jsonl").unlink()
    (folder / "a.jsonl").symlink_to("nowhere")
    with pytest.raises(PredictionError, match=r"1 of 6 files .*a\.jsonl: No such file"):
        predict(folder, tmp_path / "out")


def test_what_is_there_and_not_ours_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    out, idle = tmp_path / "out", Local()
    out.mkdir()
    write(out / "mine.jsonl", texts(1))
    with pytest.raises(OutputError, match=r"holds mine\.jsonl, and is no folder of kind 'predictions'"):
        predict(folder, out, idle)
    shutil.rmtree(out)
    predict(folder, out)
    (out / "a.csv.jsonl").unlink()

    with pytest.raises(PredictionError, match=r"was begun with another model; .*delete .*a\.jsonl \(and 4 more\)$"):
        predict(folder, out, idle, made_from={"model": "other"})
    (out / "deep" / "b.tsv.jsonl").write_text("{}\n", "utf-8")
    with pytest.raises(PredictionError, match=r"b\.tsv\.jsonl: was changed after it was written"):
        predict(folder, out, idle)
    (out / "deep" / "b.tsv.jsonl").unlink()
    write(folder / "a.jsonl", texts(7))
    with pytest.raises(PredictionError, match="was begun with another input"):
        predict(folder, out, idle)
    (out / ".a.jsonl.progress").unlink()
    with pytest.raises(PredictionError, match=r"exists, and \.a\.jsonl\.progress does not say how it was made"):
        predict(folder, out, idle)
    assert idle.begun == []


def test_inputs_that_cannot_be_paired_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    write(folder / "a.csv.jsonl", texts(1))
    for sources, output, message in [
        ([tmp_path / "none"], "out", r"holds no file to read; their names end in \.csv"),
        ([tmp_path / "absent", folder], "out", "absent: no such file; give files, or folders"),
        ([Path("/dev/stdin"), folder], "out", "a stream has no name"),
        ([folder], "in/out", "lies in the input folder"),
        ([folder], "in", "lies in the input folder"),
        ([folder], "out", r"a\.csv and .*a\.csv\.jsonl: both would be answered in"),
    ]:
        with pytest.raises(PredictionError, match=message):
            pair_files(sources, tmp_path / output, lambda _: None)
    with pytest.raises(OutputError, match="is a file; name a folder"), held_folder(Path("/dev/stdout")):
        pass


def test_two_processes_do_not_work_on_one_folder_nor_write_one_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_folder(out), pytest.raises(PredictionError, match="another process is at work there"), held_folder(out):
        pass
    pair, said = Pair(folder / "a.jsonl", out / "a.jsonl"), list[str]()

    def other(text: str) -> None:
        """The one that writes it says so, and is done."""
        said.append(text)
        lock.__exit__(None, None, None)

    lock = alone(pair.output)
    lock.__enter__()
    done = finish_file(lengths, ["text"], pair.source, pair.output, MADE, warn=other)
    assert done.written == 3
    assert said == [f"{pair.output}: another process is writing it; waiting for its end"]
    with locked(out / "run.lock"):
        assert finish_file(lambda _: [][1], ["text"], pair.source, pair.output, MADE, warn=print) == done
