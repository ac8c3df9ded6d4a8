"""The tables and pictures of the README and of the leaderboard are those of the committed records."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from attnpress.config.recipe import load_spec, parse_spec, spec_to_dict
from attnpress.records.leaderboard import read_board
from attnpress.records.run import Record, read_record
from attnpress.records.table import brief, read_table, table_text
from attnpress.studies.evidence import EvidenceSpec
from attnpress.studies.evidence import plan as plan_evidence
from attnpress.studies.leaderboard.spec import BoardSpec, plan

ROOT = Path(__file__).parents[2]
DECIMAL = re.compile(r"\d+\.\d+")
RECORDS = {
    (file.parent.name, f"{file.stem}-{name}"): record
    for kind in ("evidence", "ablations")
    for file in sorted((ROOT / "records" / kind).glob("*.json"))
    for name, record in read_table(file).items()
} | {("records", "demo"): read_record(ROOT / "records" / "demo.json")}
"""By the folder and the name of the table and run."""

LARGEST = 9_000
"""Bytes of a run in a table of records, on average: long records are not kept here (CONTRIBUTING.md)."""

ASKED = {
    (kind, f"{item.table.stem}-{item.name}"): item.stages
    for kind in ("evidence", "ablations")
    for file in sorted((ROOT / "recipes" / kind).glob("*.yaml"))
    for item in plan_evidence(load_spec(EvidenceSpec, file), ROOT / "runs", ROOT / "records" / kind)
}
"""Stages of each run that a recipe plans, by the same names."""


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("README.md", 6),
        ("docs/tutorial.md", 1),
        ("docs/ecosystem.md", 1),
        ("docs/results.md", 7),
        ("docs/evidence.md", 16),
        ("docs/method.md", 4),
        ("docs/benchmarks.md", 10),
        ("docs/reliability.md", 1),
        ("docs/accelerator.md", 4),
        ("docs/howto/quantize.md", 11),
    ],
)
def test_tables_are_made_from_records(page: str, count: int) -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))["filled"]
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == count
    assert fill(text) == text, "run: python docs/fill_tables.py"


@pytest.mark.parametrize("page", ["docs/results.md", "docs/evidence.md"])
def test_every_decimal_in_the_text_is_one_of_a_table(page: str) -> None:
    """Of either page, so that no sentence keeps a result that its records no longer hold."""
    made = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("docs/results.md", "docs/evidence.md")]
    known = {number for text in pages for block in made.findall(text) for number in DECIMAL.findall(block)}
    text = re.sub(r"`[^`]*`|```.*?```", "", made.sub("", (ROOT / page).read_text(encoding="utf-8")), flags=re.DOTALL)
    assert set(DECIMAL.findall(text)) <= known


def test_the_figure_of_the_evidence_is_made_from_records() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    drawn = (ROOT / fill["EVIDENCE"]).read_text(encoding="utf-8")
    assert fill["evidence_picture"](ROOT / "records" / "evidence") == drawn, "run: python docs/fill_tables.py"


def test_the_picture_of_tails_is_made_from_records() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    drawn = (ROOT / fill["TAILS_PICTURE"]).read_text(encoding="utf-8")
    assert fill["tails_picture"](ROOT / "records" / "evidence") == drawn, "run: python docs/fill_tables.py"


def test_the_front_of_tails_is_made_from_its_record() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    assert fill["front_picture"]() == (ROOT / fill["FRONT"]).read_text(encoding="utf-8"), (
        "run: python docs/fill_tables.py"
    )


def test_the_figure_of_the_load_balance_is_made_from_its_record() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    assert fill["lanes_picture"]() == (ROOT / fill["LANES"]).read_text(encoding="utf-8"), (
        "run: python docs/fill_tables.py"
    )


def test_the_analytic_model_is_within_5_percent_of_the_recorded_cycles() -> None:
    found = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    dense, *_ = [
        line for line in found["scalesim_markdown"](found["hardware"]("scalesim")).splitlines() if "dense" in line
    ]
    assert abs(float(dense.split("|")[-2].strip().rstrip("%"))) <= 5


def test_the_picture_is_made_from_the_record() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    record = read_record(ROOT / "records" / "demo.json")
    drawn = (ROOT / fill["PICTURE"]).read_text(encoding="utf-8")
    assert fill["picture"](record) == drawn, "run: python docs/fill_tables.py"
    assert f">{record.stages[-1].metrics['accuracy']:.1f}<" in drawn
    changed = record.with_stage(dataclasses.replace(record.stages[-1], keys_per_row=9.0))
    assert fill["picture"](changed) != drawn


def test_the_page_of_the_leaderboard_is_made_from_its_record() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    text = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == 3
    assert fill["filled"](text) == text, "run: python docs/fill_tables.py"
    drawn = (ROOT / fill["BOARD_PICTURE"]).read_text(encoding="utf-8")
    assert fill["board_picture"]() == drawn, "run: python docs/fill_tables.py"


def test_the_committed_leaderboard_is_that_of_the_committed_recipe() -> None:
    board, record = (
        load_spec(BoardSpec, ROOT / "recipes" / "leaderboard.yaml"),
        read_board(ROOT / "records/leaderboard"),
    )
    assert [(cell.task, cell.rule, cell.asked, cell.seed) for cell in plan(board)] == [
        (cell.task, cell.rule, cell.asked, cell.seed) for cell in record.cells
    ]
    asked, run = spec_to_dict(board), spec_to_dict(parse_spec(BoardSpec, record.board))  # with keys that are newer
    assert asked["rules"] == run["rules"]
    assert asked["recipe"] == run["recipe"]
    for task, changes in run["tasks"].items():
        assert {**changes, "data": {**changes["data"], "data_dir": None}} == {
            **asked["tasks"][task], "data": {**asked["tasks"][task]["data"], "data_dir": None}
        }  # fmt: skip
        assert not changes["data"]["data_dir"].startswith("/"), "a record holds no path of a machine"
    for cell in record.cells:
        if cell.measured is not None:
            baseline = record.baseline(cell.task, cell.seed)
            assert baseline is not None
            assert cell.weights == baseline.provenance["weights"]["dense"]


def test_a_table_changed_by_hand_is_made_anew() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))["filled"]
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    changed = text.replace("| dense |", "| other |")
    assert changed != text
    assert fill(changed) == text


@pytest.mark.parametrize("place", RECORDS, ids=lambda place: place[1])
def test_committed_records_are_whole(place: tuple[str, str]) -> None:
    record: Record = RECORDS[place]
    trained = "dense_control" if "-dense-" in place[1] else "progressive"
    assert set(ASKED.get(place, ("dense", trained))) <= {stage.name for stage in record.stages}
    assert record.provenance["weights"].keys() >= {"base", "dense"}
    for stage in record.stages:
        assert 0 <= stage.pruned <= stage.sparsity <= stage.padded_sparsity <= 1
        pruned = stage.macs_remaining - stage.work.get("macs_tail", 0)
        assert stage.macs_dense / 2 <= pruned <= stage.macs_dense, "what a tail takes comes on top"


def test_committed_tables_are_brief_and_lie_alone() -> None:
    files = [file for kind in ("evidence", "ablations") for file in (ROOT / "records" / kind).glob("*.json")]
    assert not [file.name for file in files if "-seed" in file.stem], "fold them in: CONTRIBUTING.md says how"
    for file in files:
        assert file.stat().st_size <= LARGEST * len(read_table(file))
        assert file.read_text("utf-8") == table_text({name: brief(one) for name, one in read_table(file).items()})
