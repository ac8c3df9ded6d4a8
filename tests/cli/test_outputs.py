"""What commands write: only over what they made themselves, known before the work, and to streams as other tools do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnpress.cli import main
from attnpress.config.recipe import dump_config
from attnpress.files import MARKER


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of this module's own: what is tried here must not hurt others, even if it goes wrong."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("own") / "run")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a command must not begin: what is wrong with its output is known before."""

    def work(*_: Any, **__: Any) -> None:
        pytest.fail("the work began")

    for name in (
        "runs.evaluation.reevaluate", "export.run.finished_model", "report.page.make_report",
        "runs.inspection.inspect_model",
        "models.loading.load_backbone", "benchmark.attention.bench", "runs.prediction.finished_classifier",
    ):  # fmt: skip
        monkeypatch.setattr(f"attnpress.{name}", work)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


Words = Callable[[Path, Path, Path], list[object]]
OUTPUTS: dict[str, Words] = {
    "evaluate": lambda run, _, out: ["evaluate", run, "--json", out],
    "inspect": lambda _, model, out: ["inspect", model, "--text", "a film", "--json", out],
    "bench": lambda _, __, out: ["bench", "--seq-len", 16, "--json", out],
    "report": lambda run, _, out: ["report", run, "-o", out],
    "export": lambda run, _, out: ["export", run, "--to", "trace", "--output", out],
}
FILES = ["evaluate", "inspect", "bench", "report"]


def words(command: str, run: Path, model: Path, out: Path) -> list[str]:
    return [str(word) for word in OUTPUTS[command](run, model, out)]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/out", "file/out: Not a directory; a part of this path is a file"),
        ("x" * 300, "File name too long; choose a shorter name"),
        ("circle/out", "circle/out: Too many levels of symbolic links"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_before_the_work(
    command: str, place: str, message: str, run: Path, tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "circle").symlink_to("circle")
    assert main(words(command, run, tiny_model, tmp_path / place)) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("attnpress: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", FILES)
def test_a_file_of_someone_else_is_not_overwritten(
    command: str, run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").write_text("<!DOCTYPE html><title>mine</title>", encoding="utf-8")
    (tmp_path / "rows.json").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "link").symlink_to(run / "record.json")
    before = everything(tmp_path) | everything(run)
    inputs = [run / "record.json", run / "recipe.yaml", run / "progressive" / "config.json"]
    for out in [*inputs, *(tmp_path / name for name in ("page.html", "rows.json", "link"))]:
        assert main(words(command, run, tiny_model, out)) == 1
        assert f"{out}: exists, and is not what this command writes" in capsys.readouterr().err
    for folder in (tmp_path, run, run / "progressive"):
        assert main(words(command, run, tiny_model, folder)) == 1
        assert f"{folder}: is a folder; name a file" in capsys.readouterr().err
    assert everything(tmp_path) | everything(run) == before


@pytest.mark.usefixtures("no_work")
def test_export_destroys_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path) | everything(run)
    places = [run, run / "dense", run / "progressive", run.parent, Path(), Path("photos"), Path("link"), Path("/")]
    for place in places:
        assert main(["export", str(run), "--to", "trace", "--output", str(place)]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith(f"attnpress: {place}: ")
        assert errors.count("\n") == 1
    assert everything(tmp_path) | everything(run) == before


def test_an_export_is_replaced_by_the_next_and_only_by_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run), "--to", "trace", "--output", str(tmp_path / "trace")]
    assert main(command) == 0
    assert main([*command, "--rows", "2"]) == 0
    names = {path.name for path in (tmp_path / "trace").iterdir()}
    assert names == {"trace.safetensors", "export.json", MARKER}
    assert set(json.loads((tmp_path / "trace" / "export.json").read_text(encoding="utf-8"))["files"]) == {
        "trace.safetensors"
    }
    capsys.readouterr()
    (tmp_path / "trace" / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(command) == 1
    assert "holds notes.txt, which attnpress did not write" in capsys.readouterr().err
    assert (tmp_path / "trace" / "notes.txt").is_file()


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpress.report.page import Report

    made = Report('<meta name="generator" content="attnpress">\nPrüfung', {"work-1.svg": "<svg/>"})
    monkeypatch.setattr("attnpress.report.page.make_report", lambda *_: made)


@pytest.mark.usefixtures("quick_report")
def test_figures_of_someone_else_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "my-figures"
    figures.mkdir()
    (figures / "mine.svg").write_text("mine", encoding="utf-8")
    assert main(["report", "run", "-o", str(tmp_path / "my.html")]) == 1
    assert "my-figures: holds mine.svg, and is no folder of kind 'figures'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["my-figures", "mine.svg"]
    (figures / "mine.svg").unlink()
    for _ in range(2):
        assert main(["report", "run", "-o", str(tmp_path / "my.html")]) == 0
    (figures / "mine.svg").write_text("mine", encoding="utf-8")
    assert main(["report", "run", "-o", str(tmp_path / "my.html")]) == 1
    assert (figures / "mine.svg").read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_page_on_standard_output_is_alone_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run", "-o", name]) == 0
    found = capfd.readouterr()
    assert found.out == '<meta name="generator" content="attnpress">\nPrüfung'
    assert found.err == "report: /dev/stdout\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_report")
def test_a_page_to_nowhere_and_to_a_pipe(tmp_path: Path) -> None:
    assert main(["report", "run", "-o", "/dev/null"]) == 0
    reader, writer = os.pipe()
    assert main(["report", "run", "-o", f"/dev/fd/{writer}"]) == 0
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as page:
        assert page.read().endswith("Prüfung")
    assert list(tmp_path.iterdir()) == []


def test_figures_on_standard_output_are_json_and_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json", "-"]) == 0
    printed = capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out == printed
    assert json.loads(printed)["name"] == "progressive"


def test_figures_are_replaced_by_those_of_the_same_command(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.touch()
    for _ in range(2):
        assert main(["evaluate", str(run), "--json", str(file)]) == 0
    assert main(["inspect", str(run / "dense"), "--text", "a film", "--json", str(file)]) == 1
    assert json.loads(file.read_text(encoding="utf-8"))["name"] == "progressive"


def test_a_model_that_python_saved_is_evaluated_and_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = shutil.copytree(run / "progressive", tmp_path / "saved")
    config = json.loads((run / "record.json").read_text(encoding="utf-8"))["recipe"]["data"]
    data = [f"--set=data.{key}={value}" for key, value in config.items() if value is not None]
    assert main(["evaluate", str(run)]) == 0
    expected = capsys.readouterr().out
    assert main(["evaluate", str(saved), *data]) == 0
    assert capsys.readouterr().out == expected
    assert main(["export", str(saved), "--to", "trace", "--output", str(tmp_path / "trace"), *data]) == 0
    assert main(["evaluate", str(saved)]) == 1
    assert "which names no data; add --set data.task=NAME" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sweep", "leaderboard"])
def test_a_search_begins_in_no_folder_of_someone_else(
    command: str, tmp_path: Path, tiny_model: Path, tiny_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dump_config(tiny_recipe).replace("\n", "\n  ")
    text = {
        "sweep": f"search: {{sparsity: [0.5, 0.9]}}\nrecipe:\n  {recipe}\n",
        "leaderboard": f"recipe:\n  {recipe}\ntasks: {{film: {{}}}}\nrules: {{ours: {{source: here}}}}\n",
    }[command]
    (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sweep.json").write_text("{}", encoding="utf-8")
    before = everything(theirs)
    status = main([command, str(tmp_path / "spec.yaml"), "--output", str(theirs)])
    assert status == 1
    assert f"holds sweep.json, and is no folder of kind {command!r}" in capsys.readouterr().err
    assert everything(theirs) == before
