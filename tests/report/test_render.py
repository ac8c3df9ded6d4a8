"""Tables: the same cells on the terminal and in Markdown, made from the record alone."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from attnpress.records.run import STAGES, Record, StageRecord
from attnpress.report.render import TITLES, seeds_rows, stage_rows, stages_markdown, stages_table

BITS = {"q": 8, "k": 8, "v": 4, "p": None}
DENSE = StageRecord(
    "dense", {"f1": 85.126, "accuracy": 80.0}, 0.0, 0.0, 0.5, 64, 0.0, 31.4, dict.fromkeys(BITS), 200, 200, {}, [], 1.0
)
PROGRESSIVE = StageRecord("progressive", {"f1": 84.5, "accuracy": 79.0}, 0.9514, 0.94, 0.98, 64, 0.25, 1.526, BITS, 200, 105, {}, [], 2.0)  # fmt: skip # noqa: E501


def make_record(seed: int = 0, *stages: StageRecord) -> Record:
    recipe = {"data": {"task": "mrpc"}, "model": "tiny", "compress": {"epochs": 3.0}}
    provenance = {"rows": {"eval": 408}, "seed": seed, "weights": {"dense": f"hash {seed}"}}
    return Record(recipe, "f1", 81.22, provenance, list(stages) or [DENSE, PROGRESSIVE])


def test_a_row_for_each_stage() -> None:
    header, dense, progressive = stage_rows(make_record())
    assert header == (
        "stage",
        "f1",
        "sparsity",
        "pruned",
        "padded",
        "tiles",
        "keys per query",
        "bits Q/K/V/P",
        "MACs left",
    )
    assert dense == ("dense", "85.13", "0.000", "0.000", "0.500", "0.000", "31.40", "fp/fp/fp/fp", "100.0%")
    assert progressive[1:] == ("84.50", "0.951", "0.940", "0.980", "0.250", "1.53", "8/8/4/fp", "52.5%")
    assert set(TITLES) == set(STAGES), "every stage has a title"


def test_terminal_and_markdown_show_the_same_cells() -> None:
    record = make_record()
    rows = [list(row) for row in stage_rows(record)]
    table = stages_table(record)
    shown = [[str(column.header) for column in table.columns]]
    shown += [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    assert shown == rows
    lines = [line for line in stages_markdown(record).splitlines() if line.startswith("|")]
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [written[0], *written[2:]] == rows
    assert written[1] == ["---", *["---:"] * 8]


def test_the_table_says_what_its_figures_mean() -> None:
    screen = io.StringIO()
    Console(file=screen, width=140).print(stages_table(make_record()))
    for text in (" ".join(screen.getvalue().split()), stages_markdown(make_record())):
        assert "f1 in points on 408 rows" in text
        assert "padded to 64 tokens" in text
        assert "most frequent class gives 81.22" in text
    assert "mrpc with tiny" in screen.getvalue()
    assert "most frequent class" not in stages_markdown(dataclasses.replace(make_record(), majority=None))


def test_a_run_that_has_just_begun_has_an_empty_table() -> None:
    assert stages_markdown(dataclasses.replace(make_record(), stages=[])).count("\n|") == 1


def test_seeds_need_a_dense_stage_to_compare_with() -> None:
    records = [make_record(0, PROGRESSIVE)]
    with pytest.raises(ValueError, match="no dense stage"):
        seeds_rows(records, records)
