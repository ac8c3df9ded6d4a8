"""What a compressed model says of a file of texts: that of a run, and one that was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpress.cli import main
from attnpress.config import ConfigError
from attnpress.config.recipe import load_config
from attnpress.runs.finished import finished_classifier
from attnpress.runs.prediction import make_answer, run_file
from tests.runs.prediction_files import read, write

REVIEWS = ["good good film", "the plot is dull", "bad", "a great story with two good actor and one poor scene of film"]


@pytest.fixture
def reviews_file(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [json.dumps({"review": text}) for text in REVIEWS * 3])


@pytest.mark.parametrize("linear", ["float", "int8"])
def test_a_finished_run_says_what_its_model_says(
    linear: Any, finished: Path, reviews_file: Path, tmp_path: Path
) -> None:
    config, output = load_config(finished / "recipe.yaml"), tmp_path / "out.jsonl"
    done = run_file(
        finished, config, reviews_file, output, backend="reference", linear=linear, batch_size=5, warn=print
    )
    assert done.written == 12
    model, tokenizer = finished_classifier(finished)
    for line, text in zip(read(output), REVIEWS * 3, strict=True):
        with torch.no_grad():
            probs = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert line["label"] == ("no", "yes")[int(probs.argmax())]
        assert line["score"] == pytest.approx(float(probs.max()), abs=1e-5 if linear == "float" else 0.25)


def test_a_saved_folder_says_what_its_run_says(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = shutil.copytree(finished / "progressive", tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text("utf-8"))
    (tmp_path / "in.csv").write_text("review,text\n" + "".join(f"{text},{text}\n" for text in REVIEWS), "utf-8")
    words = ["--input", str(tmp_path / "in.csv"), "--backend", "reference", "--output"]
    assert main(["run", str(finished), *words, str(tmp_path / "run.jsonl")]) == 0
    assert main(["run", str(saved), *words, str(tmp_path / "saved.jsonl")]) == 0
    assert main(["run", str(saved), *words, str(tmp_path / "named.jsonl"), "--text", "review"]) == 0
    assert read(tmp_path / "run.jsonl") == read(tmp_path / "saved.jsonl") == read(tmp_path / "named.jsonl")
    assert {row["label"] for row in read(tmp_path / "saved.jsonl")} <= set(config["id2label"].values())
    capsys.readouterr()
    assert main(["run", str(saved), *words, str(tmp_path / "int8.jsonl"), "--linear", "int8"]) == 1
    assert "has no plan for int8 layers" in capsys.readouterr().err


def test_rows_of_a_length_go_together_and_answers_keep_their_order() -> None:
    class Tokenizer:
        def __call__(self, *columns: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(text)] * len(text) for text in columns[0]]}

        def pad(self, inputs: dict[str, Any], **_: Any) -> Any:
            shapes.append([len(row) for row in inputs["input_ids"]])
            return Inputs({"input_ids": torch.tensor([row[0] for row in inputs["input_ids"]])})

    class Inputs(dict[str, Any]):
        def to(self, _: Any) -> Inputs:
            return self

    class Model:
        device = "cpu"
        config = type("Config", (), {"problem_type": "regression"})

        def __call__(self, input_ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": input_ids.view(-1, 1)})

    shapes: list[list[int]] = []
    rows = [{"text": "x" * length} for length in (5, 1, 4, 2, 3)]
    said = make_answer(Model(), Tokenizer(), ["text"], 16, 2)(rows)
    assert said == [{"score": float(length)} for length in (5, 1, 4, 2, 3)]
    assert shapes == [[1, 2], [3, 4], [5]]


def test_the_command_reports_and_refuses(
    finished: Path, reviews_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reviews_file.open("a") as file:
        file.write("nonsense\n")
    words = ["run", str(finished), "--input", str(reviews_file), "--output", str(tmp_path / "said.jsonl")]
    assert main([*words, "--backend", "reference"]) == 0
    captured = capsys.readouterr()
    assert "predicted: 12 lines, skipped: 1" in captured.out
    assert "in.jsonl:13: not JSON" in captured.err
    assert main([*words, "--backend", "reference"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished compressed model"):
        finished_classifier(tmp_path)


def test_a_folder_is_answered_as_its_files_are(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    write(folder / "a.jsonl", [json.dumps({"review": text}) for text in REVIEWS])
    write(folder / "deep" / "b.txt", REVIEWS)
    words = ["run", str(finished), "--backend", "reference"]
    assert main([*words, "--input", str(folder / "a.jsonl"), "--output", str(tmp_path / "a.jsonl")]) == 0
    capsys.readouterr()
    many = [*words, "--input", str(folder), "--output", str(tmp_path / "out")]
    assert main(many) == 0
    captured = capsys.readouterr()
    assert "2 of 2 files: b.txt, 4 lines\npredicted: 8 lines, skipped: 0\noutput: " in captured.out
    assert "b.txt: read as plain lines: its first line is no header with a column 'review'" in captured.err
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert read(tmp_path / "out" / "deep" / "b.txt.jsonl") == read(tmp_path / "a.jsonl")
    monkeypatch.setattr("attnpress.runs.prediction.finished_classifier", None)  # nothing is missing: no model is loaded
    assert main(many) == 0
    assert "2 of 2 files are done already\npredicted: 8 lines" in capsys.readouterr().out
    assert main([*many, "--linear", "int8"]) == 1
    assert "was begun with another linear" in capsys.readouterr().err


def test_a_column_that_is_named_is_looked_for(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in.txt", REVIEWS)
    words = ["run", str(finished), "--backend", "reference", "--input", str(tmp_path / "in.txt"), "--output"]
    assert main([*words, str(tmp_path / "plain.jsonl")]) == 0
    assert [row["line"] for row in read(tmp_path / "plain.jsonl")] == [1, 2, 3, 4]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "table.jsonl"), "--text", "review"]) == 1
    assert "no text under 'review'" in capsys.readouterr().err


def test_options_of_engines_go_together(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", ['{"review": "good"}'])
    words = ["run", str(finished), "--input", str(source), "--output", str(tmp_path / "out")]
    assert main([*words, "--workers", "2"]) == 1
    assert "--workers is the number of workers of --engine ray" in capsys.readouterr().err
    assert main([*words, "--engine", "ray"]) == 1
    assert "give --input a folder, or several files" in capsys.readouterr().err
