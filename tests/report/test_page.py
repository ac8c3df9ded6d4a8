"""The page: everything a run recorded is on it, nothing is fetched, and what is missing is said."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from attnpress.records.reading import RecordError
from attnpress.records.run import StageRecord, read_record
from attnpress.records.table import brief, table_text
from attnpress.report.attention_figures import chosen_heads, threshold_at
from attnpress.report.figures import describe_curves, describe_heads, head_values, remaining_work
from attnpress.report.inputs import group_runs, read_run, read_timings
from attnpress.report.page import Report, ReportError, make_report
from attnpress.report.plots import COLORS, PRINT, Line, bars, curves, to_svg

RECORDS = Path(__file__).parents[2] / "records"
TIMING = {
    "seq_len": 128, "batch": 8, "heads": 12, "head_dim": 64, "sparsity": 0.95, "threads": 1, "target": "avx2",
    "peer": "sdpa", "ours_ms": 1.0, "peer_ms": 2.5, "ratio": 2.5, "spread": 0.02,
}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with timings beside its record."""
    folder = tmp_path_factory.mktemp("report") / "run"
    (folder / "samples").mkdir(parents=True)
    for name in ("record.json", "samples/dense.safetensors", "samples/progressive.safetensors"):
        shutil.copyfile(finished / name, folder / name)
    (folder / "bench.json").write_text(json.dumps([TIMING, {**TIMING, "seq_len": 512, "ratio": 0.8}]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> Report:
    return make_report([run])


def changed(run: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A record alone, changed."""
    data = json.loads((run / "record.json").read_text(encoding="utf-8"))
    change(data)
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_every_recorded_figure_is_drawn(report: Report) -> None:
    kinds = {re.sub(r"(-\d+)+\.svg$", "", name).removesuffix(".svg") for name in report.figures}
    heads = {f"heads-{name}" for name in ("sparsity", "threshold", "mass", *(f"scale-{x}" for x in "qkv"))}
    errors = {f"heads-error-{name}" for name in (*"qkvp", "output")}
    training = {f"training-{name}" for name in ("loss", "sparsity", "metric")}
    assert kinds == heads | errors | training | {"metric", "work", "histogram", "map", "speed-sdpa"}
    assert sum(name.startswith("map-") for name in report.figures) == 9, "three heads on three inputs"
    assert "lacks" not in report.html


def test_the_page_needs_nothing_but_itself(report: Report) -> None:
    assert not re.search(r'(?:src|href)="(?!#|data:)', report.html)
    assert "@import" not in report.html
    assert not re.search(r"url\((?!#)", report.html)
    assert "<script" not in report.html


def test_each_drawing_says_in_words_what_it_shows(report: Report) -> None:
    for name, svg in report.figures.items():
        root = ElementTree.fromstring(svg)
        title, words = (root.find(f"{SVG}{tag}") for tag in ("title", "desc"))
        assert title is not None
        assert words is not None
        assert root.get("role") == "img"
        assert (root.get("aria-labelledby"), root.get("aria-describedby")) == (title.get("id"), words.get("id"))
        assert len(words.text or "") > 30, name
        assert re.search(r"\d", words.text or ""), "figures in words, too"
    assert report.html.count('role="img"') == len(report.figures)


def test_ids_are_unique_and_references_resolve(report: Report) -> None:
    ids = re.findall(r'\bid="([^"]+)"', report.html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', report.html)) <= set(ids)


def test_colours_follow_the_page_and_files_stand_alone(report: Report) -> None:
    marks = re.compile("#0[123]0[234]0[345]")
    assert "fill: var(--ink)" in report.html
    assert not marks.search(report.html)
    for svg in report.figures.values():
        assert PRINT["ink"] in svg
        assert "var(--" not in svg
        assert not marks.search(svg)


def test_the_same_records_make_the_same_page(run: Path, report: Report) -> None:
    assert make_report([run]) == report


def test_numbers_of_the_record_are_on_the_page(run: Path, report: Report) -> None:
    record = read_record(run)
    last = record.stages[-1]
    assert f"{last.metrics['accuracy']:.2f} against {record.stages[0].metrics['accuracy']:.2f} dense" in report.html
    assert f"{last.sparsity:.1%} of the valid pairs skipped" in report.html
    assert record.provenance["weights"]["base"] in report.html
    assert "max_length: 32" in report.html, "the recipe"


def test_what_a_record_lacks_is_said(run: Path, tmp_path: Path) -> None:
    def age(data: dict[str, Any]) -> None:
        for stage in data["stages"]:
            for head in (head for layer in stage["layers"] for head in layer["heads"]):
                del head["errors"]
        for entries in data["training"].values():
            for entry in entries:
                entry.pop("eval_accuracy", None)
                entry.pop("sparsity_achieved", None)

    html = make_report([changed(run, tmp_path / "old", age)]).html
    for what in ("the metric while training", "quantization errors", "samples of attention"):
        assert f"The record lacks {what}:" in html
    assert "No timings are here" in html
    assert "training-sparsity-1" in html, "what was asked is drawn all the same"
    assert "Three heads" not in html, "nothing is introduced that is not there"


def test_committed_records_are_drawn() -> None:
    paths = sorted(RECORDS.glob("*.json"))
    drawn = make_report(paths).figures
    assert {
        f"work-{number}.svg" for number in range(1, len({path.stem.split("-seed")[0] for path in paths}) + 1)
    } <= set(drawn)


def test_a_table_of_records_is_drawn_as_its_runs(run: Path, tmp_path: Path) -> None:
    record = read_record(run)
    other = dataclasses.replace(record, recipe={**record.recipe, "seed": 1})
    (tmp_path / "movie.json").write_text(table_text({"8888-seed0": brief(record), "8888-seed1": brief(other)}), "utf-8")
    report = make_report([tmp_path / "movie.json"])
    assert "Run movie-8888-seed0" in report.html
    assert "Run movie-8888-seed1" in report.html
    assert "The record lacks figures of heads: it was made before" in report.html
    assert {"metric-1.svg", "work-1.svg"} <= report.figures.keys()


def test_a_run_that_has_just_begun_is_drawn(run: Path, tmp_path: Path) -> None:
    begun = changed(run, tmp_path / "begun", lambda data: data.update(stages=[], training={}))
    assert "not compressed to the end yet" in make_report([begun]).html
    half = changed(run, tmp_path / "half", lambda data: data.update(stages=data["stages"][:2]))
    assert "not compressed to the end yet" in make_report([half]).html


def test_seeds_of_a_recipe_stand_together(run: Path, tmp_path: Path) -> None:
    def reseed(data: dict[str, Any]) -> None:
        data["recipe"]["seed"] = 1
        data["stages"][-1]["metrics"]["accuracy"] += 2

    other = changed(run, tmp_path / "other", reseed)
    foreign = changed(run, tmp_path / "foreign", lambda data: data["recipe"]["attention"].update(sparsity=0.5))
    groups = group_runs([read_run(path) for path in (run, other, foreign)])
    assert [[found.name for found in group.runs] for group in groups] == [["run", "other"], ["foreign"]]
    html = make_report([run, other, foreign]).html
    score = read_record(run).stages[-1].metrics["accuracy"]
    assert f"{score + 1:.2f} ± 1.41" in html
    assert "against dense" in html
    for group in groups:
        assert f"Accuracy against sparsity: {group.label}<" in html, "which figure is whose"
        assert f"Remaining work of attention: {group.label}<" in html


def test_text_of_recipes_is_text(run: Path, tmp_path: Path) -> None:
    def attack(data: dict[str, Any]) -> None:
        data["recipe"]["data"].update(task="<script>alert(1)</script>")
        data.update(stages=[], training={})

    assert "<script>" not in make_report([changed(run, tmp_path / "<b>", attack)]).html


def test_timings_are_read_from_folders_and_files(run: Path, tmp_path: Path) -> None:
    assert [row["seq_len"] for row in read_timings([run])] == [128, 512]
    assert len(read_timings([run, run / "bench.json"])) == 4
    with pytest.raises(RecordError, match=r"record\.json: no timings; give a file that"):
        read_timings([run / "record.json"])
    with pytest.raises(RecordError, match="no such record"):
        make_report([tmp_path])


def test_a_missing_library_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ReportError, match=r"needs jinja2, matplotlib: pip install 'attnpress\[report\]'"):
        make_report([run])


def test_heads_are_described_by_their_extremes() -> None:
    words = describe_heads([[0.1, 0.9], [0.2, 0.4]])
    assert words == "2 layers by 2 heads: lowest 0.1 in layer 0, head 0; highest 0.9 in layer 0, head 1; mean 0.4."


def test_curves_of_several_runs_are_described_once() -> None:
    lines = [Line("dense", [1, 2], [0.5, 0.25], 0), Line("asked", [1, 2], [0.0, 0.9], 1), Line("dense", [1], [1.0], 0)]
    assert describe_curves(lines) == "dense: from 0.75 to 0.625, mean of 2 runs; asked: from 0 to 0.9"


def test_chosen_heads_span_the_errors(run: Path) -> None:
    stage = read_record(run).stages[-1]
    errors = {
        (i, j): head.errors["output"] for i, layer in enumerate(stage.layers) for j, head in enumerate(layer.heads)
    }
    least, _, most = chosen_heads(stage)
    assert errors[least] == min(errors.values())
    assert errors[most] == max(errors.values())


def test_a_threshold_stands_where_its_pairs_are() -> None:
    assert threshold_at("relative", 0.25) == threshold_at("threshold", 0.25) == 2.0
    assert threshold_at("mass", 0.9) == 0.9
    assert threshold_at("topk", 0.5) is None
    assert threshold_at("relative", 0.0) is None


def test_remaining_work_is_in_percent_of_the_dense_one() -> None:
    stage = StageRecord(
        "one_shot", {}, 0, 0, 0, 1, 0, 0, {}, 200, 120,
        {"bit_operations_dense": 50, "bit_operations_remaining": 5, "bytes_dense": 8, "bytes_remaining": 2}, [], 0.0,
    )  # fmt: skip
    assert remaining_work(stage) == {"multiply-accumulates": 60, "bit operations": 10, "bytes of P": 25}
    assert head_values(stage) == {}


def test_drawings_hold_the_numbers_they_are_given() -> None:
    figure = curves([Line("asked", [1, 2], [0.0, 0.5], 0, dashed=True), Line("achieved", [1, 2], [0.1, 0.4], 1)], "y")
    first, second = figure.axes[0].get_lines()
    assert np.asarray(second.get_ydata()).tolist() == [0.1, 0.4]
    assert (first.get_color(), first.get_linestyle()) == (COLORS[0], "--")
    drawn: Any = bars({"a": {"x": 1.5}, "b": {"x": 3.0}}, "times").axes[0].patches
    shown = [bar.get_width() for bar in drawn]
    assert shown == [1.5, 3.0]


def test_odd_letters_are_drawn_as_they_are() -> None:
    figure = curves([Line("5 $ or $ 6 \N{CJK UNIFIED IDEOGRAPH-4E2D} <&>", [1], [1])], "y")
    assert "&lt;&amp;&gt;" in to_svg(figure, "odd")
